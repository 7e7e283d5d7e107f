"""CapaBoost: one pair of factors used several times under fixed random masks.

    W = W0 + s sum_{i=1..d} (B . M_i) (A . N_i),   M_i in {0,1}^{out x r}, N_i in {0,1}^{r x in},
    s = alpha / r

Song et al. 2023. Every mask has exactly floor(share * entries) ones, drawn once per weight and branch from
the seed. The rank reaches d r with the r (in + out) numbers of LoRA; the gradient of A is the sum of the
branches', each under its mask. d = 2, share 0.5 (d * share = 1), r = 8 and alpha = 16 are the paper's.
Start: the base, exactly.

Deviations: the branches are evaluated as one product of rank d r without using that half of it is zero, so
the multiply-adds are d times LoRA's; masks of the form 2 of 4 and masked bottleneck adapters are left out.
An entry that no mask keeps, about (1 - share)^d of all, gets no gradient and stays at its start but for
decay.

Use it where a rank of d r is wanted from the numbers of LoRA with rank r, and d times its multiply-adds are
no matter while training.
"""

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Dense, Masked, Weight
from ..registry import structure
from ..site import Site


def fixed_mask(site: Site, name: str, shape: tuple[int, ...], share: float) -> Tensor:
    """Return a mask with exactly floor(share * entries) ones at random places."""
    size = shape[0] * shape[1]
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=site.generator(name))[: int(share * size)]] = 1
    return mask.view(shape).to(site.device, site.dtype)


@structure(
    "capaboost",
    title="Increasing Model Capacity for Free: A Simple Strategy for Parameter Efficient Fine-tuning",
    year=2023,
    arxiv="2407.01320",
    code="LINs-lab/CapaBoost",
    formula="W = W0 + s sum_i (B . M_i) (A . N_i), fixed masks",
    init="kaiming",
    starts=("zero", "residual", "displaced"),
    sides=True,
)
def capaboost(
    site: Site, rank: int, *, alpha: float | None = None, branches: int = 2, share: float = 0.5
) -> Weight:
    """Return W0 plus the masked products.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        alpha: numerator of the scaling; twice the rank by default.
        branches: d, how often the factors are used.
        share: of ones in every mask, in (0, 1].
    """
    if branches < 1 or not 0 < share <= 1:
        raise InvalidOption(f"capaboost needs branches >= 1 and share in (0, 1], not {branches} and {share}")

    def masks(end: str, leaf: Dense, axis: int) -> Weight:
        drawn = [fixed_mask(site, f"{end}{i}", leaf.shape, share) for i in range(branches)]
        return Masked(leaf, torch.cat(drawn, axis), f"{leaf.name}.masked")

    def masked(up: Dense, down: Dense) -> Weight:
        return masks("up", up, 1) @ masks("down", down, 0)

    scaling = site.scaling(2 * (site.reference or rank) if alpha is None else alpha, rank)
    return site.base + site.change(site.factors(rank, scaling), scaling, form=masked)
