"""Reducers: one statistic each, as sums that batches add to and that partial passes add up.

A new statistic is one class here or elsewhere, decorated with `@reducer`. What a reducer keeps are plain
tensors in `sums`, so that saving, loading, resuming and merging know nothing of any of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from ..errors import FormatError, InvalidOption, near_names
from ..layers import StructuredLayer
from ..linalg.checks import precise_dtype
from ..weights.kernels import at_least_float32
from .rows import Rows

Side = Literal["input", "output", "ids", "gradient", "curvature"]
Kind = TypeVar("Kind", bound="type[Reducer]")
REDUCERS: dict[str, type[Reducer]] = {}


@dataclass(frozen=True)
class Seen:
    """What a reducer sees of one weight in one batch.

    Attributes:
        rows: of the input or the output, for reducers on those sides; for "ids", what was looked up (n, 1).
        gradient: (out, in) of the loss, or for "curvature" `v * (H v)` of one probe v.
        weight: the layer, whose matrix can be read.
        count: label tokens of the batch.
        probe: number of the probe, for "curvature".
    """

    rows: Rows = field(default_factory=lambda: Rows(torch.empty(0, 0), torch.empty(0)))
    gradient: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    weight: StructuredLayer | None = None
    count: int = 0
    probe: int = 0


class Reducer:
    """One statistic of one weight.

    A subclass names its sums and their shapes in `layout`, adds to them in `update`, and reads the statistic
    off them in `value`. Its options are keyword-only arguments of its constructor.

    Attributes:
        name: of the statistic.
        side: what `update` sees: rows of the "input" or the "output", the "ids" that an embedding looks up,
            the "gradient", or "curvature".
        sums: the raw tensors; empty until the first update.
    """

    name: ClassVar[str]
    side: ClassVar[Side]

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums for a weight (out, columns); an axis of -1 may have any length."""
        raise NotImplementedError

    def update(self, seen: Seen) -> None:
        """Add one batch, or one call of the layer in it."""
        raise NotImplementedError

    def value(self, batches: int) -> Any:
        """Return the statistic over all batches."""
        raise NotImplementedError

    def merge(self, other: Reducer) -> None:
        """Add the sums of another part of the pass."""
        for key, amount in other.sums.items():
            self.add(key, amount)

    def add(self, key: str, amount: Tensor) -> None:
        """Add to a sum."""
        self.sum_like(key, amount).add_(amount)

    def sum_like(self, key: str, amount: Tensor) -> Tensor:
        """Return a sum, on the device of `amount`; zeros before anything was added."""
        if key not in self.sums:
            self.sums[key] = torch.zeros_like(amount, memory_format=torch.contiguous_format)
        elif self.sums[key].device != amount.device:
            self.sums[key] = self.sums[key].to(amount.device)
        return self.sums[key]

    def copy(self) -> Reducer:
        """Return a reducer with the same options and sums of its own."""
        twin: Reducer = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.sums = {key: value.clone() for key, value in self.sums.items()}
        return twin

    def restore(self, sums: dict[str, Tensor], out: int, columns: int) -> None:
        """Take sums that were saved.

        Raises:
            FormatError: they are not those of such a statistic.
        """
        layout = self.layout(out, columns)
        if sums and set(sums) != set(layout):
            raise FormatError(f"{self.name} holds {sorted(sums)}, not {sorted(layout)}")
        for key, value in sums.items():
            known = layout[key]
            fits = len(known) == value.dim() and all(
                n in (-1, m) for n, m in zip(known, value.shape, strict=True)
            )
            if not fits:
                raise FormatError(f"{self.name} has a sum of shape {tuple(value.shape)}, not {known}")
        self.sums = dict(sums)


def reducer(name: str) -> Callable[[Kind], Kind]:
    """Register a statistic under a name."""

    def register(kind: Kind) -> Kind:
        kind.name = name
        REDUCERS[name] = kind
        return kind

    return register


def number(value: int) -> Tensor:
    """Return a count as a tensor, so that it is kept with the sums."""
    return torch.tensor(value, dtype=torch.int64)


def whole(value: object, lowest: int) -> bool:
    """Say whether a value is a whole number from `lowest`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


class _OfRows(Reducer):
    """A statistic of activations; `width` picks its length from the weight's shape."""

    def width(self, out: int, columns: int) -> int:
        return columns if self.side == "input" else out


