"""Break-for-Make: both factors of LoRA are half frozen, content and style are learnt in the other halves.

    W = W0 + s [A; B] [C, D] = W0 + s [[A C, A D], [B C, B D]],   s = alpha / r, or 1 without alpha

Xu et al. 2024 (B4M). The first half of the outputs reads A in R^{m/2 x r}, the first half of the inputs C in
R^{r x n/2}; both stay as they were drawn. Content is learnt in D, which only enters the right columns, style
in B, which only enters the bottom rows. Square weights have the orthogonal prior: Q in R^{N x r} with
orthonormal columns, C = Q[S1]^T and A = Q[S2] for disjoint random S1, S2; N = 1280 is the width of SDXL, for
which it was made, or what both halves need. Other weights, and those whose path matches `plain`, have C
normal and A = 0. D is normal with standard deviation 1 / r, B = 0, r = 64. The halves are leaves of their
own: no weight decay reaches a frozen one, and the same seed draws the same A and C. Odd sides: the first half
is the smaller one. Start: not the base, A [C, D] != 0, but the base exactly where A = 0.

Stage 1 trains part="content" or part="style" in an adapter each, with one seed; the adapter of stage 2 is
made of them by `rankfold.methods.join.join`, A, B, C of the style and D of the content, and trains both.

Deviations: stage 1 of the paper also trains the other half, ten times slower, on auxiliary images; that takes
part="both" and a loss for each half, which is the caller's. The Riemannian preconditioner of stage 2 is not
built. Stacked projections of `nn.MultiheadAttention` are one oblong weight.
"""

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...layers.targets import matches
from ...weights import Dense, Joined, Weight
from ..registry import not_base, structure
from ..site import Site

WIDTH = 1280
PARTS = {"both": ("up", "down"), "content": ("down",), "style": ("up",)}


@structure(
    "break-for-make",
    title="Break-for-Make: Modular Low-Rank Adaptations for Composable Content-Style Customization",
    year=2024,
    arxiv="2403.19456",
    code="ICTMCG/Break-for-make",
    formula="W = W0 + s [A; B] [C, D], A and C frozen, B for style and D for content",
    start=not_base("W0 + s [A; 0] [C, D], square weights only", square=True),
    rank=64,
    layers=("linear", "attention"),
    targets="attention",
    sides=True,
)
def break_for_make(
    site: Site,
    rank: int,
    *,
    part: str = "both",
    alpha: float | None = None,
    plain: tuple[str, ...] = ("to_out", "to_out.0"),
) -> Weight:
    """Return W0 + s [A; B] [C, D].

    Args:
        site: the weight.
        rank: inner dimension of the change.
        part: which halves train: "content" (D), "style" (B) or "both".
        alpha: numerator of the scaling; the rank by default.
        plain: patterns of square weights without the orthogonal prior.
    """
    if part not in PARTS:
        raise InvalidOption(f"break-for-make: part must be content, style or both, not {part!r}")
    out, columns = (side // 2 for side in site.shape)
    frozen = {"up": site.zeros(out, rank), "down": site.normal("down.frozen", rank, columns, std=1 / rank)}
    if site.shape[0] == site.shape[1] and not any(matches(site.path, pattern) for pattern in plain):
        frozen = _prior(site, rank)
    trained = {
        "up": site.zeros(site.shape[0] - out, rank),
        "down": site.normal("down", rank, site.shape[1] - columns, std=1 / rank),
    }
    up, down = (
        Joined(
            site.frozen(frozen[side], f"{side}.frozen"),
            Dense(trained[side], f"{side}.half", trainable=side in PARTS[part]),
            axis,
            side,
        )
        for axis, side in enumerate(("up", "down"))
    )
    return site.base + site.scaling(alpha, rank) * (up @ down)


def _prior(site: Site, rank: int) -> dict[str, Tensor]:
    """Return A and C, rows of one matrix with orthonormal columns."""
    half = site.shape[0] // 2
    basis = site.orthonormal("prior", max(WIDTH, 2 * half, rank), rank)
    rows = torch.randperm(len(basis), generator=site.generator("halves")).to(basis.device)
    return {"down": basis[rows[:half]].T.contiguous(), "up": basis[rows[half : 2 * half]]}
