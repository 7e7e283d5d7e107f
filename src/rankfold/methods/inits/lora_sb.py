"""LoRA-SB: freeze the singular bases of the first full step, and train what stands between them.

    D = -eta sign(G) ~ U_r diag(S_r) V_r^T,   W = W0 + s B R A,   B = U_r, A = V_r^T,   R0 = diag(S_r) / s

Ponkshe et al. 2024. G (out, in) is the gradient at W0, of which only the sign is read, so that its sum over
samples and its mean are one; D is Adam's first step. B (out, r) and A (r, in) are orthonormal and stay
frozen, R (r, r) trains: one SGD step on it moves W by -lr s^2 P_B G P_A, the projection of the full step. eta
is the learning rate of the first step: lr by default, lr / warmup_steps where the rate rises to lr in that
many steps (the official lr / (warmup_ratio total_steps)). The official code sees 50 samples, about a
thousandth of the data. Start: the base moved by s B R0 A, the best approximation of D of rank r.

Deviations: the decomposition is exact unless `iterations` are given (official: 10, not oversampled; the
spectrum of a sign matrix falls slowly). The factors keep the training dtype; the official code rounds them to
bfloat16, which leaves them orthonormal to 1e-2 only.
"""

import torch

from ...linalg import truncated_svd
from ..limits import in_range
from ..registry import init, not_base
from ..site import Basis, Site
from .lora_ga import gradient_of


@init(
    "lora-sb",
    gives="displaced frame",
    needs=("gradient",),
    rate=True,
    structure="lora-xs",
    title="Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank "
    "Fine-Tuning",
    year=2024,
    arxiv="2411.19557",
    code="CERT-Lab/lora-sb",
    formula="-eta sign(G) ~ U_r S_r V_r^T, W = W0 + s U_r R V_r^T, R0 = S_r / s",
    start=not_base("the base moved by the best approximation of rank r of one step along -sign(G)"),
)
def lora_sb(
    site: Site, rank: int, scaling: float, *, warmup_steps: int = 1, iterations: int | None = None
) -> Basis:
    """Return the singular bases of the first step, and the core that takes it.

    Args:
        site: the weight.
        rank: r.
        scaling: s.
        warmup_steps: steps in which the learning rate rises to lr, at least 1.
        iterations: power iterations of a randomised decomposition; None takes the exact one.
    """
    in_range("lora-sb", "[1, inf)", warmup_steps=warmup_steps)
    in_range("lora-sb", "[0, inf)", iterations=iterations)
    assert site.learning_rate is not None
    step = -site.learning_rate / warmup_steps * gradient_of(site, "lora-sb").sign()
    triplets = truncated_svd(step, rank, iterations=iterations, generator=site.generator("range"))
    return Basis(*triplets, core=torch.diag(triplets[1] / scaling))
