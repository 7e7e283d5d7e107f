"""A table of your own says how much rank every weight gets.

    ("table", {"ranks": {"*.attention.*": 4, "layers.0.attention.query": 16, "mlp": 0}})

Entries are paths or patterns as `targets` takes them: a glob for the whole path or its last parts, or a
regular expression that starts with `re:`. The most specific entry counts: a path before a pattern, and a
pattern before another that means all of its weights and more; two that overlap otherwise and do not agree are
refused, and so is an entry that means no weight. 0 leaves weights out, and what no entry means gets the rank
that was asked for, as far as it can hold it. alpha is divided by what a weight itself gets, as in the rank
patterns of common libraries. LoRA itself (Hu et al. 2021) already gives some weights rank and others none.

Use it where the ranks are known: from another run, a search, or a decision.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import InvalidOption, near_names
from ...layers.targets import matches
from ..registry import ranks
from ..rules import Unit
from ..tables import asks_for_table


def largest_rank(options: Mapping[str, Any], rank: int) -> int:
    """Return the largest entry."""
    return max((value for value in (options["ranks"] or {}).values() if isinstance(value, int)), default=rank)


@ranks(
    "table",
    scales="own",
    largest=largest_rank,
    example={"ranks": {"*": 2}},
    title="LoRA: Low-Rank Adaptation of Large Language Models",
    year=2021,
    arxiv="2106.09685",
    formula="r_l = the table's most specific entry",
)
def table(units: Sequence[Unit], rank: int, *, ranks: Mapping[str, int] | None = None) -> dict[str, int]:
    """Give every weight what the table says.

    Args:
        units: the weights.
        rank: of weights that no entry means.
        ranks: by path or pattern, whole numbers of at least 0.

    Raises:
        InvalidOption: there is no table, or an entry means no weight, is no rank, or contradicts another.
    """
    if not isinstance(ranks, Mapping) or not ranks:
        raise asks_for_table("table", "the ranks that you choose")
    wrong = {key: value for key, value in ranks.items() if type(value) is not int or value < 0}
    if wrong:
        key, value = next(iter(wrong.items()))
        raise InvalidOption(f"table: the rank of {key!r} must be a whole number of at least 0, not {value!r}")
    meant = {key: _meant(key, [unit.path for unit in units]) for key in ranks}
    found = {unit.path: _entry(unit.path, ranks, meant) for unit in units}
    return {u.path: u.fitted(rank) if found[u.path] is None else ranks[str(found[u.path])] for u in units}


def _meant(key: str, paths: Sequence[str]) -> set[str]:
    """Return the weights that an entry means; a path means itself."""
    hits = {key} if key in paths else {path for path in paths if matches(path, key)}
    if not hits:
        names = {*paths, *(path.rpartition(".")[2] for path in paths)}
        raise InvalidOption(f"table: {key!r} means no weight that is adapted{near_names(key, names)}")
    return hits


def _entry(path: str, table: Mapping[str, int], meant: Mapping[str, set[str]]) -> str | None:
    """Return the most specific entry that means a path, or None."""
    if path in table:
        return path
    hits = [key for key, paths in meant.items() if path in paths]
    narrowest = [key for key in hits if not any(meant[other] < meant[key] for other in hits)]
    disagreeing = [key for key in narrowest if table[key] != table[narrowest[0]]]
    if disagreeing:
        first, second = narrowest[0], disagreeing[0]
        raise InvalidOption(
            f"table: {first!r} gives {path} the rank {table[first]}, {second!r} gives it {table[second]}, "
            "and neither is more specific; add an entry for the path itself"
        )
    return narrowest[0] if narrowest else None
