"""LoReFT: edit hidden states, at chosen positions, inside a trained low-dimensional subspace.

    h' = h + R^T (W h + b - R h),   R in R^{r x d} with orthonormal rows,   so R h' = W h + b

Wu et al. 2024. It acts on the output of a block, so there is no weight to fold it into. Positions "f7+l7" are
the first and last seven tokens of the prompt, clipped to half of it each; generated tokens are not edited. In
training the prompt is what comes before a row's first label, and rows without such tokens count whole; in
generation without a key-value cache it is all tokens so far. W in R^{r x d} and b in R^r start like those of
a linear layer, R at a random frame; r = 8 and "f7+l7" are the paper's for commonsense reasoning. Start: not
the base.

Deviations: first and last positions share one edit ("tied"); no dropout; of the paper's family only LoReFT.
"""

import math

import torch
from torch import Tensor, nn

from ...errors import InvalidRank
from ...layers import Branch
from ...weights import Gates
from ..gating import positions_gate
from ..registry import not_base, structure
from ..site import OutputSite


class LoReFT(Branch):
    """The edit of one block's output.

    Args:
        frame: (d, r); the rows of R are its orthonormalised columns.
        weight, bias: W (r, d) and b (r,).
        gates, key: where the positions are found.
    """

    def __init__(self, frame: Tensor, weight: Tensor, bias: Tensor, gates: Gates, key: str) -> None:
        super().__init__()
        self.frame, self.weight = nn.Parameter(frame.contiguous()), nn.Parameter(weight)
        self.bias = nn.Parameter(bias)
        self.gates, self.key = gates, key

    def rotation(self) -> Tensor:
        """Return R, (r, d), with orthonormal rows."""
        wide = self.frame if self.frame.dtype == torch.float64 else self.frame.float()
        q, r = torch.linalg.qr(wide)
        rotation: Tensor = (q * torch.sign(torch.diagonal(r))).T
        return rotation

    def edit(self, hidden: Tensor) -> Tensor:
        """Return the edited hidden states (batch, token, d); other positions are untouched, bit for bit."""
        chosen = self.gates.read(self.key, hidden) != 0
        rotation = self.rotation().to(hidden.dtype)
        wanted = nn.functional.linear(
            hidden, self.weight.to(hidden.dtype) - rotation, self.bias.to(hidden.dtype)
        )
        return torch.where(chosen, hidden + wanted @ rotation, hidden)

    def formula(self) -> str:
        """Return the edit as a formula."""
        rank, width = self.weight.shape
        return f"h + R*^T (W*[{rank}x{width}] h + b* - R* h)"


@structure(
    "reft",
    stage="activation",
    title="ReFT: Representation Finetuning for Language Models",
    year=2024,
    arxiv="2404.03592",
    code="stanfordnlp/pyreft",
    formula="h' = h + R^T (W h + b - R h), R R^T = I",
    start=not_base("R h' = W h + b at the edited positions"),
    activations=True,
    gate=positions_gate,
    targets="blocks",
)
def reft(site: OutputSite, rank: int, *, positions: str = "f7+l7") -> Branch:
    """Return the edit of a block of hidden size d.

    Args:
        site: the block.
        rank: dimension of the subspace, at most d.
        positions: how many of the prompt's first and last tokens are edited, such as "f7+l7".
    """
    width = site.width
    if rank > width:
        raise InvalidRank(
            f"{site.path}: rank {rank} is more than its {width} channels; choose rank <= {width}"
        )
    frame = site.orthonormal("frame", width, rank)
    bound = 1 / math.sqrt(width)
    weight, bias = site.uniform("weight", rank, width, bound=bound), site.uniform("bias", rank, bound=bound)
    return LoReFT(frame, weight, bias, site.gates, site.gate_key)
