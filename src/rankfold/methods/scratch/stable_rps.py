"""STABLE-RPS: all weights of a model are read from one short trained array, with random signs.

    W_l[i] = lambda_l sign(g) z[h(g)],   h(g) = (hash(g // m) + g mod m) mod m,   g = offset_l + i

Desai and Shrivastava 2023, improving ROAST. z (m,) is all that is trained in their place, m = sparsity * all
weights. Every m weights in a row read a cyclic shift of z, so that slots are used equally often up to one and
the map is one to one where m is the number of weights. Hash and signs are computed where they are needed and
stored nowhere; lambda_l = std(W_l at its usual start) / 0.04, z uniform in +-0.04. Weights of linear layers,
convolutions and embeddings, by the targets; norms and biases stay. W has full rank, though only m numbers
exist. Start: those random weights; a uniform z has a standard deviation of 0.04 / sqrt(3), so that they are
that much smaller than the usual ones, as in the official code.

Before every step the gradient of z is divided, slot by slot, by 1e-6 + Gamma, n_l being how many weights of
layer l the slot serves:

    v1: (sum n lambda)^2 / (1e-3 + sum n)    v2: sum n lambda    v3: sum n lambda / sum n
    v4: sum(n lambda^2)^(1/2)                v5: sum n lambda^2

v1 is the official code's default. With v1 and v5 training does not depend on the size of z, and without
sharing it is plain SGD. Adam would not notice, but for its eps. Weight decay of z acts on shared values.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...weights import CyclicChunks, Hashed, Weight
from ..gradient_scaling import MODES, GradientScaler
from ..limits import in_range, one_of
from ..registry import not_base, structure
from ..site import Planned, Site


def shared_array(
    sites: Mapping[str, Site],
    ranks: Mapping[str, int | None],
    *,
    seed: int,
    sparsity: float,
    bound: float,
    scaler: str,
) -> Planned:
    """Draw z and the hash, and number the weights."""
    in_range("stable-rps", "(0, 1]", sparsity=sparsity)
    in_range("stable-rps", "(0, inf)", bound=bound)
    one_of("stable-rps", MODES, scaler=scaler)
    sizes = [math.prod(site.shape) for site in sites.values()]
    length, generator = max(1, int(sparsity * sum(sizes))), torch.Generator().manual_seed(seed)
    odd = 2 * torch.randint(2**30, (4,), generator=generator) + 1
    start, some = 0, next(iter(sites.values()))
    maps: dict[str, dict[str, Tensor]] = {}
    for path, size in zip(sites, sizes, strict=True):
        maps[path] = {"map": torch.tensor([start, length, *odd.tolist()])}
        start += size
    array = bound * (2 * torch.rand(length, generator=generator) - 1)
    return Planned({"array": array.to(some.device, some.dtype).requires_grad_()}, maps)


@structure(
    "stable-rps",
    title="In defense of parameter sharing for model-compression",
    year=2023,
    arxiv="2310.11611",
    code="apd10/FakeRoast",
    formula="W_l = lambda_l sign z[h], one z for all layers, gradients divided by their load",
    start=not_base("that of shared random numbers"),
    rank=None,
    layers=("linear", "convolution", "embedding"),
    plan=shared_array,
    training=GradientScaler,
    scratch=True,
)
def stable_rps(site: Site, *, sparsity: float = 0.1, bound: float = 0.04, scaler: str = "v1") -> Weight:
    """Return lambda sign z[h].

    Args:
        site: the weight.
        sparsity: m over the number of weights, in (0, 1].
        bound: z starts uniform on [-bound, bound], positive.
        scaler: what the gradient of z is divided by: "v1" to "v5", or "none".
    """
    start, size, first, second, third, seed = site.planned["map"].tolist()
    chunks = CyclicChunks(size, (first, second, third), seed)
    deviation = float(site.matrix().std(correction=0)) or site.shape[1] ** -0.5
    scale = site.frozen(torch.tensor(deviation / bound), "scale")
    return Hashed(site.root, site.shared["array"], "weight", site.shape, chunks, start, scale)
