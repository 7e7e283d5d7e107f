"""ReMix: k experts with equal constant weights, and a router that learns as a policy, from losses alone.

    y = W0 x + (1 / k) sum_{e in J} s B_e A_e x,   J: k distinct of E experts,   q = softmax(R x~)

Qiu et al. 2026. x~ is the layer's input averaged over the prompt (`per="sequence"`), or each token's
(`per="token"`). In training J is drawn from q without replacement, and no gradient goes through q; otherwise
J is the top k. `rankfold.remix_loss` draws M selections per example with losses L^m; the router's gradient
is (1 / (M - 1)) sum_m (L^m - mean L) grad log p(J^m) (REINFORCE leave-one-out, without bias), the experts'
is the mean of theirs. It cannot be folded.
Start: the base, because every B_e is zero.

Deviations: what the router reads, the weight 1 / k and one draw per sequence and layer are this package's
reading. With a key-value cache the prompt's selection stays; without one all tokens so far are averaged.
Draws use the global random numbers, as dropout does, so that gradient checkpointing repeats them.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Experts, Router, Weight
from ..gating import prompt_gate
from ..registry import structure
from ..routing import (
    check_experts,
    expert_factors,
    log_probability,
    router_leaf,
)
from ..site import Site


@dataclass(frozen=True)
class Drawn:
    """Draws k experts in training and takes the top k otherwise; `per` is "sequence" or "token"."""

    top_k: int
    per: str
    draws: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, router: Router, x: Tensor) -> Tensor:
        """Return the gates, 1 / k at the chosen experts and 0 elsewhere."""
        read = self._read(router, x)
        chosen = self._chosen(router, router.logits(read))
        if router.training:
            counted = router.counted(read) if self.per == "token" else 1.0
            router.gates.draw(
                router.layer_name,
                lambda: (log_probability(router.logits(read), chosen) * counted).flatten(1).sum(1),
            )
        gates = torch.zeros(*read.shape[:-1], router.shape[0], device=x.device)
        return gates.scatter_(-1, chosen, 1 / self.top_k)

    def _read(self, router: Router, x: Tensor) -> Tensor:
        """Return x (batch, token, in), or its mean over the prompt, (batch, 1, in)."""
        x = x.detach().reshape(x.shape[0], -1, x.shape[-1])
        if self.per == "token":
            return x
        counted = router.counted(x)[..., None].to(x.dtype)
        return (x * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)

    def _chosen(self, router: Router, logits: Tensor) -> Tensor:
        if router.training:
            noise = -torch.empty_like(logits).exponential_().log()  # Gumbel: the k largest are such a draw
            return (logits + noise).topk(self.top_k, -1).indices
        kept, name = router.gates.kept, router.layer_name
        if self.per == "token" or not router.gates.past or name not in kept:
            kept[name] = logits.topk(self.top_k, -1).indices
        chosen: Tensor = kept[name]
        return chosen


@structure(
    "remix",
    title="ReMix: Reinforcement routing for mixtures of LoRAs in LLM finetuning",
    year=2026,
    arxiv="2603.10160",
    formula="y = W0 x + 1/k sum_{e in J} s B_e A_e x, J drawn from softmax(R x)",
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
) -> Weight:
    """Return W0 plus the drawn experts.

    Args:
        site: the weight.
        rank: of every expert.
        alpha: numerator of the scaling; the rank by default.
        experts: how many there are, at least 1.
        top_k: how many are drawn, 1 to `experts`.
        per: what draws its own, "sequence" or "token".
    """
    check_experts("remix", experts, top_k)
    if per not in ("sequence", "token"):
        raise InvalidOption(f"remix: per must be 'sequence' or 'token', not {per!r}")
    scaling, matrix = site.scaling(alpha, rank), router_leaf(site, experts)
    router = Router(matrix, site.gates, site.gate_key, site.path, Drawn(top_k, per))
    factors = expert_factors(site, rank, experts, scaling)
    return site.base + site.change(factors, scaling, form=lambda up, down: Experts(up, down, router))
