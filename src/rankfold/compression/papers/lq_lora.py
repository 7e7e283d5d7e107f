"""LQ-LoRA: a weight becomes a quantised matrix plus a product that trains, in a budget of bits.

    W ~ Q + s B A,   s = alpha / r,   e = ||F^(1/2) . (W - Q - s B A)||_F
    s B A = [W - Q]_r,   Q = NF(W - s B A),   in turns, from Q = 0, for as long as e falls
    one format c for every weight i:   min sum_i e_ic^2   such that   sum_i bits_ic <= bits sum_i numbers_i

Guo et al. 2023. F is 1, or (`fisher`) the mean squared gradient of single examples, on one scale for all
weights; the product is then found under diag(sqrt(mean_j F_ij)) and diag(sqrt(mean_i F_ij)), and the format
is not weighed. The formats are chosen by integer programming; the factors, r (out + in) numbers of the
weight's own precision, are not in the budget. A weight starts near what it was, not exactly there, and
everything but the factors is frozen.

rank = 64 and alpha = 16 are the paper's, as are at most 100 turns. bits = 2.75 is its headline; it goes from
2.5 to 4. `grid="paper"` has its 432 formats, of which most are nearly alike; "coarse", the default, the 24
with bits of 2, 3, 4 or 8 in blocks of 16, 32 or 64 whose scales take 4 or 8 bits in groups of 256. The paper
chooses by errors after all turns; `search_iterations` of 1, the default, chooses by those of the first turn,
which share one decomposition for all formats; give 100 for the paper's.

Deviations: the best turn is returned, the official code returns the one after it; the randomised
decomposition is oversampled by max(10, r), the paper's by 10. order = "loftq" quantises first (Li et al.
2023, whose turns are 1 or 5) and ends when the error rises, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from itertools import product
from typing import Any

from torch import Tensor

from ...errors import InvalidOption
from ...linalg import (
    LowRank,
    NormalFloat,
    QuantisedLowRank,
    allocate,
    dequantise,
    low_rank_part,
    quantise,
    quantised_low_rank,
)
from ...methods.limits import in_range, one_of
from ...methods.replace import replace
from ...methods.scratch.quantised_low_rank import format_of
from ...statistics import Statistics
from ...statistics.calibrating import Progress
from ...statistics.watched import Watched
from ..job import targeted
from ..objective import Site
from ..registry import compressor, compressor_named
from ..report import Row
from ..task import Task, calibrated, one_by_one

_FISHER = "squared_gradient"
_BITS = (2, 3, 4, 8)
GRIDS = {
    "coarse": [NormalFloat(b, size, b0) for b, size, b0 in product(_BITS, (16, 32, 64), (4, 8))],
    "paper": [
        NormalFloat(b, size, b0, group, dtype)
        for b, b0, dtype, size, group in product(
            _BITS, _BITS, ("bf16", "fp16", "fp32"), (16, 32, 64), (16, 64, 256)
        )
    ],
}


@compressor(
    "lq-lora",
    title="LQ-LoRA: Low-rank Plus Quantized Matrix Decomposition for Efficient Language Model Finetuning",
    year=2023,
    arxiv="2311.12023",
    code="HanGuo97/lq-lora",
    formula="W ~ Q + (alpha / r) B A, Q = NF(W - (alpha / r) B A), formats by integer programming",
    needs=lambda options: (_FISHER,) if options["fisher"] else (),
    whole=True,
    layers=("linear",),
    rest_frozen=True,
    shrinks=False,
)
def lq_lora(
    task: Task,
    *,
    rank: int = 64,
    alpha: float = 16.0,
    bits: float = 2.75,
    formats: str | Mapping[str, str] | None = None,
    grid: str = "coarse",
    fisher: bool = False,
    per_sample: bool = True,
    order: str = "lq",
    iterations: int = 100,
    search_iterations: int = 1,
    randomised: bool = True,
) -> None:
    """Decompose the weights of a model.

    Args:
        task: the model and, for `fisher`, batches.
        rank: r >= 1, of every weight at most min(out, in).
        alpha: numerator of the scaling of B A, positive.
        bits: of a number of the quantised matrices on average, their scales included.
        formats: one for all weights or one for each by its path, in the place of a choice within `bits`.
        grid: of the formats to choose from, "coarse" or "paper".
        fisher: weigh the errors by Fisher information.
        per_sample: of the Fisher information, run the examples of a batch one by one; false squares the mean
            gradient of every batch.
        order: "lq" or "loftq", which quantises before it decomposes.
        iterations: turns at most.
        search_iterations: turns at most of what the formats are chosen by.
        randomised: decompose at random, with two power iterations; false decomposes exactly.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> rf.compress(model, "lq-lora", rank=4, bits=4.2, progress=False)[0].expression.terms[0].form
        NormalFloat(bits=4, block=32, scale_bits=4, scale_block=256, scale_dtype='fp32')
    """
    one_of("lq-lora", GRIDS, grid=grid)
    one_of("lq-lora", ("lq", "loftq"), order=order)
    in_range("lq-lora", "[1, inf)", rank=rank, iterations=iterations, search_iterations=search_iterations)
    in_range("lq-lora", "(0, inf)", alpha=alpha, bits=bits)
    weights = targeted(task, compressor_named("lq-lora"))
    solver = "randomised" if randomised else "exact"
    parts = [
        _Part(site, min(rank, *site.shape), alpha / rank, order, solver, fisher)
        for site in _sites(task, weights, fisher, per_sample)
    ]
    if formats is None:
        chosen = _chosen(task, parts, GRIDS[grid], bits, search_iterations)
    else:
        chosen = {part.path: NormalFloat.of(format_of(part.path, formats)) for part in parts}
    found = _found(task, parts, chosen, iterations)
    _note(task, parts, chosen, bits if formats is None else None)
    texts = {path: str(form) for path, form in chosen.items()}
    replace(
        task.model,
        ("quantised-low-rank", {"alpha": float(alpha), "formats": texts}),
        {part.path: part.rank for part in parts},
        lambda path: {**found[path].tensors, "up": found[path].up, "down": found[path].down},
        rest_frozen=True,
        seed=task.seed,
        record={"compressed": {"method": "lq-lora", "options": _record(task)}},
        reference=rank,
    )


def _record(task: Task) -> dict[str, Any]:
    options = dict(task.report.options)
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in options.items()}


@dataclass(frozen=True, eq=False)
class _Part:
    """A weight, and how it is decomposed."""

    site: Site
    rank: int
    scaling: float
    order: str
    solver: Any
    fisher: bool

    @property
    def path(self) -> str:
        return self.site.path

    @property
    def numbers(self) -> int:
        return math.prod(self.site.shape)

    @property
    def bytes(self) -> int:
        """Bytes of the weight as it is."""
        return self.numbers * self.site.layer.matrix().element_size()

    @property
    def factor_bits(self) -> int:
        """Bits of the factors, which have the weight's own precision."""
        return 8 * self.rank * sum(self.site.shape) * self.site.layer.matrix().element_size()

    @property
    def weights(self) -> Tensor | None:
        """F, or None."""
        return self.site.statistic(_FISHER) if self.fisher else None

    def first(self) -> LowRank | None:
        """Return the product of the first turn, which is the same in every format."""
        if self.order != "lq":
            return None
        generator = self.site.generator("product")
        return low_rank_part(self.rank, self.weights, self.solver, generator)(self.site.matrix())

    def solved(self, form: NormalFloat, iterations: int, first: LowRank | None = None) -> QuantisedLowRank:
        """Return the decomposition in a format."""
        return quantised_low_rank(
            self.site.matrix(), self.rank, form, weights=self.weights, scaling=self.scaling,
            order=self.order, iterations=iterations, solver=self.solver, first=first,  # type: ignore[arg-type]
            generator=self.site.generator("product"),
        )  # fmt: skip


