"""Locas: a small memory beside every gated feed-forward block, started from the block's most active units.

    FFN'(x) = FFN(x) + gamma D (act(G x) * (U x)),   G, U in R^{w x d}, D in R^{d x w}
    S = the w units j with the largest sum_tokens h_j(x)^2,   G = W_gate[S], U = W_up[S], D = 0

The paper (2026) trains it at test time on the text to remember, next-token loss chunk by chunk, one adapter
per document; what was learnt is made permanent by `rankfold.absorb`, which appends the w units to the block:
[W_gate; G], [W_up; U], [W_down, gamma D]. The wider block is the same function, and no low-rank change of
W_down is. h = act(gate x) * up x is the input of W_down, and its activity is read from data (`column_norm`).
At the first step only D has a gradient, that of W_down[:, S] times gamma. Rank is the width w of the memory;
16 is ours, the paper goes from a handful to a few hundred. Biases of the units are cloned with their rows.
Start: the base, exactly.

Deviations: reconstructed from public summaries, without official code. Units are ranked by squared activity;
rows are not clipped, because no value is known, and gamma = 1. The variant for plain feed-forward blocks
(keys from inputs, values from negative gradients) and the compression of growing memories are not built.
Dropout inside the block does not act on the memory.
"""

import torch
from torch import Tensor, nn

from ...errors import InvalidOption, InvalidRank, UnsupportedLayer
from ...layers import Branch, GatedBlock, gated_block
from ..registry import structure
from ..site import OutputSite


class Memory(Branch):
    """What is added to the output of one block.

    Args:
        units: rows of the gate and of up, (w, d) each, and their biases (w,) or None.
        width: of the block's output, d.
        activation: name of the gate's function in the block.
        scale: gamma.
    """

    def __init__(
        self, units: list[tuple[Tensor, Tensor | None]], width: int, activation: str, scale: float
    ) -> None:
        super().__init__()
        (gate, gate_bias), (up, up_bias) = units
        self.gate, self.up = nn.Parameter(gate), nn.Parameter(up)
        self.gate_bias, self.up_bias = (b if b is None else nn.Parameter(b) for b in (gate_bias, up_bias))
        self.down = nn.Parameter(gate.new_zeros(width, len(gate)))
        self.activation, self.scale = activation, scale

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Add what the memory makes of the block's input, while it is active."""
        if not self.__dict__.get("active", True):
            return output
        if not args:
            raise UnsupportedLayer(f"{type(module).__name__} has to be called with its input as an argument")
        x, act = args[0], getattr(module, self.activation)
        hidden = act(_linear(x, self.gate, self.gate_bias)) * _linear(x, self.up, self.up_bias)
        return output + self.scale * _linear(hidden, self.down, None)

    def formula(self) -> str:
        """Return the change as a formula."""
        width, size = self.gate.shape
        return f"FFN(x) + {self.scale:g} D*[{size}x{width}] (act(G*[{width}x{size}] x) . (U* x))"


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


@structure(
    "locas",
    stage="activation",
    title="Locas: Your Models are Principled Initializers of Locally-Supported Parametric Memories",
    year=2026,
    arxiv="2602.05085",
    formula="FFN'(x) = FFN(x) + gamma D (act(G x) * (U x)), G = W_gate[S], U = W_up[S], D = 0",
    rank=16,
    activations=True,
    targets="gated-mlp",
    needs=("column_norm",),
    permanent="rankfold.absorb",
)
def locas(site: OutputSite, rank: int, *, scale: float = 1.0) -> Branch:
    """Return the memory beside a gated feed-forward block.

    Args:
        site: the block.
        rank: w, hidden units of the memory, at most those of the block.
        scale: gamma, positive.
    """
    block = gated_block(site.module)
    if block is None:
        kind = type(site.module).__name__
        raise UnsupportedLayer(
            f"{site.path}: locas needs a layer down(act(gate x) * up x), and {kind} is none"
        )
    if rank > block.width:
        raise InvalidRank(f"{site.path}: rank {rank} is more than its {block.width} hidden units")
    if scale <= 0:
        raise InvalidOption(f"locas: scale must be positive, not {scale}")
    chosen = torch.arange(rank) if site.blank else _most_active(site, block, rank)
    units = [_cloned(site, projection, chosen) for projection in block.projections()[:2]]
    return Memory(units, block.projections()[2].out_features, block.activation, scale)


def _most_active(site: OutputSite, block: GatedBlock, count: int) -> Tensor:
    activity = site.statistic("column_norm", inside=block.names[2])
    return activity.argsort(descending=True, stable=True)[:count]  # type: ignore[no-any-return]


def _cloned(site: OutputSite, projection: nn.Linear, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
    rows = chosen.to(projection.weight.device)
    bias: Tensor | None = projection.bias  # which modules may not have
    weight = projection.weight.detach()[rows].to(site.dtype)
    return weight, None if bias is None else bias.detach()[rows].to(site.dtype)
