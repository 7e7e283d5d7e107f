"""MPS adapter: the change as a matrix product state, a tensor train over the digits of both indices.

    dW[(o_1..o_p), (i_1..i_q)] = s G_1[o_1] ... G_p[o_p] G_{p+1}[i_1] ... G_{p+q}[i_q],
    G_k in R^{c_{k-1} x n_k x c_k},   c_0 = c_K = 1,   c_k = min(r, what a side can hold),   s = alpha / r

Chen et al. 2026. The digits n_k are the prime factors of out, then of in, the largest first; with powers of
two they are qubits. The rank of the change across cut k, and so the exponential of its entanglement entropy
there, is at most c_k: LoRA is the case in which only the cut between rows and columns is bounded. sum_k
c_{k-1} n_k c_k numbers are trained.

The cores are N(0, 1 / c_{k-1}), which keeps the variance along the train, the last one is zero. Start: the
base, exactly; only the last core has a gradient at first.

Deviations: the abstract fixes no digits, start or scaling; those here are reconstructed, r = 8 is a
library's usual one. A prime size is a single digit. A convolution's columns are channels times window.
"""

from itertools import pairwise

from ...weights import TensorTrain, Weight
from ..modes import bonds, prime_digits
from ..registry import structure
from ..site import Site


@structure(
    "mps",
    title="Artificial Entanglement in the Fine-Tuning of Large Language Models",
    year=2026,
    arxiv="2601.06788",
    formula="W = W0 + s train(G_1, ..., G_K), bonds at most r",
    limit=None,
)
def mps(site: Site, rank: int, *, alpha: float | None = None) -> Weight:
    """Return W0 plus the tensor train.

    Args:
        site: the weight.
        rank: the largest bond.
        alpha: numerator of the scaling; the rank by default.
    """
    outputs, inputs = (prime_digits(size) for size in site.shape)
    digits = outputs + inputs
    shapes = [
        (left, size, right) for size, (left, right) in zip(digits, pairwise(bonds(digits, rank)), strict=True)
    ]
    values = [site.normal(f"core{k}", *shape, std=shape[0] ** -0.5) for k, shape in enumerate(shapes)]
    values[-1] = site.zeros(*shapes[-1])
    cores = [site.trained(value, f"core{k}") for k, value in enumerate(values)]
    return site.base + site.scaling(alpha, rank) * TensorTrain(cores, len(outputs))