def _sites(task: Task, weights: Sequence[Watched], fisher: bool, per_sample: bool) -> list[Site]:
    """Return the weights with their Fisher information, where it is asked for."""
    if not fisher:
        return [Site(weight.path, weight.layer, None, task.seed) for weight in weights]
    if not isinstance(task.data, Statistics):
        batches = task.batches()
        task = changed(task, data=one_by_one(batches) if per_sample else batches)
    groups = calibrated(task, weights, [_FISHER], sequential=False, memory=None)
    return [
        Site(weight.path, weight.layer, found[weight.path], task.seed)
        for members, found in groups
        if found is not None
        for weight in members
    ]


def _chosen(
    task: Task, parts: Sequence[_Part], forms: Sequence[NormalFloat], bits: float, turns: int
) -> dict[str, NormalFloat]:
    """Return the format of every weight within the budget."""
    bar, errors = Progress(task.progress, len(parts) * len(forms), "formats"), list[list[float]]()
    for part in parts:
        first, row = part.first(), list[float]()
        for form in forms:
            row.append(part.solved(form, turns, first).error)
            bar.step()
        errors.append(row)
    bar.close()
    picks = best_formats([part.numbers for part in parts], forms, errors, bits)
    return {part.path: form for part, form in zip(parts, picks, strict=True)}


