"""Mixture of LoRAs: every token mixes a layer's experts as the layer's own router says.

    y = W0 x + s sum_e pi_e B_e A_e x,   pi = softmax(R x)

Zadouri et al. 2023 (MoLoRA, which mixes softly). B_e in R^{out x r}, A_e in R^{r x in}, R in R^{E x in}.
With `top_k` the k largest pi are kept and renormalised to the sum 1. With `shared_down` all experts have
one A, HydraLoRA's form (Tian et al. 2024). In training every layer leaves the Switch transformer's balance
loss, `balance E sum_e f_e P_e` with f_e the share of tokens whose largest pi is e and P_e the mean of pi_e
(the sum is 1 at uniform routing), for `rankfold.auxiliary_loss(model)`; padding does not count. It cannot
be folded. Start: the base, because every B_e is zero (or the starts are subtracted behind the same gates).

Deviations: MoLoRA has no balance loss; `balance=0` leaves it out.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import Incompatible, InvalidOption
from ...weights import Dense, Experts, Router, Same, Weight
from ..gating import real_gate
from ..registry import structure
from ..routing import check_experts, expert_factors, router_leaf
from ..site import Site


@dataclass(frozen=True)
class Softmax:
    """Mixes experts by a softmax of the router's logits.

    Args:
        top_k: how many are kept, or None for all.
        balance: weight of the balance loss.
    """

    top_k: int | None
    balance: float

    def __call__(self, router: Router, x: Tensor) -> Tensor:
        """Return the gates of x (batch, ..., in), (batch, ..., expert)."""
        shares = router.logits(x).softmax(-1)
        if self.balance and router.training:
            self._leave(router, shares, x)
        if self.top_k is None:
            return shares
        kept = shares.topk(self.top_k, -1)
        return torch.zeros_like(shares).scatter(-1, kept.indices, kept.values / kept.values.sum(-1, True))

    def _leave(self, router: Router, shares: Tensor, x: Tensor) -> None:
        if not torch.is_grad_enabled():
            if router.gates.recording:
                raise Incompatible(
                    f"{router.layer_name}: a mixture's balance loss gets no gradient under reentrant "
                    "checkpointing; checkpoint with use_reentrant=False, or set balance=0"
                )
            return
        counted = router.counted(x)[..., None]
        count, experts = counted.sum().clamp_min(1), shares.shape[-1]
        first = torch.nn.functional.one_hot(shares.argmax(-1), experts) * counted
        frequency, mean = (part.flatten(0, -2).sum(0) / count for part in (first, shares * counted))
        loss = self.balance * experts * (frequency * mean).sum()
        router.gates.collect(router.layer_name, lambda: loss)


@structure(
    "mixture",
    title="Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning",
    year=2023,
    arxiv="2309.05444",
    formula="y = W0 x + s sum_e pi_e B_e A_e x, pi = softmax(R x)",
    init="kaiming",
    starts=("zero", "residual"),
    sides=True,
    entries=True,
    rank=4,
    layers=("linear",),
    gate=real_gate,
)
def mixture(
    site: Site,
    rank: int,
    *,
    alpha: float | None = None,
    experts: int = 4,
    top_k: int | None = None,
    shared_down: bool = False,
    balance: float = 0.01,
) -> Weight:
    """Return W0 plus the routed experts.

    Args:
        site: the weight.
        rank: r, of every expert.
        alpha: numerator of the scaling; the rank by default.
        experts: E.
        top_k: how many experts a token uses, 1 to E; None for all.
        shared_down: one A for all experts.
        balance: weight of the balance loss, at least 0.
    """
    check_experts("mixture", experts, top_k)
    if not balance >= 0:
        raise InvalidOption(f"mixture: balance must be at least 0, not {balance}")
    scaling, matrix = site.scaling(alpha, rank), router_leaf(site, experts)
    router = Router(matrix, site.gates, site.gate_key, site.path, Softmax(top_k, balance))
    factors = expert_factors(site, rank, experts, scaling, shared_down)

    def form(up: Dense, down: Dense) -> Weight:
        return Experts(up, down, router if up.trainable else Same(router))

    return site.base + site.change(factors, scaling, form=form)
