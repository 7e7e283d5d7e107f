"""LoRA-Composer's regional gating: every concept's LoRA acts inside its own box of the image only.

    y_p = W0 x_p + sum_i M_i(p) s B_i A_i x_p,   M_i in {0, 1}^{height x width},   p a point of the image

Yang et al. 2024. One adapter a concept: a fresh LoRA, or, with `of`, the frozen change of an adapter that the
model holds already, which needs no training. Use several together (`rankfold.use`), each with its mask
(`rankfold.gate_inputs(model, regions={name: (height, width) or (batch, height, width)})`), which layers that
read the image at another size of the same shape see resized. Outside all boxes the output is the base's. It
cannot be folded. Start: the base for a fresh LoRA.

Deviations: the region-aware injection alone, as a gate; the rest of the method belongs to a sampling loop.
"""

from ...weights import Gated, Weight
from ..gating import region_gate
from ..registry import structure
from ..routing import taken_factors
from ..site import Site


@structure(
    "lora-composer",
    title="LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization in Training-Free "
    "Diffusion Models",
    year=2024,
    arxiv="2403.11627",
    code="Young98CN/LoRA_Composer",
    formula="y_p = W0 x_p + sum_i M_i(p) s B_i A_i x_p",
    init="kaiming",
    starts=("zero", "residual"),
    pairs="parts",
    sides=True,
    entries=True,
    layers=("linear",),
    targets="attention",
    gate=region_gate,
    inputs=("regions",),
)
def lora_composer(site: Site, rank: int, *, alpha: float | None = None, of: str | None = None) -> Weight:
    """Return W0 plus the change inside the region.

    Args:
        site: the weight.
        rank: r; at least that of `of`.
        alpha: numerator of the scaling of a fresh LoRA; the rank by default.
        of: another adapter of the model, whose low-rank change is copied and frozen.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(9, 9)), "lora-composer", rank=2, targets="0")
        >>> with rf.gate_inputs(model, regions={"default": torch.tensor([[1, 0], [0, 0]])}):
        ...     output = model(torch.ones(1, 4, 9))  # an image of 2 x 2 points
    """
    if of is None:
        change = site.low_rank(rank, site.scaling(alpha, rank))
    else:
        factors = taken_factors(site, of, rank, "lora-composer")
        change = site.frozen(factors.up, "up") @ site.frozen(factors.down, "down")
    return site.base + Gated(change, site.gates, site.gate_key)