class _Mean(_OfRows):
    """sum_t x_t / n."""

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (self.width(out, columns),), "count": ()}

    def update(self, seen: Seen) -> None:
        """Add the rows of one call."""
        self.add("sum", seen.rows.values.sum(0))
        self.add("count", number(len(seen.rows.values)))

    def value(self, batches: int) -> Tensor:
        """Return the mean over tokens."""
        return self.sums["sum"] / int(self.sums["count"])


class _Gram(_OfRows):
    """sum_t x_t x_t^T / n, not centred.

    Args:
        per_sample: "none" divides by the number of tokens; "max" divides every example X by |max(X)| (its
            signed maximum over all entries) and the sum by the number of examples, as CorDA's Gram does
            (Yang et al. 2024). A maximum of 0 divides by 1.
    """

    def __init__(self, *, per_sample: str = "none") -> None:
        super().__init__()
        if per_sample not in ("none", "max"):
            raise InvalidOption(f"{self.name}: per_sample must be 'none' or 'max', not {per_sample!r}")
        self.per_sample = per_sample

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        width = self.width(out, columns)
        return {"sum": (width, width), "count": ()}

    def update(self, seen: Seen) -> None:
        """Add the rows of one call."""
        values, count = seen.rows.values, len(seen.rows.values)
        if self.per_sample == "max" and count:
            values, count = _divided(seen.rows)
        total = self.sum_like("sum", values.new_empty(values.shape[1], values.shape[1]))
        total.addmm_(values.T, values)
        self.add("count", number(count))

    def value(self, batches: int) -> Tensor:
        """Return the mean of x x^T."""
        return self.sums["sum"] / int(self.sums["count"])


def _divided(seen: Rows) -> tuple[Tensor, int]:
    """Divide the rows of every example by its largest entry; return them and the number of examples."""
    examples, index = seen.samples.unique(return_inverse=True)
    largest = seen.values.new_full((len(examples),), -torch.inf)
    largest = largest.scatter_reduce(0, index, seen.values.amax(1), "amax").abs()
    largest = torch.where(largest == 0, 1, largest)
    return seen.values / largest[index, None], len(examples)


@reducer("input_mean")
class InputMean(_Mean):
    """Mean input, (in,)."""

    side = "input"


@reducer("output_mean")
class OutputMean(_Mean):
    """Mean output, (out,), bias included."""

    side = "output"


@reducer("input_gram")
class InputGram(_Gram):
    """Mean of x x^T over tokens, (in, in)."""

    side = "input"


@reducer("output_gram")
class OutputGram(_Gram):
    """Mean of y y^T over tokens, (out, out), bias included."""

    side = "output"


@reducer("input_absolute_mean")
class InputAbsoluteMean(_Mean):
    """Mean absolute input, (in,)."""

    side = "input"

    def update(self, seen: Seen) -> None:
        """Add the rows of one call."""
        self.add("sum", seen.rows.values.abs().sum(0))
        self.add("count", number(len(seen.rows.values)))


@reducer("input_covariance")
class InputCovariance(_OfRows):
    """Mean of (x - m) (x - m)^T over tokens, m their mean, (in, in).

        M_ab = M_a + M_b + (n_a n_b / n_ab) d d^T,   d = m_b - m_a

    Every call is centred by its own mean and the parts are joined as above, in float64 (Chan et al. 1983):
    C - m m^T would cancel where the mean is large.
    """

    side = "input"

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"mean": (columns,), "scatter": (columns, columns), "count": ()}

    def update(self, seen: Seen) -> None:
        """Take in the rows of one call, however few."""
        values = seen.rows.values
        if len(values):
            wide = precise_dtype(values)
            mean = values.mean(0, dtype=wide)
            centred = values.to(wide) - mean
            self._join(mean, centred.T @ centred, len(values))

    def merge(self, other: Reducer) -> None:
        """Take in another part of the pass."""
        if other.sums:
            self._join(other.sums["mean"], other.sums["scatter"], int(other.sums["count"]))

    def _join(self, mean: Tensor, scatter: Tensor, count: int) -> None:
        known, total = self.sum_like("mean", mean), self.sum_like("scatter", scatter)
        before = int(self.sum_like("count", number(0)))
        apart, share = mean - known, count / (before + count)
        total.add_(scatter).addr_(apart, apart, alpha=before * share)
        known.add_(apart, alpha=share)
        self.sums["count"] = number(before + count)

    def value(self, batches: int) -> Tensor:
        """Return the covariance, divided by the number of tokens."""
        return self.sums["scatter"] / int(self.sums["count"])


