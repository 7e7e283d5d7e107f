"""What a compressed weight is to be near, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidOption, NotDense
from ..layers import StructuredEmbedding, StructuredLayer
from ..linalg import Diagonal, LowRank, Metric, RootGram, factored_svd, gram_low_rank, weighted_low_rank
from ..optim.seeds import hashed
from ..statistics.statistics import WeightStatistics
from ..weights.kernels import at_least_float32

LARGE = 8  # a rank above this share of the smaller side is too large for a random range to pay
Split = Literal["metric", "product", "orthogonal"]


@dataclass(frozen=True, eq=False)
class Site:
    """A weight that is about to be compressed, and everything a method may ask of it.

    Attributes:
        path: dotted name of the module.
        layer: that holds it, or a view of it.
        statistics: what a calibration pass collected, or None where the method reads no data.
        seed: of every random choice.
    """

    path: str
    layer: StructuredLayer
    statistics: WeightStatistics | None = None
    seed: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight."""
        return self.layer.shape

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (out,), or None."""
        found: Tensor | None = self.layer._parameters.get("bias")
        return found

    @property
    def is_embedding(self) -> bool:
        """Whether rows of the weight are looked up."""
        return isinstance(self.layer, StructuredEmbedding)

    def matrix(self) -> Tensor:
        """Return the weight (out, in), in float32 or better."""
        weight = self.layer.matrix().detach()
        return weight.to(at_least_float32(weight))

    def statistic(self, name: str, **options: Any) -> Any:
        """Return what was collected.

        Raises:
            InvalidOption: nothing was.
        """
        if self.statistics is None:
            raise InvalidOption(f"{self.path}: this method reads {name}; pass data=")
        return self.statistics.get(name, **options)

    def generator(self, *names: str | int) -> torch.Generator:
        """Return a generator seeded by the seed, the path and further names."""
        return torch.Generator().manual_seed(hashed(self.seed, self.path, *names))


@dataclass(frozen=True, eq=False)
class Objective:
    """Which error of a weight W the factors make smallest, min over rank r of ||L (W - B A) R||_F.

    Attributes:
        left: L, the metric of the outputs; None is the identity.
        right: R, the metric of the inputs; None is the identity.
        mean: of the inputs (in,), where the bias takes up the mean error: b' = b + (W - B A) mean.
        split: where the singular values go: evenly, as the metrics see them ("metric") or as the product
            itself has them ("product"); or all to A, B having orthonormal columns ("orthogonal").
        damping: d >= 0, of the metrics, see `weighted_low_rank`.
        add_bias: a layer without a bias gets one for that; else such a layer's mean error stays.
        offset: a row (in,) that is taken off every row of W before, and added again after, the product.
    """

    left: Metric | None = None
    right: Metric | None = None
    mean: Tensor | None = None
    split: Split = "metric"
    damping: float = 0.0
    add_bias: bool = False
    offset: Tensor | None = None

    def target(self, site: Site) -> Tensor:
        """Return what is factored (out, in): W, or W without the offset."""
        return site.matrix() if self.offset is None else site.matrix() - self.offset


@dataclass(frozen=True, eq=False)
class Solved:
    """What takes the place of a weight.

    Attributes:
        leaves: the values of the structure's leaves by name: of a product, up B (out, r) and down A (r, in).
        shift: what is added to the bias (out,), or None.
        error: relative to the weight, in the metric of the method.
        plain_error: relative Frobenius error.
        spectrum: singular values of L W R, largest first; of a randomised solver, those it found.
    """

    leaves: Mapping[str, Tensor]
    shift: Tensor | None
    error: float
    plain_error: float
    spectrum: Tensor

    @property
    def rank(self) -> int | None:
        """The inner dimension of a product; None for other structures."""
        return self.leaves["down"].shape[0] if {"up", "down"} <= set(self.leaves) else None

    def matrix(self) -> Tensor:
        """Return the matrix that a product, with its offset if it has one, is (out, in).

        Raises:
            NotDense: it is another structure, or not linear.
        """
        if not {"up", "down"} <= set(self.leaves) <= {"up", "down", "offset"}:
            raise NotDense("only a product of two factors can stand for a weight while others are calibrated")
        wide = at_least_float32(self.leaves["up"])
        product = self.leaves["up"].to(wide) @ self.leaves["down"].to(wide)
        return product + self.leaves["offset"].to(wide) if "offset" in self.leaves else product

    def to(self, dtype: torch.dtype) -> Solved:
        """Return it as it is stored, in the precision of the weight that it replaces."""
        leaves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.leaves.items()}
        return replace(self, leaves=leaves, spectrum=self.spectrum.float())


def spectrum_of(site: Site, objective: Objective) -> Tensor:
    """Return the singular values of L W R, largest first: (min(out, in),)."""
    return terms_of(site, objective, min(site.shape)).spectrum


def terms_of(site: Site, objective: Objective, rank: int, solver: str = "exact") -> LowRank:
    """Return the terms of the best factors of a rank; those of a smaller rank are the first of them."""
    return weighted_low_rank(
        objective.target(site), rank, left=objective.left, right=objective.right, damping=objective.damping,
        mean=objective.mean, solver=solver,  # type: ignore[arg-type]
        generator=site.generator("range"),
    )  # fmt: skip


def solved(site: Site, objective: Objective, rank: int, solver: str = "exact") -> Solved:
    """Return the best factors of a rank.

    Args:
        site: the weight.
        objective: the error.
        rank: at least 1.
        solver: "exact", or "randomised": by a random range, or where the rank is large or inputs are
            weighed, from the eigenvectors of the smaller Gram matrix, which is faster there.
    """
    pays = isinstance(objective.right, RootGram) or LARGE * rank > min(site.shape)
    if solver == "randomised" and pays and _has_gram(objective):
        return _from_gram(site, objective, rank)
    return _from_terms(site, objective, terms_of(site, objective, rank, solver))


def _has_gram(objective: Objective) -> bool:
    return objective.left is None and (objective.right is None or isinstance(objective.right, RootGram))


def _from_gram(site: Site, objective: Objective, rank: int) -> Solved:
    """Return the best factors without a singular value decomposition; see `gram_low_rank`."""
    target = objective.target(site)
    gram = objective.right.matrix if isinstance(objective.right, RootGram) else None
    up, down, values = gram_low_rank(target, rank, gram, damping=objective.damping)
    error, size = float(values[rank:].double().norm()), float(values.double().norm())
    bias = None
    if objective.mean is not None:
        mean = objective.mean.to(target)
        bias = target @ mean - up @ (down @ mean)
    if objective.split == "metric":
        root = values[:rank].clamp(min=1e-12 * float(values[0])).sqrt()
        up, down = up * root, down / root[:, None]
    elif objective.split == "product":
        left, singular, right = factored_svd(up, down)
        up, down = left * singular.sqrt(), singular.sqrt()[:, None] * right
    return _finished(site, objective, (up, down), bias, error / max(size, 1e-300), values)


def nested(site: Site, objective: Objective) -> Callable[[int], Solved]:
    """Return what gives the best factors of any rank, from one decomposition."""
    near = terms_of(site, objective, min(site.shape))

    def of_rank(rank: int) -> Solved:
        error = float(near.values[rank:].double().norm())
        found = replace(
            near, up=near.up[:, :rank], down=near.down[:rank], values=near.values[:rank],
            left=near.left[:, :rank], right=near.right[:rank], balance=near.balance[:rank], error=error,
        )  # fmt: skip
        if objective.mean is not None:
            mean = objective.mean.to(found.up)
            found = replace(found, bias=(objective.target(site) - found.matrix()) @ mean)
        return _from_terms(site, objective, found)

    return of_rank


def _from_terms(site: Site, objective: Objective, near: LowRank) -> Solved:
    size = math.hypot(float(near.values.norm()), near.error)
    factors, error = _split(near, objective.split), near.error / max(size, 1e-300)
    return _finished(site, objective, factors, near.bias, error, near.spectrum)


def _finished(
    site: Site,
    objective: Objective,
    factors: tuple[Tensor, Tensor],
    bias: Tensor | None,
    error: float,
    spectrum: Tensor,
) -> Solved:
    matrix, (up, down) = site.matrix(), factors
    leaves, product = {"up": up, "down": down}, up @ down
    if objective.offset is not None:
        leaves["offset"] = objective.offset[None].to(up)
        product = product + leaves["offset"]
    plain = torch.linalg.matrix_norm(matrix - product) / torch.linalg.matrix_norm(matrix).clamp(min=1e-30)
    return Solved(leaves, bias, error, float(plain), spectrum)


def _split(near: LowRank, split: Split) -> tuple[Tensor, Tensor]:
    if split == "orthogonal":
        return near.up, near.down
    return near.split(balance=split)


def floored(entries: Tensor, share: float = 1e-6) -> Diagonal:
    """Return a diagonal metric whose smallest entry is this share of the largest, so that none is free."""
    return Diagonal(entries.clamp(min=share * float(entries.max())))
