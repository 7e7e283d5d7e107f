"""aLoRA: a LoRA that acts only from its invocation tokens onwards, so that a base model's cache can be used.

    y_t = W0 x_t + 1[t >= t0] s B A x_t,   t0 = start of the last occurrence of the invocation in the prompt

Greenewald et al. 2025. B in R^{out x r}, A in R^{r x in}, s = alpha / r. The invocation's own tokens are
adapted; rows without it are the base model's. It cannot be folded. Rank 32 follows the paper's advice to take
more than LoRA's. Start: the base, exactly.

Deviation: the default targets are all projections of attention, where the paper adapts queries, keys and
values.
"""

from collections.abc import Sequence

from ...weights import Gated, Weight
from ..gating import invocation_gate
from ..registry import structure
from ..site import Site


@structure(
    "alora",
    title="Activated LoRA: Fine-tuned LLMs for Intrinsics",
    year=2025,
    arxiv="2504.12397",
    code="IBM/activated-lora",
    formula="y_t = W0 x_t + 1[t >= t0] s B A x_t",
    init="kaiming",
    starts=("zero", "residual"),
    pairs="parts",
    sides=True,
    entries=True,
    rank=32,
    layers=("linear",),
    targets="attention",
    gate=invocation_gate,
    example={"invocation": (1,)},
)
def alora(
    site: Site, rank: int, *, invocation: Sequence[int] = (), alpha: float | None = None, dropout: float = 0.0
) -> Weight:
    """Return W0 plus the gated change.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        invocation: token ids, at least one, that the change acts from onwards.
        alpha: numerator of the scaling; the rank by default.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    change = site.low_rank(rank, site.scaling(alpha, rank), dropout)
    return site.base + Gated(change, site.gates, site.gate_key)