@reducer("token_frequency")
class TokenFrequency(Reducer):
    """Share of the looked-up ids that every row of an embedding is, (vocabulary,), without what is masked."""

    side = "ids"

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (out,), "count": ()}

    def update(self, seen: Seen) -> None:
        """Count the ids of one call."""
        assert seen.weight is not None
        ids = seen.rows.values.long().flatten()
        self.add("sum", torch.bincount(ids, minlength=seen.weight.shape[0]))
        self.add("count", number(len(ids)))

    def value(self, batches: int) -> Tensor:
        """Return the shares, which add up to 1."""
        return self.sums["sum"].to(precise_dtype(self.sums["sum"])) / int(self.sums["count"])


@reducer("column_norm")
class ColumnNorm(_OfRows):
    """Length of every input channel over all tokens, (in,): sqrt(sum_t x_t^2)."""

    side = "input"

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"squares": (columns,)}

    def update(self, seen: Seen) -> None:
        """Add the rows of one call."""
        self.add("squares", seen.rows.values.square().sum(0))

    def value(self, batches: int) -> Tensor:
        """Return the lengths."""
        return self.sums["squares"].sqrt()


@reducer("gradient")
class Gradient(Reducer):
    """Mean over batches of dL/dW, (out, in)."""

    side = "gradient"

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (out, columns)}

    def update(self, seen: Seen) -> None:
        """Add the gradient of one batch."""
        self.add("sum", seen.gradient.to(at_least_float32(seen.gradient)))

    def value(self, batches: int) -> Tensor:
        """Return the mean; a batch without a gradient counts as zero."""
        return self.sums["sum"] / batches


class _Squared(Reducer):
    """sum_b n_b g_b^2 / sum_b n_b, with n_b the label tokens of batch b."""

    side = "gradient"

    def pooled(self, squares: Tensor) -> Tensor:
        """Return what is kept of squares (out, in)."""
        raise NotImplementedError

    def update(self, seen: Seen) -> None:
        """Add the squared gradient of one batch."""
        squares = seen.gradient.to(at_least_float32(seen.gradient)).square()
        self.add("sum", self.pooled(squares) * seen.count)
        self.add("count", number(seen.count))

    def value(self, batches: int) -> Tensor:
        """Return the mean weighted by tokens."""
        return self.sums["sum"] / int(self.sums["count"])


@reducer("squared_gradient")
class SquaredGradient(_Squared):
    """Mean squared gradient weighted by label tokens, (out, in)."""

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (out, columns), "count": ()}

    def update(self, seen: Seen) -> None:
        """Add the squared gradient of one batch, without another matrix of its size."""
        gradient = seen.gradient.to(at_least_float32(seen.gradient))
        self.sum_like("sum", gradient).addcmul_(gradient, gradient, value=seen.count)
        self.add("count", number(seen.count))


@reducer("squared_gradient_rows")
class SquaredGradientRows(_Squared):
    """Row sums of the mean squared gradient, (out,), without keeping the matrix."""

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (out,), "count": ()}

    def pooled(self, squares: Tensor) -> Tensor:
        """Return the row sums."""
        return squares.sum(1)


@reducer("squared_gradient_columns")
class SquaredGradientColumns(_Squared):
    """Column sums of the mean squared gradient, (in,), without keeping the matrix."""

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (columns,), "count": ()}

    def pooled(self, squares: Tensor) -> Tensor:
        """Return the column sums."""
        return squares.sum(0)


@reducer("sensitivity")
class Sensitivity(Reducer):
    """Mean over batches of sum |W . G|, a scalar."""

    side = "gradient"

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": ()}

    def update(self, seen: Seen) -> None:
        """Add one batch."""
        assert seen.weight is not None
        dtype = at_least_float32(seen.gradient)
        self.add("sum", (seen.weight.matrix().detach().to(dtype) * seen.gradient).abs().sum())

    def value(self, batches: int) -> Tensor:
        """Return the mean."""
        return self.sums["sum"] / batches


