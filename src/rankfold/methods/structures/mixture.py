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

from ...errors import InvalidOption
from ...weights import Dense, Experts, Router, Same, Weight
from ..gating import real_gate
from ..policies import Softmax
from ..registry import structure
from ..routing import check_experts, expert_factors, router_leaf
from ..site import Site


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
        experts: E, how many there are, at least 1.
        top_k: how many experts a token uses, 1 to E; None for all.
        shared_down: one A for all experts.
        balance: weight of the balance loss, at least 0.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> model = rf.adapt(model, "mixture", rank=2, experts=3, targets=["0"]).train()
        >>> loss = model(torch.ones(2, 5, 16)).square().mean() + rf.auxiliary_loss(model)
        >>> loss.backward()
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
