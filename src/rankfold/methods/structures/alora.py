"""aLoRA: a LoRA that acts only from its invocation tokens onwards, so that a base model's cache can be used.

    y_t = W0 x_t + 1[t >= t0] s B A x_t,   t0 = start of the last occurrence of the invocation in the prompt

Greenewald et al. 2025. B in R^{out x r}, A in R^{r x in}, s = alpha / r. The invocation's own tokens are
adapted; rows without it are the base model's. It cannot be folded. Rank 32 follows the paper's advice to take
more than LoRA's. Start: the base, exactly.

Deviation: the default targets are all projections of attention, where the paper adapts queries, keys and
values.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...layers import ModelInputs
from ...weights import Gated, Weight
from ..registry import structure
from ..site import Site

_NEVER = torch.iinfo(torch.int64).max


class Invoked:
    """The gate that opens where the invocation starts and stays open, across calls that share a cache.

    It also reads what the base alone puts into a cache.

    Args:
        invocation: token ids.
    """

    remembers = True

    def __init__(self, invocation: Sequence[int]) -> None:
        self.invocation = tuple(invocation)

    def compute(self, inputs: ModelInputs) -> Tensor:
        """Return the gate, (batch, token)."""
        if inputs.ids is None:
            raise InvalidOption(
                "alora finds its invocation in input_ids; a model called with inputs_embeds has none"
            )
        start = self.start_of(inputs.ids)
        start = torch.where(start == _NEVER, start, start + inputs.past)
        name = f"start of {self.invocation}"
        if name in inputs.kept:
            start = torch.where(start == _NEVER, inputs.kept[name].to(start.device), start)
        inputs.kept[name] = start
        place = inputs.past + torch.arange(inputs.tokens, device=inputs.device)
        return place[None] >= start[:, None]

    def start_of(self, ids: Tensor) -> Tensor:
        """Return where the last occurrence in ids (batch, token) starts, (batch,), or the largest integer."""
        size = len(self.invocation)
        none = torch.full((ids.shape[0],), _NEVER, device=ids.device)
        if ids.shape[1] < size:
            return none
        hits = (ids.unfold(1, size, 1) == torch.tensor(self.invocation, device=ids.device)).all(-1)
        place = torch.arange(hits.shape[1], device=ids.device)
        last = torch.where(hits, place, -1).max(1).values
        return torch.where(last < 0, none, last)


def invocation_gate(*, invocation: Any, **options: float) -> Invoked:
    """Return the gate of an invocation.

    Raises:
        InvalidOption: the invocation is empty or holds other things than token ids.
    """
    tokens = list(invocation) if isinstance(invocation, Sequence) else []
    if not tokens or not all(isinstance(token, int) for token in tokens):
        raise InvalidOption(f"alora needs invocation=(token ids of the invocation), not {invocation!r}")
    return Invoked(tokens)


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
    """Return W0 plus the gated change; invocation is a sequence of token ids, dropout in [0, 1)."""
    change = site.low_rank(rank, site.scaling(alpha, rank), dropout)
    return site.base + Gated(change, site.gates, site.gate_key)