@reducer("hessian_diagonal")
class HessianDiagonal(Reducer):
    """Diagonal of the Hessian of the loss by Hutchinson's estimate, mean over batches of E[v * (H v)].

    The probes v have entries +-1, drawn for all weights at once. The estimate keeps the graph of every
    gradient alive; its variance falls with the number of probes and batches.

    Args:
        samples: probes per batch.
    """

    side = "curvature"

    def __init__(self, *, samples: int = 1) -> None:
        super().__init__()
        if not whole(samples, 1):
            raise InvalidOption(f"hessian_diagonal: samples must be a whole number from 1, not {samples!r}")
        self.samples = samples

    def layout(self, out: int, columns: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the sums."""
        return {"sum": (out, columns)}

    def update(self, seen: Seen) -> None:
        """Add one probe of one batch."""
        if seen.probe < self.samples:
            self.add("sum", seen.gradient.to(at_least_float32(seen.gradient)))

    def value(self, batches: int) -> Tensor:
        """Return the mean over probes and batches."""
        return self.sums["sum"] / (batches * self.samples)


@dataclass(frozen=True)
class Asked:
    """A statistic that is asked for, with all its options.

    Attributes:
        name: of a reducer.
        options: of it, defaults filled in.
    """

    name: str
    options: dict[str, Any]

    @classmethod
    def of(cls, name: str, options: dict[str, Any]) -> Asked:
        """Fill in defaults.

        Raises:
            InvalidOption: no such statistic or option, or a value that it cannot have.
        """
        if name not in REDUCERS:
            hint = near_names(name, REDUCERS) or f"; known are {', '.join(sorted(REDUCERS))}"
            raise InvalidOption(f"no statistic is called {name!r}{hint}")
        known = options_of(REDUCERS[name])
        wrong = sorted(set(options) - set(known))
        if wrong:
            raise InvalidOption(f"{name} has no option {wrong[0]!r}; it has {', '.join(known) or 'none'}")
        missing = [key for key, default in known.items() if default is ... and key not in options]
        if missing:
            raise InvalidOption(
                f"{name} needs {missing[0]}: ask for it as ({name!r}, {{{missing[0]!r}: ...}})"
            )
        asked = cls(name, {**{k: v for k, v in known.items() if v is not ...}, **options})
        asked.reducer()  # checks the values
        return asked

    @property
    def side(self) -> Side:
        """What the statistic is taken of."""
        return REDUCERS[self.name].side

    def reducer(self) -> Reducer:
        """Return a new reducer."""
        return REDUCERS[self.name](**self.options)

    def matches(self, name: str, options: dict[str, Any]) -> bool:
        """Say whether this is the statistic of that name with, among others, those options."""
        return name == self.name and all(
            key in self.options and self.options[key] == v for key, v in options.items()
        )

    def __str__(self) -> str:
        inner = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        return f"{self.name}({inner})" if inner else self.name


def options_of(kind: type[Reducer]) -> dict[str, Any]:
    """Return a reducer's options and their defaults; `...` stands for none."""
    parameters = list(inspect.signature(kind).parameters.values())
    return {p.name: ... if p.default is p.empty else p.default for p in parameters}


What = str | tuple[str, dict[str, Any]]


def asked_for(what: object) -> tuple[Asked, ...]:
    """Read a sequence of names and (name, options) pairs.

    Raises:
        InvalidOption: it is none, is empty, or asks for the same statistic twice.
    """
    entries = (
        [what] if isinstance(what, str) else list(what) if isinstance(what, list | tuple | set) else None
    )
    if entries is None:
        raise InvalidOption(f"what must be a sequence of statistics, not {type(what).__name__}")
    if not entries:
        raise InvalidOption(f"no statistic was asked for; known are {', '.join(sorted(REDUCERS))}")
    found: list[Asked] = []
    for entry in entries:
        asked = Asked.of(*_pair(entry))
        if asked in found:
            raise InvalidOption(f"{asked} is asked for twice")
        found.append(asked)
    return tuple(found)


def _pair(entry: object) -> tuple[str, dict[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, tuple | list) and len(entry) == 2 and isinstance(entry[1], dict):
        return str(entry[0]), dict(entry[1])
    raise InvalidOption(f"a statistic is a name or a pair (name, options), not {entry!r}")
