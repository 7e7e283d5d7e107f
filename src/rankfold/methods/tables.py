"""Tables of ranks that a search or a measurement has found.

Unlike the rank rule `table`, which a user writes by hand, they have to cover every weight that is adapted,
and may cover more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import InvalidOption
from ..layers.targets import matches
from .rules import Unit


def asks_for_table(name: str, which: str) -> InvalidOption:
    """Return the refusal of a rank rule without its table, which says how one is given.

    Example:
        >>> str(asks_for_table("table", "the ranks that you choose"))[:46]
        'table needs the ranks that you choose, as its '
    """
    entries = '{"*.attention.*": 4}'
    return InvalidOption(
        f'{name} needs {which}, as its option ranks: Recipe(..., ranks=("{name}", {{"ranks": {entries}}})) '
        f"in Python, --set 'ranks.ranks={entries}' on the command line"
    )


def tabled(name: str, units: Sequence[Unit], table: Mapping[str, int] | None, source: str) -> dict[str, int]:
    """Return the rank that a table gives every weight: its own entry, else the first pattern that fits.

    Args:
        name: of the rank rule, for errors.
        units: the weights.
        table: ranks by dotted path or pattern of paths; 0 leaves a weight out. Entries of weights that are
            not adapted are not read.
        source: the call that finds the ranks, for the error where there is no table.

    Raises:
        InvalidOption: there is no table, a weight has no entry, or an entry is no rank.

    Example:
        >>> units = [Unit("layers.0.q", (8, 8)), Unit("layers.0.v", (8, 8))]
        >>> tabled("autolora", units, {"*.v": 2, "layers.0.q": 4}, "autolora.search(...)")
        {'layers.0.q': 4, 'layers.0.v': 2}
    """
    if table is None:
        raise asks_for_table(name, f"the ranks that rankfold.methods.ranks.{source} finds")
    for path, rank in table.items():
        if type(rank) is not int or rank < 0:
            raise InvalidOption(f"{name}: the rank of {path} must be a whole number from 0 up, not {rank!r}")
    return {unit.path: _entry(name, unit.path, table) for unit in units}


def _entry(name: str, path: str, table: Mapping[str, int]) -> int:
    if path in table:
        return table[path]
    for pattern, rank in table.items():
        if matches(path, pattern):
            return rank
    raise InvalidOption(f"{name}: the table of ranks has no entry for {path}; add one (0 leaves it out)")