def best_formats(
    sizes: Sequence[int], forms: Sequence[NormalFloat], errors: Sequence[Sequence[float]], bits: float
) -> list[NormalFloat]:
    """Return the formats of the smallest sum of squared errors within a budget of bits.

    Args:
        sizes: numbers in every weight.
        forms: to choose from.
        errors: of every weight in every format, all on one scale.
        bits: of a number, on average.

    Raises:
        InvalidOption: even the smallest formats take more.

    Example:
        >>> forms = [NormalFloat(2), NormalFloat(4)]
        >>> [str(form) for form in best_formats([64, 64], forms, [[2.0, 1.0], [5.0, 1.0]], 5.0)]
        ['nf2-64-8-256-fp32', 'nf4-64-8-256-fp32']
    """
    rows = [_undominated(size, forms, row) for size, row in zip(sizes, errors, strict=True)]
    least = sum(row[0][0] for row in rows)
    if least > bits * sum(sizes):
        raise InvalidOption(
            f"lq-lora: bits={bits:g} is below {least / sum(sizes):.3f}, the fewest that its formats take"
        )
    picks = allocate(
        [[float(cost) for cost, _, _ in row] for row in rows],
        [[-(error**2) for _, error, _ in row] for row in rows],
        bits * sum(sizes),
        method="exact",
    )
    return [row[pick][2] for row, pick in zip(rows, picks, strict=True)]


def _undominated(
    size: int, forms: Sequence[NormalFloat], errors: Sequence[float]
) -> list[tuple[int, float, NormalFloat]]:
    """Return bits, error and format of those to which no other is better and no larger."""
    order = sorted(range(len(forms)), key=lambda i: (forms[i].bytes(size), errors[i], i))
    found = list[tuple[int, float, NormalFloat]]()
    for index in order:
        if not found or errors[index] < found[-1][1]:
            found.append((8 * forms[index].bytes(size), errors[index], forms[index]))
    return found


def _found(
    task: Task, parts: Sequence[_Part], chosen: Mapping[str, NormalFloat], iterations: int
) -> dict[str, QuantisedLowRank]:
    """Return the decompositions, and report them."""
    bar, found = Progress(task.progress, len(parts), "turns"), dict[str, QuantisedLowRank]()
    for part in parts:
        found[part.path] = part.solved(chosen[part.path], iterations)
        task.report.rows.append(_row(part, chosen[part.path], found[part.path]))
        bar.step()
    bar.close()
    return found


def _row(part: _Part, form: NormalFloat, found: QuantisedLowRank) -> Row:
    matrix, kept = part.site.matrix(), [*found.tensors.values(), found.up, found.down]
    coarse = dequantise(found.tensors, form, part.site.shape).to(matrix)
    rest = matrix - coarse - part.scaling * found.up @ found.down
    alone = matrix - dequantise(quantise(matrix, form), form, part.site.shape).to(matrix)
    size = max(float(matrix.norm()), 1e-300)
    note = (
        f"{form}, {8 * form.bytes(part.numbers) / part.numbers:.3f} bits, {len(found.errors)} turns, "
        f"plain error without the product {float(alone.norm()) / size:.3f}"
    )
    return Row(
        part.path,
        part.site.shape,
        part.rank,
        sum(tensor.numel() for tensor in kept),
        found.error / max(found.size, 1e-300),
        float(rest.norm()) / size,
        note=note,
    )


def _note(task: Task, parts: Sequence[_Part], chosen: Mapping[str, NormalFloat], bits: float | None) -> None:
    """Report the bits, of the quantised matrices and of all."""
    numbers = sum(part.numbers for part in parts)
    used = sum(8 * chosen[part.path].bytes(part.numbers) for part in parts) / numbers
    factors = sum(part.factor_bits for part in parts) / numbers
    asked = "" if bits is None else f" of {bits:g} asked for"
    before = sum(8 * part.bytes for part in parts) / numbers
    task.report.notes.append(
        f"{used:.3f} bits a number{asked}, and {factors:.3f} for the factors, of {before:g} before; "
        "where numbers are counted, a byte of codes is one"
    )
    task.report.facts |= {"bits": used, "factor_bits": factors}
    task.report.facts["formats"] = {path: str(form) for path, form in chosen.items()}
