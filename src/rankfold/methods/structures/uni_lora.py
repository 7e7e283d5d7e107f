"""Uni-LoRA: all factors of the model are read from one short trained vector through a fixed isometry.

    A, B = theta[index] * c[index],   c_j = n_j^(-1/2),   n_j = how often index j is used;   W = W0 + B A

Li et al. 2025. B in R^{out x r}, A in R^{r x in}, no alpha. Every index is used equally often up to one, then
shuffled by the seed and dealt out weight by weight, A before B. The map P from theta to all factors is
isometric, P^T P = I. r = 4, 23,040 numbers (RoBERTa-base) and theta ~ U(-0.02, 0.02) are the paper's. Start:
not exactly the base, because a zero theta would be a saddle.

Deviation: theta is never longer than all factors together, where the official code leaves the rest unused.

Use it where the whole adapter has to be one short vector, whatever the size of the model.
"""

from collections.abc import Mapping

import torch

from ...errors import InvalidOption
from ...weights import Weight
from ..registry import near_base, structure
from ..site import Planned, Site


def shared_vector(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, length: int, bound: float
) -> Planned:
    """Draw theta and deal its indices out to the factors, weight by weight, A before B."""
    total = sum(ranks[path] * sum(site.shape) for path, site in sites.items())
    if length < 1:
        raise InvalidOption(f"uni-lora: length must be at least 1, not {length}")
    if bound <= 0:
        raise InvalidOption(f"uni-lora: bound must be positive, for zero is a saddle, not {bound}")
    length, generator = min(length, total), torch.Generator().manual_seed(seed)
    index = (torch.arange(total) % length)[torch.randperm(total, generator=generator)]
    coefficient = torch.bincount(index, minlength=length).double().rsqrt()[index]
    some = next(iter(sites.values()))
    theta = bound * (2 * torch.rand(length, generator=generator) - 1)
    dealt: dict[str, dict[str, torch.Tensor]] = {}
    start = 0
    for path, site in sites.items():
        for name, shape in (("down", (ranks[path], site.shape[1])), ("up", (site.shape[0], ranks[path]))):
            part = slice(start, start := start + shape[0] * shape[1])
            own = dealt.setdefault(path, {})
            own[f"{name}.index"] = index[part].view(shape).to(some.device)
            own[f"{name}.coefficient"] = coefficient[part].view(shape).to(some.device, some.dtype)
    return Planned({"theta": theta.to(some.device, some.dtype).requires_grad_()}, dealt)


@structure(
    "uni-lora",
    title="Uni-LoRA: One Vector is All You Need",
    year=2025,
    arxiv="2506.00799",
    code="KaiyangLi1992/Uni-LoRA",
    formula="W = W0 + B A, vec(A, B of all layers) = P theta, P^T P = I",
    start=near_base(0.05),
    rank=4,
    limit=None,
    plan=shared_vector,
)
def uni_lora(site: Site, rank: int, *, length: int = 23040, bound: float = 0.02) -> Weight:
    """Return W0 + B A gathered from theta.

    Args:
        site: the weight.
        rank: inner dimension of B A.
        length: of theta, cut to the number of entries of all factors.
        bound: theta starts uniform on [-bound, bound], bound > 0.
    """

    def factor(name: str, shape: tuple[int, int]) -> Weight:
        own = {key: site.planned[f"{name}.{key}"] for key in ("index", "coefficient")}
        return site.pooled("theta", name, shape, **own)

    return site.base + factor("up", (site.shape[0], rank)) @ factor("down", (rank, site.shape[1]))
