"""Sites: the weights and outputs that are about to be adapted, and everything a method may ask of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..layers import StructuredLayer
from ..linalg import factored_svd
from ..optim.seeds import hashed
from ..statistics import WeightStatistics
from ..weights import Base, Dense, Dropped, Gates, Pooled, Weight
from .registry import Method
from .rules import DynamicRanks


@dataclass(frozen=True)
class Factors:
    """Where a two-factor product starts.

    Attributes:
        up: (..., out, r).
        down: (..., r, in).
        start: "zero" (the product is zero), "residual" (its start is subtracted, so step 0 is the base's), or
            "displaced" (step 0 is moved by the product).
    """

    up: Tensor
    down: Tensor
    start: str = "zero"


@dataclass(frozen=True)
class Basis:
    """Two outer factors of a weight and what belongs between them, `left diag(values) right`.

    Attributes:
        left: (out, r).
        values: (r,), of either sign; ones where there is a middle.
        right: (r, in).
        core: (r, r) where a trained core is to start, or None where the structure knows.
        middle: (r, r) in the place of diag(values), `left middle right`, or None.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    core: Tensor | None = None
    middle: Tensor | None = None

    def split(self, scaling: float) -> Factors:
        """Return residual factors with `scaling * up @ down = left diag(values) right`, split evenly.

        Signs go to the left; with a middle, the product is split over its singular values.
        """
        left, values, right = self.left, self.values, self.right
        if self.middle is not None:
            left, values, right = factored_svd(left @ self.middle, right)
        root = (values.abs() / scaling).sqrt()
        return Factors(left * (root * values.sign()), root[:, None] * right, "residual")


@dataclass(frozen=True)
class Planned:
    """What a structure plans for all its weights together, before any is built.

    Attributes:
        shared: tensors that the layers share; those that require a gradient are trained.
        sites: per path, fixed tensors such as index maps, and modules that several weights read; they are
            planned again at loading, not stored.
    """

    shared: Mapping[str, Tensor] = field(default_factory=dict)
    sites: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def digest(self) -> str:
        """Return a hash of the fixed tensors, or "" where there are none."""
        hasher = hashlib.sha256()
        for path in sorted(self.sites):
            for key, value in sorted(self.sites[path].items()):
                hasher.update(f"{path}:{key}".encode())
                if isinstance(value, Tensor):
                    hasher.update(value.detach().cpu().contiguous().numpy().tobytes())
        return hasher.hexdigest()[:16] if self.sites else ""


def derived_seed(seed: int, *names: str) -> int:
    """Return a seed that depends on the seed and the names only, never on an order of construction."""
    return hashed(seed, *names)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place in a model where something is about to be adapted, and where its random numbers come from.

    Attributes:
        path: dotted name of the module.
        seed: of the adapter.
        blank: build the shapes only; the values will be loaded.
        dtype: of what is trained there, float32 or better.
        device: of the module.
        gates, gate_key: where a gated change finds its gate.
        hidden: width of the model's hidden states, or None where it is not known.
        known_adapters: names of the adapters that the model holds already.
    """

    path: str
    seed: int
    blank: bool = False
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gates: Gates = field(default_factory=Gates)
    gate_key: str = ""
    hidden: int | None = None
    known_adapters: tuple[str, ...] = ()
    block_name: str = ""

    def generator(self, name: str) -> torch.Generator:
        """Return a CPU generator seeded by the adapter's seed, the path and a name."""
        return torch.Generator().manual_seed(derived_seed(self.seed, self.path, self.block_name, name))

    def normal(self, name: str, *shape: int, std: float = 1.0) -> Tensor:
        """Draw a normal tensor, alike on every device."""
        return std * torch.randn(shape, generator=self.generator(name)).to(self.device, self.dtype)

    def uniform(self, name: str, *shape: int, bound: float = 1.0) -> Tensor:
        """Draw a tensor uniform on [-bound, bound], alike on every device."""
        drawn = torch.rand(shape, generator=self.generator(name))
        return (bound * (2 * drawn - 1)).to(self.device, self.dtype)

    def orthonormal(self, name: str, rows: int, columns: int) -> Tensor:
        """Draw a matrix with orthonormal columns, columns <= rows; zeros where values will be loaded."""
        if self.blank:
            return self.zeros(rows, columns)
        basis: Tensor = torch.linalg.qr(self.normal(name, rows, columns)).Q
        return basis

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros."""
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def trained(self, value: Tensor, name: str) -> Dense:
        """Return a trained leaf, float32 or better, on the module's device."""
        return Dense(value.to(self.device, self.dtype), name, trainable=True)

    def frozen(self, value: Tensor, name: str) -> Dense:
        """Return a frozen leaf, float32 or better, on the module's device."""
        return Dense(value.to(self.device, self.dtype), name, trainable=False)


@dataclass(frozen=True, kw_only=True)
class OutputSite(Place):
    """A module whose output is about to be edited.

    Attributes:
        module: the module itself.
        width: channels of the output.
        statistics: what a calibration pass collected for the weights inside the module, by their path in it
            and data set.
    """

    module: nn.Module
    width: int
    statistics: Mapping[str, Mapping[str, WeightStatistics]] = field(default_factory=dict)

    def statistic(self, name: str, *, inside: str, data: str = "", **options: Any) -> Any:
        """Return what a calibration pass collected for a weight inside the module.

        Args:
            name: as `collect` knows it.
            inside: path of the weight in the module.
            data: the data set, where there are several.
            options: those that it was collected with.

        Raises:
            InvalidOption: it was not collected.
        """
        if data not in self.statistics.get(inside, {}):
            raise InvalidOption(f"{self.path}: {name} of {inside!r} was not collected")
        return self.statistics[inside][data].get(name, **options)


@dataclass(frozen=True, kw_only=True)
class Site(Place):
    """A weight that is about to be adapted, and everything a structure may ask of it.

    Attributes:
        layer: the structured layer that will hold the expression.
        base: the leaf that stands for the stored weight, W0.
        shape: (out, in) of the weight, or of the block that `rows` and `columns` cut out.
        init: the initialiser and its options, or None.
        rule: the dynamic rank rule, which puts gates into what the initialiser starts, or None.
        root: the module that owns shared tensors.
        shared: attribute name on the root of every shared tensor, by key.
        planned: what the structure's plan holds for this weight.
        statistics: what a calibration pass collected for this weight, by data set; "" is the only one.
        learning_rate: of the training to come, or None.
        reference: the rank that alpha is divided by, where it is not the weight's own.
    """

    layer: StructuredLayer
    base: Base
    shape: tuple[int, int]
    init: tuple[Method, Mapping[str, Any]] | None = None
    rule: DynamicRanks | None = None
    root: nn.Module = field(default_factory=nn.Module)
    shared: Mapping[str, str] = field(default_factory=dict)
    planned: Mapping[str, Any] = field(default_factory=dict)
    statistics: Mapping[str, WeightStatistics] = field(default_factory=dict)
    learning_rate: float | None = None
    reference: int | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    columns: slice = field(default_factory=lambda: slice(None))

    # What the weight is -------------------------------------------------------------------------------

    def matrix(self) -> Tensor:
        """Return W0, or the block of it, as a matrix (out, in) in float32 or better."""
        return self.layer.matrix().detach()[self.rows, self.columns].to(self.dtype)

    @property
    def looked_up(self) -> bool:
        """Whether the weight is an embedding, of which rows are read."""
        return self.layer.looked_up

    @property
    def window(self) -> tuple[int, ...]:
        """Kernel size per spatial axis; empty unless the layer is a convolution."""
        return getattr(self.layer.op, "window", ())

    def block(self, row: int, column: int, count: int) -> Site:
        """Return block (row, column) of a count x count cut of the weight, as a site of its own."""
        out, columns = self.shape[0] // count, self.shape[1] // count
        return replace(
            self,
            shape=(out, columns),
            rows=slice(row * out, (row + 1) * out),
            columns=slice(column * columns, (column + 1) * columns),
            block_name=f"{self.block_name}[{row},{column}]",
        )

    def pooled(self, key: str, name: str, shape: tuple[int, ...], **gather: Tensor) -> Pooled:
        """Return a leaf that reads a tensor which the adapter's layers share."""
        return Pooled(self.root, self.shared[key], name, shape, **gather)

    def scaling(self, alpha: float | None, rank: int, rank_stabilised: bool = False) -> float:
        """Return alpha / rank, or alpha / sqrt(rank), at the rank that alpha is meant for (`scaling_of`)."""
        return scaling_of(alpha, self.reference or rank, rank_stabilised)

    def statistic(self, name: str, *, data: str = "", **options: Any) -> Any:
        """Return what a calibration pass collected for this weight, cut to the block that this site is.

        Args:
            name: as `collect` knows it.
            data: the data set, where there are several.
            options: those that it was collected with.

        Raises:
            InvalidOption: it was not collected.
        """
        if data not in self.statistics:
            raise InvalidOption(f"{self.path}: {name} was not collected{f' on {data!r}' if data else ''}")
        value: Any = self.statistics[data].get(name, **options)
        if not isinstance(value, Tensor) or self.is_whole:
            return value
        return self._cut(name, value)

    @property
    def is_whole(self) -> bool:
        """Whether this is a whole weight and not a block of one."""
        return self.rows == self.columns == slice(None)

    def _cut(self, name: str, value: Tensor) -> Tensor:
        if name.startswith(("input", "column")) or name.endswith("_columns"):
            return value[(self.columns,) * value.dim()]
        if name.startswith("output") or name.endswith("_rows"):
            return value[(self.rows,) * value.dim()]
        return value[self.rows, self.columns] if value.dim() else value

    # Starts -------------------------------------------------------------------------------------------

    def factors(self, rank: int, scaling: float = 1.0) -> Factors:
        """Return the initialiser's two factors for a product `scaling * up @ down`."""
        method, options = self._initialiser()
        if self.blank:
            up, down = self.zeros(self.shape[0], rank), self.zeros(rank, self.shape[1])
            starts = [given for given in method.traits["gives"] if given in ("residual", "displaced")]
            return Factors(up, down, starts[0] if starts else "zero")
        result: Factors | Basis = method.build(self, rank, scaling, **options)
        return result.split(scaling) if isinstance(result, Basis) else result

    def _initialiser(self) -> tuple[Method, Mapping[str, Any]]:
        if self.init is None:
            raise Incompatible(f"{self.path}: the structure asks for an initialiser and declares none")
        return self.init

    def basis(self, rank: int, scaling: float = 1.0) -> Basis:
        """Return the initialiser's frame of the weight, for a change `scaling * left core right`."""
        method, options = self._initialiser()
        if self.blank:
            core = self.zeros(rank, rank) if "displaced frame" in method.traits["gives"] else None
            ends = self.zeros(self.shape[0], rank), self.zeros(rank), self.zeros(rank, self.shape[1])
            return Basis(*ends, core)
        result: Basis = method.build(self, rank, scaling, **options)
        return result

    def change(
        self,
        factors: Factors,
        scaling: float,
        *,
        form: Callable[[Dense, Dense], Weight] = lambda up, down: up @ down,
        dropout: float = 0.0,
        prefix: str = "",
    ) -> Weight:
        """Return `scaling * up @ down`, minus its start where that is residual.

        Args:
            factors: the start; it is rounded to the training dtype before it is subtracted.
            scaling: the constant before the product.
            form: how the two leaves make a map; a plain product by default.
            dropout: probability that an input entry of the trained product is dropped, in [0, 1).
            prefix: of the leaves' names, where a structure has several changes.
        """
        if not 0 <= dropout < 1:
            raise InvalidOption(f"dropout must be in [0, 1), not {dropout}")
        up, down = self.trained(factors.up, f"{prefix}up"), self.trained(factors.down, f"{prefix}down")
        product = form(up, down)
        self._insert_gates(product, f"{prefix}gate", factors.start)
        change: Weight = scaling * product
        if dropout:
            change = Dropped(change, dropout)
        if factors.start != "residual":
            return change
        start = form(
            self.frozen(up.value.detach().clone(), f"{prefix}up.start"),
            self.frozen(down.value.detach().clone(), f"{prefix}down.start"),
        )
        return change - scaling * start

    def _insert_gates(self, product: Weight, name: str, start: str) -> None:
        if self.rule is None or not self.rule.gated:
            return
        gives = self.init[0].traits["gives"] if self.init else ()
        start = next((g for g in ("gated", "residual", "displaced") if g in gives), start)
        for pair in list(product.pairs()):
            pair.owner.insert_gate(self.rule.gate(self, name, pair.up.shape[-1], start))

    def low_rank(self, rank: int, scaling: float, dropout: float = 0.0) -> Weight:
        """Return the plain change of that rank, started by the initialiser."""
        return self.change(self.factors(rank, scaling), scaling, dropout=dropout)


def scaling_of(alpha: float | None, rank: int, rank_stabilised: bool = False) -> float:
    """Return alpha / rank, or alpha / sqrt(rank); without alpha, alpha is the rank.

    Raises:
        InvalidOption: alpha is not a positive finite number.
    """
    alpha = float(rank) if alpha is None else float(alpha)
    if not math.isfinite(alpha) or alpha <= 0:
        raise InvalidOption(f"alpha must be a positive finite number, not {alpha}")
    return alpha / math.sqrt(rank) if rank_stabilised else alpha / rank
