"""LoNAS, Shears, SQFT: one adapter whose every leading sub-adapter works, and the choice of one of them.

    W = W0 + s B[:, :k] A[:k, :],   k drawn anew in every step for every group of weights,   s = alpha / R

Munoz et al. 2025 (a survey of their three methods). Training a super-network: after every step a width k is
drawn uniformly from `choices`, shares of the full rank R (32, 24 and 16 of 32 in the paper), per group:
query, key and value projections of one block together (`together`), every other weight alone. The mask is a
gate that is not trained. Terms beyond k have exactly zero gradient, and neither momentum nor decay moves
them or their moments. The scaling stays alpha / R. The first step, and the adapter once training has ended,
have all terms.

After training a configuration {path: k} is chosen: `middle`, the heuristic without a search, or `climb`,
hill climbing by a score of yours; `choose` puts it in place, and `extract` makes it a plain adapter of
those ranks.

Start: the structure's and the initialiser's. Deviations: the base's own channels stay as they are (LoNAS
also narrows them); sparse and quantised bases (Shears, SQFT) are whatever the adapted model has.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import InvalidOption, InvalidRank
from ...layers import require
from ...optim import moments
from ...weights import Leaf, Pair
from ...weights.weight import tick
from ..limits import in_range
from ..recipe import Recipe, resolve
from ..registry import ranks
from ..rules import DynamicRanks
from ..run import Run, TrainedPair
from ..site import Place
from ..squeeze import squeeze

Configuration = Mapping[str, int]


@ranks(
    "lonas",
    title="Low-Rank Adapters Meet Neural Architecture Search for LLM Compression",
    year=2025,
    arxiv="2501.16372",
    code="IntelLabs/Hardware-Aware-Automated-Machine-Learning",
    formula="W = W0 + s B[:, :k] A[:k, :], k drawn per group in every step",
)
@dataclass(kw_only=True)
class Lonas(DynamicRanks):
    """A super-network over nested ranks.

    Args:
        choices: widths as shares of the full rank, in (0, 1], widest first.
        together: regular expression of the last parts of paths that share a width within one module.
    """

    choices: Sequence[float] = (1.0, 0.75, 0.5)
    together: str = r"(q|k|v)(_proj|_lin)?|query|key|value|to_[qkv]"
    opens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        numbers = all(isinstance(share, int | float) for share in self.choices)
        falling = numbers and all(a > b for a, b in itertools.pairwise(self.choices))
        if not self.choices or not falling or not 0 < self.choices[-1] <= self.choices[0] <= 1:
            raise InvalidOption(f"lonas: choices must be numbers that fall within (0, 1], not {self.choices}")
        try:
            re.compile(self.together)
        except re.error as error:
            raise InvalidOption(
                f"lonas: together must be a regular expression, not {self.together!r}: {error}"
            ) from None

    def gate(self, site: Place, name: str, rank: int, start: str) -> Leaf:
        """Return a mask of ones, which is not trained."""
        return site.frozen(site.zeros(rank) + 1, name)

    def group(self, path: str) -> str:
        """Name the group of a weight."""
        parent, _, last = path.rpartition(".")
        return f"{parent}.*" if re.fullmatch(self.together, last) else path

    def width(self, choice: int, rank: int) -> int:
        """Return the number of terms of a choice, by its position."""
        return max(1, round(self.choices[choice] * rank))

    def gradients_ready(self, run: Run) -> None:
        """Remember everything beyond the active terms."""
        for pair in run.pairs:
            active = int(_mask(pair.pair).sum())
            for name, beyond in _beyond(run, pair, active).items():
                run.memory(pair.key)[f"held.{name}"] = beyond.clone()

    def stepped(self, run: Run) -> None:
        """Put it back, and draw the widths of the next step."""
        for pair in run.pairs:
            memory, active = run.memory(pair.key), int(_mask(pair.pair).sum())
            for name, beyond in _beyond(run, pair, active).items():
                held = memory.pop(f"held.{name}", None)
                beyond.copy_(torch.zeros_like(beyond) if held is None else held)
            drawn = torch.randint(len(self.choices), (), generator=run.generator(self.group(pair.path)))
            _open(pair.pair, self.width(int(drawn), pair.rank))

    def finish(self, run: Run) -> None:
        """Open all terms."""
        for pair in run.pairs:
            _open(pair.pair, pair.rank)


def _mask(pair: Pair) -> Tensor:
    assert pair.gate is not None
    return pair.gate.tensor()


@torch.no_grad()
def _open(pair: Pair, count: int) -> None:
    """Let the first terms act and no others."""
    mask = _mask(pair)
    mask.copy_(torch.arange(len(mask), device=mask.device) < count)
    tick()


def _beyond(run: Run, pair: TrainedPair, active: int) -> dict[str, Tensor]:
    """Return views of the factors and their moments beyond the active terms, by name."""
    found = {}
    for side, factor in (("up", pair.up), ("down", pair.down)):
        for name, value in {"value": factor.detach(), **moments(run.optimizer, factor)}.items():
            found[f"{side}.{name}"] = value[:, active:] if side == "up" else value[active:]
    return found


# After training ---------------------------------------------------------------------------------------


def middle(model: nn.Module) -> dict[str, int]:
    """Return the heuristic configuration: the choice in the middle for every weight.

    Args:
        model: with an adapter whose ranks are lonas's.

    Raises:
        InvalidOption: they are not.
    """
    rule, pairs = _super_network(model)
    return {path: rule.width(len(rule.choices) // 2, most) for path, (_, most) in pairs.items()}


def choose(model: nn.Module, configuration: Configuration) -> None:
    """Let every weight act with the first terms that a configuration gives it.

    Raises:
        InvalidRank: a weight is missing or its number of terms is not in 1..R; nothing is changed then.
    """
    _, pairs = _super_network(model)
    for path, (_, most) in pairs.items():
        count = configuration.get(path)
        if not isinstance(count, int) or not 1 <= count <= most:
            raise InvalidRank(f"{path}: the configuration must give it a rank in 1..{most}, not {count!r}")
    for path, (products, _) in pairs.items():
        for pair in products:
            _open(pair, configuration[path])


def climb(
    model: nn.Module, evaluate: Callable[[nn.Module], float], *, rounds: int, seed: int = 0
) -> dict[str, int]:
    """Return the best configuration that hill climbing finds, and leave it in place.

    It begins at the middle; every round moves one group to a neighbouring choice, kept if it scores higher.

    Args:
        model: with an adapter whose ranks are lonas's, trained.
        evaluate: the score of the model as it stands, higher is better; it may weigh size against loss.
        rounds: of the search, each with one evaluation, at least 0.
        seed: of the moves.

    Raises:
        InvalidOption: the adapter's ranks are not lonas's, or a number is out of range.
    """
    in_range("lonas", "[0, inf)", rounds=rounds)
    rule, pairs = _super_network(model)
    groups = sorted({rule.group(path) for path in pairs})
    generator = random.Random(seed)

    def widths(chosen: Mapping[str, int]) -> dict[str, int]:
        return {path: rule.width(chosen[rule.group(path)], most) for path, (_, most) in pairs.items()}

    def score(chosen: Mapping[str, int]) -> float:
        choose(model, widths(chosen))
        return float(evaluate(model))

    best = dict.fromkeys(groups, len(rule.choices) // 2)
    highest = score(best)
    for _ in range(rounds):
        group = generator.choice(groups)
        moved = best[group] + generator.choice((-1, 1))
        if not 0 <= moved < len(rule.choices):
            continue
        tried = {**best, group: moved}
        found = score(tried)
        if found > highest:
            best, highest = tried, found
    choose(model, widths(best))
    return widths(best)


def extract(model: nn.Module, configuration: Configuration) -> nn.Module:
    """Make the sub-adapter of a configuration a plain adapter, in place: slices of the super-adapter.

    Args:
        model: with an adapter whose ranks are lonas's.
        configuration: number of terms by path.

    Returns:
        The model.

    Raises:
        InvalidRank: a weight is missing or its number of terms is not in 1..R; nothing is changed then.
    """
    choose(model, configuration)
    return squeeze(model)


def _super_network(model: nn.Module) -> tuple[Lonas, dict[str, tuple[list[Pair], int]]]:
    """Return the rule, and for every weight its products and their full rank."""
    adaptation = require(model)
    adapter = adaptation.adapter()
    rule: Any = resolve(Recipe.from_dict(adapter.record["recipe"]), {}).rule
    if not isinstance(rule, Lonas):
        raise InvalidOption(f"the ranks of the adapter {adapter.name!r} are not lonas's")
    found = {path: list(e.pairs()) for path, e in adaptation.expressions(adapter.name).items()}
    return rule, {path: (pairs, len(_mask(pairs[0]))) for path, pairs in found.items()}
