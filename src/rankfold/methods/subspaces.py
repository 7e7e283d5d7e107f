"""Random subspaces of all adapted weights together, and the smallest one in which a task can be learned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import InvalidOption
from ..weights import Fastfood, Fixed, Projected, Projection, Weight
from ..weights.structured import Sparse
from .limits import in_range, one_of
from .site import Planned, Site, derived_seed


def random_subspace(
    owner: str, sites: Mapping[str, Site], seed: int, dimension: int, projection: str
) -> Planned:
    """Draw one projection of theta in R^d to the entries of all weights, and start theta at zero.

    Args:
        owner: the method that asks, for its refusals.
        sites: the weights, by path; their entries follow each other in this order.
        seed: of the projection.
        dimension: d, at least 1; more than there are entries means as many as there are.
        projection: fastfood, sparse or dense.

    Raises:
        InvalidOption: an option is impossible.
    """
    one_of(owner, _DRAWN, projection=projection)
    in_range(owner, "[1, inf)", dimension=dimension)
    sizes = [math.prod(site.shape) for site in sites.values()]
    some, shape = next(iter(sites.values())), (sum(sizes), min(dimension, sum(sizes)))
    matrix = _DRAWN[projection](shape, _Source(seed, some.dtype)).to(some.device)
    shared = Projection(matrix, sizes)
    mark = next(matrix.leaves()).tensor().flatten()[:8]  # tells another stream of random numbers
    own = {
        path: {"projection": shared, "piece": torch.tensor(i), "mark": mark} for i, path in enumerate(sites)
    }
    return Planned({"theta": some.zeros(shape[1]).requires_grad_()}, own)


def projected(site: Site) -> Projected:
    """Return the part of P theta that belongs to a weight, as a matrix (out, in)."""
    projection, piece = site.planned["projection"], int(site.planned["piece"])
    return Projected(site.root, site.shared["theta"], "change", site.shape, projection, piece)


@dataclass(frozen=True)
class _Source:
    """Where the numbers of a projection come from: a stream of its own for every name."""

    seed: int
    dtype: torch.dtype

    def generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(derived_seed(self.seed, name))

    def normal(self, name: str, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator(name)).to(self.dtype)


def _dense(shape: tuple[int, int], source: _Source) -> Weight:
    """Normal entries, every column of length one over all weights."""
    matrix = source.normal("projection", *shape)
    return Fixed(matrix / torch.linalg.vector_norm(matrix, dim=0), "projection")


def _sparse(shape: tuple[int, int], source: _Source) -> Weight:
    """Entries of either sign, each there with probability 1 / sqrt(D), every column of length one."""
    rows, columns = _support(shape, shape[0] ** -0.5, source)
    signs = torch.randint(2, rows.shape, generator=source.generator("signs")).to(source.dtype) * 2 - 1
    lengths = torch.bincount(columns, minlength=shape[1]).to(source.dtype).sqrt()
    return Sparse(Fixed(signs / lengths[columns], "projection"), rows, columns, shape)


def _support(shape: tuple[int, int], density: float, source: _Source) -> tuple[Tensor, Tensor]:
    """Draw the entries that are there by the gaps between them, column after column, no column empty."""
    total, generator = math.prod(shape), source.generator("support")
    expected = total * density
    uniform = torch.rand(int(expected + 8 * math.sqrt(expected) + 8), generator=generator).double()
    gaps = ((1 - uniform).log() / math.log1p(-min(density, 1 - 1e-12))).floor().long()
    places = (gaps + 1).cumsum(0) - 1
    places = places[places < total]
    empty = torch.bincount(places // shape[0], minlength=shape[1]) == 0
    spare = torch.randint(shape[0], (shape[1],), generator=generator) + shape[0] * torch.arange(shape[1])
    places = torch.cat([places, spare[empty]])
    return places % shape[0], places // shape[0]


def _fastfood(shape: tuple[int, int], source: _Source) -> Weight:
    """Signs, an order and normal numbers, of the next power of two."""
    size = 1 << (shape[0] - 1).bit_length()
    signs = torch.randint(2, (size,), generator=source.generator("signs")).to(torch.int8) * 2 - 1
    order = torch.randperm(size, generator=source.generator("order"))
    normal = Fixed(source.normal("projection", size), "projection")
    return Fastfood(normal, signs, order if size > 2**31 else order.int(), shape)


_DRAWN: Mapping[str, Callable[[tuple[int, int], _Source], Weight]] = {
    "fastfood": _fastfood,
    "sparse": _sparse,
    "dense": _dense,
}


# How many dimensions a task needs ---------------------------------------------------------------------


@dataclass(frozen=True)
class IntrinsicDimension:
    """What a sweep over the dimension of a random subspace found.

    Attributes:
        share: of the whole model's score that has to be reached.
        full: score of the whole model, by seed.
        scores: score by dimension, by seed, as far as the sweep went.
        reached: the smallest dimension whose score was enough, by seed; None where none was.
    """

    share: float
    full: Mapping[int, float]
    scores: Mapping[int, Mapping[int, float]] = field(repr=False)
    reached: Mapping[int, int | None]

    @property
    def dimension(self) -> float | None:
        """The median over the seeds; None where some seed never reached its share."""
        found = [dimension for dimension in self.reached.values() if dimension is not None]
        return statistics.median(found) if len(found) == len(self.reached) else None


def intrinsic_dimension_of(
    train: Callable[[int | None, int], float],
    dimensions: Sequence[int],
    *,
    share: float = 0.9,
    seeds: Sequence[int] = (0,),
) -> IntrinsicDimension:
    """Sweep the dimension of a random subspace and return the smallest that does as well as asked.

        d_int90 = min {d : score(d) >= 0.9 score(whole model)}, for every seed, then the median

    Li et al. 2018. For every seed the sweep goes upwards and ends at the first dimension that is enough.

    Args:
        train: `train(dimension, seed)` trains anew and returns a validation score, larger is better; with
            None for a dimension it trains the whole model. Inside it is `rf.adapt(model,
            "intrinsic-dimension", dimension=dimension, seed=seed)`.
        dimensions: d, such as a grid of equal ratios.
        share: of the whole model's score, in (0, 1].
        seeds: one run each; not empty.

    Raises:
        InvalidOption: there is nothing to sweep over, the share is impossible, or a score of the whole model,
            of which a share is taken, is not positive, such as a negated loss.

    Example:
        >>> def train(dimension, seed):
        ...     return 1.0 if dimension is None else 1 - 1 / (1 + dimension)
        >>> intrinsic_dimension_of(train, [1, 3, 10, 30]).dimension
        10
    """
    in_range("intrinsic_dimension_of", "(0, 1]", share=share)
    if not dimensions or not seeds or min(dimensions) < 1:
        raise InvalidOption("intrinsic_dimension_of needs dimensions of at least 1 and at least one seed")
    full = {seed: train(None, seed) for seed in seeds}
    if not min(full.values()) > 0:
        raise InvalidOption(f"intrinsic_dimension_of needs positive scores, such as accuracies, not {full}")
    scores = {seed: _upwards(train, dimensions, seed, share * full[seed]) for seed in seeds}
    reached = {seed: _first(found, share * full[seed]) for seed, found in scores.items()}
    return IntrinsicDimension(share, full, scores, reached)


def _upwards(
    train: Callable[[int | None, int], float], dimensions: Sequence[int], seed: int, enough: float
) -> Mapping[int, float]:
    found: dict[int, float] = {}
    for dimension in sorted(set(dimensions)):
        found[dimension] = train(dimension, seed)
        if found[dimension] >= enough:
            break
    return found


def _first(scores: Mapping[int, float], enough: float) -> int | None:
    return next((dimension for dimension, score in scores.items() if score >= enough), None)
