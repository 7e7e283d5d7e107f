"""ReMix: k experts with equal constant weights, and a router that learns as a policy, from losses alone.

    y = W0 x + w sum_{e in J} s B_e A_e x,   J: k distinct of E experts,   q = softmax(R x~)

Qiu et al. 2026. x~ is the layer's input averaged over the prompt (`per="sequence"`), or each token's
(`per="token"`). In training J is drawn from q without replacement, and no gradient goes through q; otherwise
J is the top k. `rankfold.remix_loss` draws M selections per example with losses L^m; the router's gradient
is (1 / (M - 1)) sum_m (L^m - mean L) grad log p(J^m) (REINFORCE leave-one-out, without bias), the experts'
is the mean of theirs. It cannot be folded.
Start: the base, because every B_e is zero.

Deviations: what the router reads, w = 1 / k and one draw per sequence and layer are this package's
reading (`per`, `weight`). With a key-value cache the prompt's selection stays; without one all tokens so far
are averaged. Draws use the global random numbers, as dropout does, so that gradient checkpointing repeats
them; dropout elsewhere is not shared between the M passes.
"""

import math

from ...errors import InvalidOption
from ...weights import Experts, Router, Weight
from ..gating import prompt_gate
from ..policies import Drawn
from ..registry import structure
from ..routing import (
    check_experts,
    expert_factors,
    router_leaf,
)
from ..site import Site


@structure(
    "remix",
    title="ReMix: Reinforcement routing for mixtures of LoRAs in LLM finetuning",
    year=2026,
    arxiv="2603.10160",
    formula="y = W0 x + w sum_{e in J} s B_e A_e x, w = 1/k, J drawn from softmax(R x)",
    status="experimental",
    init="kaiming",
    starts=("zero",),
    sides=True,
    entries=True,
    rank=4,
    layers=("linear",),
    gate=prompt_gate,
    apart=("router",),
    chooses=True,
)
def remix(
    site: Site,
    rank: int,
    *,
    alpha: float | None = None,
    experts: int = 8,
    top_k: int = 2,
    per: str = "sequence",
    weight: float | None = None,
) -> Weight:
    """Return W0 plus the drawn experts.

    Args:
        site: the weight.
        rank: of every expert.
        alpha: numerator of the scaling; the rank by default.
        experts: how many there are, at least 1.
        top_k: how many are drawn, 1 to `experts`.
        per: what draws its own, "sequence" or "token".
        weight: w, the same for every drawn expert, positive; None for 1 / k.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = rf.adapt(model, "remix", rank=2, experts=4, targets=["0"]).train()
        >>> loss = lambda model, x: model(x).square().mean((1, 2))  # of every example
        >>> rf.remix_loss(model, torch.ones(3, 5, 16), loss).backward()
    """
    check_experts("remix", experts, top_k)
    if per not in ("sequence", "token"):
        raise InvalidOption(f"remix: per must be 'sequence' or 'token', not {per!r}")
    if weight is not None and not 0 < weight < math.inf:
        raise InvalidOption(f"remix: weight must be a positive finite number, not {weight}")
    scaling, matrix = site.scaling(alpha, rank), router_leaf(site, experts)
    router = Router(matrix, site.gates, site.gate_key, site.path, Drawn(top_k, per, weight))
    factors = expert_factors(site, rank, experts, scaling)
    return site.base + site.change(factors, scaling, form=lambda up, down: Experts(up, down, router))
