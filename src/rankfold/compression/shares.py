"""How many parameters every weight gets: rules that share a budget out as ranks.

A rule is a function `rule(units, budget, *, options) -> {path: rank or None}`; None leaves a weight as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..catalogue import require_kind
from ..errors import InvalidOption, UnknownMethod, near_names
from ..linalg import allocate, tail_errors

Ranks = dict[str, int | None]


@dataclass(frozen=True, eq=False)
class Unit:
    """A weight that takes part in sharing out a budget.

    Attributes:
        path: of the weight.
        shape: (out, in).
        spectrum: singular values in the method's metric, for rules that read them.
        group: weights of one group, such as tied ones, get one rank.
        measure: `measure(rank)` is the distortion of the model's output where this weight alone has that
            rank, for rules that read it.
    """

    path: str
    shape: tuple[int, int]
    spectrum: Tensor | None = None
    group: Hashable = None
    measure: Callable[[int], float] | None = None

    @property
    def dense(self) -> int:
        """Numbers in the weight as it is."""
        return self.shape[0] * self.shape[1]

    @property
    def per_rank(self) -> int:
        """Numbers that one rank takes."""
        return self.shape[0] + self.shape[1]

    @property
    def largest(self) -> int:
        """The largest rank that takes fewer numbers than the weight itself."""
        return max(1, min((self.dense - 1) // self.per_rank, min(self.shape)))

    def singular(self) -> Tensor:
        """Return the spectrum."""
        assert self.spectrum is not None  # the job gives it to rules that read it
        return self.spectrum

    def measured(self, rank: int) -> float:
        """Return what the model's output suffers where this weight alone has that rank."""
        assert self.measure is not None  # the job gives it to rules that read it
        return self.measure(rank)


@dataclass(frozen=True)
class Share:
    """A rule by its name.

    Attributes:
        name: of the rule.
        rule: the function.
        spectra: it reads the spectra.
        measures: it reads what cutting one weight does to the model's output.
        free: it asks for no budget, so that `keep` says nothing.
    """

    name: str
    rule: Callable[..., Ranks]
    spectra: bool
    measures: bool
    free: bool


SHARES: dict[str, Share] = {}


def share(
    name: str, *, spectra: bool = False, measures: bool = False, free: bool = False
) -> Callable[..., Any]:
    """Register a rule."""

    def enter(rule: Callable[..., Ranks]) -> Callable[..., Ranks]:
        SHARES[name] = Share(name, rule, spectra, measures, free)
        return rule

    return enter


def share_named(name: str) -> Share:
    """Return a rule.

    Raises:
        UnknownMethod: there is none.
    """
    if name not in SHARES:
        hint = near_names(name, SHARES) or f"; known: {', '.join(sorted(SHARES))}"
        raise UnknownMethod(f"no way to share out parameters is called {name!r}{hint}")
    return SHARES[name]


def shared(found: Share, units: Sequence[Unit], keep: float, options: Mapping[str, Any]) -> Ranks:
    """Return the rank of every weight, None where it stays as it is.

    Args:
        found: the rule.
        units: the weights.
        keep: share of their numbers that may remain, in (0, 1].
        options: of the rule.

    Raises:
        InvalidOption: an option is unknown or of another kind, or the budget cannot hold rank 1 everywhere.
    """
    if keep == 1:
        return dict.fromkeys((unit.path for unit in units), None)
    least, budget = sum(unit.per_rank for unit in units), int(keep * sum(unit.dense for unit in units))
    if least > budget and not found.free:
        raise InvalidOption(
            f"keep={keep:g} leaves {budget:,} numbers, and rank 1 in every weight takes {least:,} already"
        )
    check_options(found, options)
    return found.rule(units, budget, **options)


