"""MoS: every layer assembles its two factors from shards of a pool that layers of one kind share.

    row t of A_k = PA[ia[t, 1]] | ... | PA[ia[t, l]],   row t of B_k^T likewise from PB, ib;
    W_k = W0_k + s B_k A_k

Wang et al. 2024. Layers are of one kind where their projection's name and their shape agree; with L of
them, PA in R^{e L l x in/l} and PB in R^{e L l x out/l} hold as many numbers as LoRA of rank e, while the
rank r of a layer may be larger. Its indices: (r - p) l distinct public shards, out of the first (e - p) L
l, then its own p l private ones; for A and B apart, by the seed and the kind, fixed. s = alpha / r. r = 16,
e = 2, p = 1, l = 4 and alpha = 16 are within the paper's ranges. Start: PA uniform with bound 1 / sqrt(in),
PB = 0, the base, exactly.

Deviations: where l does not divide a side, its largest smaller divisor is taken there; where a layer asks
for more public shards than there are, a second permutation is begun, and a shard may come twice; no
dropout by default, where the paper's runs use 0.1.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...weights import Dropped, Weight
from ..limits import in_range
from ..registry import structure
from ..site import Planned, Site, derived_seed


def kinds(sites: Mapping[str, Site]) -> list[list[str]]:
    """Return the paths of every kind: those whose last name and shape agree, in the model's order."""
    found: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for path, site in sites.items():
        found.setdefault((path.rpartition(".")[2], site.shape), []).append(path)
    return list(found.values())


def divisor(size: int, wanted: int) -> int:
    """Return the largest divisor of `size` that is at most `wanted`."""
    return max(d for d in range(1, wanted + 1) if size % d == 0)


def chosen(public: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Return `wanted` of the public indices in random order, each once as long as there are any."""
    turns = [torch.randperm(public, generator=generator) for _ in range(-(-wanted // max(1, public)))]
    return torch.cat(turns)[:wanted] if turns else torch.zeros(0, dtype=torch.long)


def shared_shards(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, budget: int, private: int, shards: int,
    dropout: float, **options: float,
) -> Planned:  # fmt: skip
    """Draw one pool per kind and end, and every layer's indices."""
    in_range("mos", "[1, inf)", shards=shards, budget=budget)
    in_range("mos", f"[0, {budget}]", private=private)
    in_range("mos", "[0, 1)", dropout=dropout)
    shared: dict[str, Tensor] = {}
    dealt: dict[str, dict[str, Tensor]] = {path: {} for path in sites}
    for number, paths in enumerate(kinds(sites)):
        some = sites[paths[0]]
        for end, size in (("up", some.shape[0]), ("down", some.shape[1])):
            cut, generator = divisor(size, shards), torch.Generator()
            generator.manual_seed(derived_seed(seed, f"{end}{number}"))
            pool = torch.zeros(budget * len(paths) * cut, size // cut)
            if end == "down":
                pool = (2 * torch.rand(pool.shape, generator=generator) - 1) / math.sqrt(size)
            shared[f"{end}{number}"] = pool.to(some.device, some.dtype).requires_grad_()
            public = (budget - private) * len(paths) * cut
            for k, path in enumerate(paths):
                _check_rank(path, ranks[path], budget, private)
                index = chosen(public, (ranks[path] - private) * cut, generator)
                own = public + k * private * cut + torch.arange(private * cut)
                dealt[path][end] = torch.cat([index, own]).view(ranks[path], cut).to(some.device)
                dealt[path]["kind"] = torch.tensor(number)
    return Planned(shared, dealt)


def _check_rank(path: str, rank: int, budget: int, private: int) -> None:
    if rank < private or (rank > private and private == budget):
        raise InvalidOption(
            f"{path}: mos of rank {rank} needs at most {rank} private ranks, and a budget of more than that "
            f"unless all are private; not private={private}, budget={budget}"
        )


@structure(
    "mos",
    title="MoS: Unleashing Parameter Efficiency of Low-Rank Adaptation with Mixture of Shards",
    year=2024,
    arxiv="2410.00938",
    code="Forence1999/MoS",
    formula="W = W0 + s B A, rows of A and B^T put together from shards of shared pools",
    rank=16,
    limit=None,
    plan=shared_shards,
)
def mos(
    site: Site, rank: int, *, alpha: float | None = None, budget: int = 2, private: int = 1, shards: int = 4,
    dropout: float = 0.0,
) -> Weight:  # fmt: skip
    """Return W0 + s B A put together from shards.

    Args:
        site: the weight.
        rank: inner dimension of B A, at least `private`.
        alpha: numerator of the scaling; the rank by default.
        budget: e, the rank of LoRA with as many numbers.
        private: p, how many of the r rows are made of shards that no other layer reads.
        shards: l, per row.
        dropout: probability, in [0, 1), of dropping an input entry of the change while training.
    """
    kind = int(site.planned["kind"])

    def factor(end: str, size: int) -> Weight:
        return site.pooled(f"{end}{kind}", end, (rank, size), index=site.planned[end])

    product = factor("up", site.shape[0]).T @ factor("down", site.shape[1])
    change = site.scaling(alpha, rank) * product
    return site.base + (Dropped(change, dropout) if dropout else change)
