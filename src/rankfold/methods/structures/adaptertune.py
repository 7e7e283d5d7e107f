"""AdapterTune: a bottleneck with a zero up-projection after the blocks of a frozen vision transformer.

    z = Block(x),   x' = z + alpha (U GELU(D z + c) + e),   D in R^{r x d}, U in R^{d x r}

Khazem 2026. It acts on every token of the output of every `every`-th block, counted from the first, and only
D, c, U, e and the task's head train. D starts Xavier-uniform, c = 0, U = 0 and e = 0, so that D and c get
their first gradient after U has moved; `std` = 1e-4 is the paper's other start, U and e normal. r = 16,
alpha = 1 and every block are the paper's; it trains with AdamW, lr 1e-3, weight decay 0.05. The map is not
linear, so there is no weight to fold it into. Start: the base, exactly.

Deviations: none from the official code. It serves any model with repeated blocks, not vision transformers
only.
"""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import InvalidOption
from ...layers import Branch
from ..registry import structure
from ..site import OutputSite


class Bottleneck(Branch):
    """The edit of one block's output.

    Args:
        down, down_bias: D (r, d) and c (r,).
        up, up_bias: U (d, r) and e (d,).
        alpha: what the edit is multiplied by.
    """

    def __init__(self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor, alpha: float) -> None:
        super().__init__()
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(down_bias)
        self.up, self.up_bias = nn.Parameter(up), nn.Parameter(up_bias)
        self.alpha = alpha

    def edit(self, hidden: Tensor) -> Tensor:
        """Return the edited hidden states, (..., d)."""
        down, down_bias, up, up_bias = (
            tensor.to(hidden.dtype) for tensor in (self.down, self.down_bias, self.up, self.up_bias)
        )
        inner = nn.functional.gelu(nn.functional.linear(hidden, down, down_bias))
        return hidden + self.alpha * nn.functional.linear(inner, up, up_bias)

    def formula(self) -> str:
        """Return the edit as a formula."""
        rank, width = self.down.shape
        return f"z + {self.alpha:g} (U*[{width}x{rank}] GELU(D*[{rank}x{width}] z + c*) + e*)"


def every_so_many(path: str, options: Mapping[str, Any]) -> bool:
    """Say whether a block is one of every `every` of its list, by the number in its path.

    Example:
        >>> [i for i in range(5) if every_so_many(f"vit.layers.{i}", {"every": 2})]
        [0, 2, 4]
    """
    if options["every"] < 1:
        raise InvalidOption(f"adaptertune: every must be at least 1, not {options['every']}")
    numbers = [int(part) for part in path.split(".") if part.isdigit()]
    return not numbers or numbers[-1] % int(options["every"]) == 0


@structure(
    "adaptertune",
    stage="activation",
    title="AdapterTune: Zero-Initialized Low-Rank Adapters for Frozen Vision Transformers",
    year=2026,
    arxiv="2603.14706",
    code="salimkhazem/adaptertune",
    formula="x' = z + alpha (U GELU(D z + c) + e), U = 0, e = 0",
    rank=16,
    activations=True,
    targets="blocks",
    keeps=every_so_many,
)
def adaptertune(
    site: OutputSite, rank: int, *, alpha: float = 1.0, every: int = 1, std: float = 0.0
) -> Branch:
    """Return the bottleneck after a block of hidden size d.

    Args:
        site: the block.
        rank: width of the bottleneck.
        alpha: what the edit is multiplied by, positive.
        every: edit every so many of the blocks that a preset finds, from the first; blocks that are named are
            all edited.
        std: of the normal start of U and e; 0 starts at the base.
    """
    if alpha <= 0:
        raise InvalidOption(f"adaptertune: alpha must be a positive finite number, not {alpha}")
    if std < 0:
        raise InvalidOption(f"adaptertune: std must not be negative, not {std}")
    width = site.width
    down = site.uniform("down", rank, width, bound=math.sqrt(6 / (rank + width)))
    up, up_bias = site.zeros(width, rank), site.zeros(width)
    if std:
        up, up_bias = site.normal("up", width, rank, std=std), site.normal("up_bias", width, std=std)
    return Bottleneck(down, site.zeros(rank), up, up_bias, alpha)