def check_options(found: Share, options: Mapping[str, Any]) -> None:
    """Refuse options that a rule does not have, or of another kind.

    Raises:
        InvalidOption: naming the option and those that there are.
    """
    parameters = inspect.signature(found.rule).parameters.values()
    known = sorted(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    for key, value in options.items():
        if key not in known:
            raise InvalidOption(
                f"share {found.name} has no option {key!r}; its options: {', '.join(known) or 'none'}"
            )
        require_kind(f"share {found.name}", found.rule, key, value)


@share("uniform")
def uniform(units: Sequence[Unit], budget: int, *, multiple: int = 1) -> Ranks:
    """Give every weight the same share of its own numbers: r = floor(keep out in / (out + in)).

    Args:
        units: the weights.
        budget: numbers in all.
        multiple: ranks of at least this, from 1, are rounded down to a multiple of it, for kernels that are
            fast at such sizes (64 or 128).
    """
    if multiple < 1:
        raise InvalidOption(f"share uniform: multiple must be at least 1, not {multiple}")
    keep = budget / sum(unit.dense for unit in units)
    ranks = {u.path: max(1, min(int(keep * u.dense / u.per_rank), min(u.shape))) for u in units}
    return {path: r if r < multiple else r // multiple * multiple for path, r in ranks.items()}


@share("sensitivity", measures=True)
def sensitivity(
    units: Sequence[Unit], budget: int, *, ladder: Sequence[float] = tuple(i / 10 for i in range(1, 10))
) -> Ranks:
    """Cut where the model minds least: one bound on the loss, with one weight cut, holds for all weights.

    Every weight alone is cut to every share of the ladder, and the loss of the calibration data is measured
    (without a loss, the relative squared error of the output). Under a bound on it every weight takes the
    smallest share that stays below; the bound is the lowest that meets the budget. Weights that no share
    suits stay as they are. Yuan et al. 2023 (ASVD) search so, on the perplexity, with this ladder.

    Args:
        units: the weights.
        budget: numbers in all.
        ladder: shares of a weight's numbers, in (0, 1).
    """
    if not ladder or not all(0 < step < 1 for step in ladder):
        raise InvalidOption(f"share sensitivity: ladder must hold shares in (0, 1), not {ladder!r}")
    tried = [(u, max(1, int(step * u.dense / u.per_rank))) for u in units for step in sorted(set(ladder))]
    measured = [(unit.measured(rank), unit, rank) for unit, rank in tried]
    ranks: Ranks = dict.fromkeys((u.path for u in units), None)
    spent = sum(u.dense for u in units)
    for _, unit, rank in sorted(measured, key=lambda entry: (entry[0], -entry[2])):
        if spent <= budget:
            break
        now = ranks[unit.path]
        if now is None or rank < now:
            spent += rank * unit.per_rank - (unit.dense if now is None else now * unit.per_rank)
            ranks[unit.path] = rank
    if spent > budget:
        raise InvalidOption(
            f"share sensitivity: with the least share of the ladder, {min(ladder):g}, {spent:,} numbers "
            f"remain, and {budget:,} are asked for"
        )
    return ranks


@share("error", spectra=True)
def error(units: Sequence[Unit], budget: int, *, relative: bool = True, exact: bool = False) -> Ranks:
    """Spend every number where it takes away the most error, sum over weights of ||L (W - B A) R||^2.

    Args:
        units: the weights.
        budget: numbers in all.
        relative: errors are divided by the size of the weight in its metric, so that weights of different
            scale count alike.
        exact: by dynamic or integer programming instead of greedily.
    """
    errors = [tail_errors(unit.singular()).square().double().cpu().numpy() for unit in units]
    sizes = [row[0] if relative and row[0] > 0 else 1.0 for row in errors]
    gains = [
        np.append(1 - row[: u.largest + 1] / n, 1.0) for row, u, n in zip(errors, units, sizes, strict=True)
    ]
    if not relative:
        gains = [
            np.append(row[0] - row[: u.largest + 1], row[0]) for row, u in zip(errors, units, strict=True)
        ]
    costs = [
        [*(r * u.per_rank for r in range(u.largest + 1)), max(u.dense, u.largest * u.per_rank)] for u in units
    ]
    taken = allocate(costs, gains, budget, method="exact" if exact else "greedy", minimum=1)
    return {u.path: None if r > u.largest else r for u, r in zip(units, taken, strict=True)}
