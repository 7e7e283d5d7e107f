"""X-LoRA: LoRAs mixed token by token as a classifier of the model's own last hidden states says.

    y_t = W0 x_t + scale sum_e lam_{t,e} B_e A_e x_t,   lam_t = softmax((R h_t + b) / temperature)

Buehler and Buehler 2024. A first pass without the experts, and without gradients, gives the last hidden
states h (batch, token, d); R (E, d) and b (E,), or (L E, d) and (L E,) with `layerwise`, are the one
classifier of the model. `experts` names adapters that the model holds, whose low-rank changes are copied
and frozen (their own scaling included); a number makes fresh LoRAs, which are trained along. With `top_k`
the k largest are kept, without renormalising, as in the authors' code. It cannot be folded. Start: not the
base with given experts (R and b start like a linear layer's), the base with fresh ones, whose B_e is zero.

Deviations: a classifier of depth 1 only. With a key-value cache the first pass keeps one of its own beside
the caller's, which follows the rearrangements of beam search.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...errors import InvalidOption, UnsupportedLayer
from ...weights import Experts, Given, Weight
from ..gating import classifier_gate, count_of
from ..registry import exact_base, structure
from ..routing import check_experts, check_taken, expert_factors, taken_factors
from ..site import Factors, Place, Planned, Site


def plan(
    sites: Mapping[str, Place],
    ranks: Mapping[str, int],
    *,
    seed: int,
    experts: int | Sequence[str],
    layerwise: bool,
    **options: Any,
) -> Planned:
    """Share R and b, and give every layer its place among the gates."""
    if experts == () or experts == []:
        raise InvalidOption(
            "x-lora: pass experts=(names of adapters of the model), or experts=4 for fresh LoRAs"
        )
    check_experts("x-lora", count_of(experts), None)
    if not isinstance(experts, int):
        check_taken(sites, ranks, experts, "x-lora")
    place = next(iter(sites.values()))
    if place.hidden is None:
        raise UnsupportedLayer("x-lora reads hidden states, and the model's config names no hidden_size")
    gates = count_of(experts) * (len(sites) if layerwise else 1)
    generator = torch.Generator().manual_seed(seed)
    router, bias = (
        torch.rand(gates, place.hidden, generator=generator),
        torch.rand(gates, generator=generator),
    )
    shared = {
        key: ((2 * drawn - 1) / math.sqrt(place.hidden)).to(place.device, place.dtype).requires_grad_()
        for key, drawn in (("router", router), ("bias", bias))
    }
    first = {path: {"layer": torch.tensor(i if layerwise else 0)} for i, path in enumerate(sites)}
    return Planned(shared, first)


@structure(
    "x-lora",
    title="X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large Language Models with "
    "Applications in Protein Mechanics and Molecular Design",
    year=2024,
    arxiv="2402.07148",
    code="EricLBuehler/xlora",
    formula="y_t = W0 x_t + scale sum_e lam_{t,e} B_e A_e x_t, lam_t = softmax(R h_t + b)",
    start=exact_base("with fresh experts, and another one with experts that are named"),
    init="kaiming",
    starts=("zero",),
    sides=True,
    entries=True,
    layers=("linear",),
    plan=plan,
    gate=classifier_gate,
    one_graph=False,
    example={"experts": 2},
)
def x_lora(
    site: Site,
    rank: int,
    *,
    experts: int | tuple[str, ...] = (),
    layerwise: bool = False,
    top_k: int | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> Weight:
    """Return W0 plus the experts.

    Args:
        site: the weight.
        rank: r, at least that of every given expert.
        experts: names of adapters of the model, each once, or how many fresh LoRAs.
        layerwise: every layer has gates of its own.
        top_k: how many experts a token uses, 1 to E; None for all.
        temperature: of the softmax, positive.
        scale: of all experts.
    """
    count = count_of(experts)
    given = Given(site.gates, site.gate_key, int(site.planned["layer"]) * count, count)
    if isinstance(experts, int):
        factors, leaf = expert_factors(site, rank, count, 1.0), site.trained
    else:
        each = [taken_factors(site, name, rank, "x-lora") for name in experts]
        factors = Factors(torch.cat([f.up for f in each], 1), torch.cat([f.down for f in each]))
        leaf = site.frozen
    return site.base + Experts(leaf(factors.up, "up"), leaf(factors.down, "down"), given)
