"""Muon as Outlier-Safe Pre-Training uses it: every matrix moves by its orthogonalised momentum.

    M <- mu M + G,   N = G + mu M,   X = N / |N|
    five times: Z = X X^T,   X <- 3.4445 X + (-4.7750 Z + 2.0315 Z Z) X
    W <- W - lr (0.2 sqrt(max(out, in)) X + wd W)

Park et al. 2025. W (out, in); kernels of convolutions are matrices (out, in * window), and a tall matrix is
iterated transposed. The iteration brings every singular value near 1, so no channel is privileged, and the
factor gives the change a root mean square of 0.2 lr whatever the shape, as Adam's is. Vectors and scalars
are divided by their norm, which is the same for one column. Embeddings and the head are moved by AdamW. mu
= 0.95 and wd = 0.01 are the paper's; rates are of AdamW's order, and 5e-4 is one. One moment is kept
instead of two. The model's part of the paper, a norm with one gain and projections beside the embeddings,
is `rf.optim.outlier_safe`. Start: the weights as they are.

Deviations: the iteration runs in float32 at least; `torch.optim.Muon`, whose steps are otherwise the same
with `adjust_lr_fn="match_rms_adamw"`, runs it in bfloat16 and takes matrices only. Factors of a low-rank
product are orthogonalised one by one, which does not orthogonalise the product. Weights in half precision
are rounded to nearest; moments are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..orthogonal import Muon
from ..recipes import groups, is_plain, optimizer


@optimizer(
    "muon",
    title="Outlier-Safe Pre-Training for Robust 4-Bit Quantization of Large Language Models",
    year=2025,
    arxiv="2506.19697",
    code="dmis-lab/Outlier-Safe-Pre-Training",
    formula="W <- W - lr (0.2 sqrt(max(out, in)) NewtonSchulz(G + mu M) + wd W), M <- mu M + G",
)
def muon(
    params: Any,
    lr: float = 5e-4,
    *,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    iterations: int = 5,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    plain: tuple[str, ...] | None = None,
) -> Muon:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters, or groups with the key `orthogonal`.
        lr: learning rate, of AdamW too.
        momentum: mu, in [0, 1).
        weight_decay: decoupled; of what AdamW moves, too.
        iterations: of Newton and Schulz.
        betas: of AdamW, for the parameters that are `plain`.
        eps: of AdamW.
        plain: words in the names of weights that AdamW moves; None means the tables of a model's embeddings
            and heads, and names with "embed" or "lm_head" where no model is given.

    Example:
        >>> import torch, rankfold as rf
        >>> layer = torch.nn.Linear(16, 8)
        >>> optimizer = rf.optim.muon(layer)
        >>> [group["orthogonal"] for group in optimizer.param_groups]
        [True]
    """
    found = groups(params, None)
    if "rank" in found[0]:  # groups that were made just now
        found = _split(found[0]["params"], is_plain(params, plain))
    return Muon(found, lr, momentum, weight_decay, iterations, betas, eps)


def _split(pairs: list[tuple[str, Tensor]], is_plain: Callable[[str], bool]) -> list[dict[str, Any]]:
    by_muon = [pair for pair in pairs if not is_plain(pair[0])]
    by_adam = [pair for pair in pairs if is_plain(pair[0])]
    made = ({"params": by_muon, "orthogonal": True}, {"params": by_adam, "orthogonal": False})
    return [group for group in made if group["params"]]
