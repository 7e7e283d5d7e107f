"""Learngene pool: models of many sizes, stitched from the blocks of a few that were distilled from one.

    h = blocks_j[b..](M_ij blocks_i[..a](x)),   M_ij (d_j, d_i),   then norm and head of j
    L = CE(softmax(y^t), softmax(y^s)) + sum_m MSE(h_m^s, P_m h_m^t),   P_m (d_s, d_t)

Shi et al. 2023. The instances i < j, small to large, have equally many blocks; a and b lie in one window of
`kernel` blocks, which slides by `stride`, and the stitches of a window share M. There are as many models as
stitches, for every pair of instances, and the instances themselves. Distillation of the auxiliary models
(second line, h at the first, middle and last blocks, matched in depth) also learns P_m; where instance j is
as wide as the teacher, M_ij starts at mean_m P_m^T (`maps`). Otherwise it takes the start of SN-Net (Pan et
al. 2023), the least squares M = X_j^T X_i (X_i^T X_i)^-1 from what blocks give and get on a few batches
(`data`). Then the pool is tuned: every step draws one model, uniformly, for the loss of the task.

Deviations: M has no bias, nor has P, whose bias the official code learns and drops. Where both widths are
equal the official code stitches without a map; here M is square and starts as the others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...catalogue import register
from ...errors import InvalidOption
from ...statistics.batches import call
from ..blocks import Calls, Skipped, block_list, hidden_of

Maps = Mapping[tuple[int, int], Tensor]


class Stitch(NamedTuple):
    """Blocks 0..after of instance `front`, then blocks `before`.. of instance `back`."""

    front: int
    back: int
    after: int
    before: int


def windows(depth: int, kernel: int = 2, stride: int = 1) -> list[list[tuple[int, int]]]:
    """Return the pairs (a, b) of every window, each pair in the first window that has it.

    Example:
        >>> windows(3)
        [[(0, 0), (0, 1), (1, 0), (1, 1)], [(1, 2), (2, 1), (2, 2)]]
    """
    seen: set[tuple[int, int]] = set()
    found = []
    for start in range(0, depth, stride):
        ids = range(start, min(start + kernel, depth))
        new = [(a, b) for a in ids for b in ids if (a, b) not in seen]
        seen.update(new)
        found += [new] if new else []
    return found


@register(
    "compress",
    "learngene-pool",
    title="Building Variable-sized Models via Learngene Pool",
    year=2023,
    arxiv="2312.05743",
    code="superselll/learngenepool",
    formula="h = blocks_j[b..](M_ij blocks_i[..a](x)), M_ij (d_j, d_i)",
)
class LearngenePool(nn.Module):
    """A pool of models with equally many blocks, and the linear maps between them.

    Args:
        instances: models, or plain lists of blocks, from small to large; they are held, not copied.
        data: a few batches, from which maps start by least squares.
        kernel: blocks in a window, at least 1.
        stride: by which it slides, at least 1.
        maps: starts (d_j, d_i) by pair (i, j), see `mean_map`, which go before those from data.

    Raises:
        InvalidOption: there are fewer than two instances, of different depth, or a pair has no start.

    Example:
        >>> import torch, rankfold as rf
        >>> small, large = (torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        >>> pool = LearngenePool([small, large], data=[torch.randn(4, 8)])
        >>> len(pool.stitches), pool.models
        (7, 9)
        >>> pool.stitched(pool.stitches[0])(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        instances: Sequence[nn.Module | Sequence[nn.Module]],
        data: Sequence[Any] | None = None,
        *,
        kernel: int = 2,
        stride: int = 1,
        maps: Maps | None = None,
    ) -> None:
        super().__init__()
        self.instances = nn.ModuleList(_model(each) for each in instances)
        depths = [len(self.blocks(i)) for i in range(len(self.instances))]
        if len(depths) < 2 or len(set(depths)) > 1 or kernel < 1 or stride < 1:
            raise InvalidOption(
                "learngene-pool needs two instances or more with equally many blocks, and kernel and stride "
                f"of at least 1; they have {depths} blocks, kernel is {kernel} and stride {stride}"
            )
        self._windows = windows(depths[0], kernel, stride)
        self._skips: dict[tuple[int, int], Skipped] = {}
        self.maps = nn.ModuleDict()
        for pair in combinations(range(len(depths)), 2):
            starts = self._starts(pair, data, maps or {})
            self.maps["-".join(map(str, pair))] = nn.ModuleList(_linear(start) for start in starts)

    def blocks(self, index: int) -> nn.ModuleList:
        """Return the blocks of an instance."""
        return block_list(self.instances[index])

    @property
    def stitches(self) -> list[Stitch]:
        """All stitches, from each smaller instance to each larger one."""
        pairs = combinations(range(len(self.instances)), 2)
        return [Stitch(i, j, a, b) for i, j in pairs for window in self._windows for a, b in window]

    @property
    def models(self) -> int:
        """How many models the pool has: its stitches and its instances."""
        return len(self.stitches) + len(self.instances)

    def map(self, stitch: Stitch) -> nn.Module:
        """Return the linear map of a stitch, shared within a window; none from an instance to itself.

        Raises:
            InvalidOption: the pool has no such stitch.
        """
        depth = len(self.blocks(0))
        if stitch.front == stitch.back and 0 <= stitch.after < depth and 0 <= stitch.before < depth:
            return nn.Identity()
        for number, window in enumerate(self._windows if stitch.front < stitch.back else ()):
            if (stitch.after, stitch.before) in window:
                return self.maps[f"{stitch.front}-{stitch.back}"][number]  # type: ignore[index,no-any-return]
        raise InvalidOption(f"the pool has no {stitch}; its stitches lead from smaller to larger instances")

    def stitched(self, stitch: Stitch) -> Stitched:
        """Return a stitched model; it shares its parameters with the pool."""
        return Stitched(self, stitch, self.map(stitch))

    def draw(self, generator: torch.Generator | None = None) -> nn.Module:
        """Return one of all models, uniformly: what a step of tuning trains."""
        chosen = int(torch.randint(self.models, (), generator=generator))
        if chosen < len(self.instances):
            return self.instances[chosen]
        return self.stitched(self.stitches[chosen - len(self.instances)])

    @contextmanager
    def only(self, index: int, kept: range) -> Iterator[nn.ModuleList]:
        """Let an instance run some of its blocks only."""
        blocks = self.blocks(index)
        before = list(blocks)
        try:
            for place, block in enumerate(before):
                if place not in kept:
                    blocks[place] = self._skips.setdefault((index, place), Skipped(block))
            yield blocks
        finally:
            for place, block in enumerate(before):
                blocks[place] = block

    def _starts(self, pair: tuple[int, int], data: Sequence[Any] | None, maps: Maps) -> list[Tensor]:
        """Return M of every window."""
        if pair in maps:
            return [maps[pair] for _ in self._windows]
        if data is None:
            raise InvalidOption(f"learngene-pool: the pair {pair} has no start; pass data= or maps=")
        smaller, larger = (list(self.blocks(index)) for index in pair)
        outputs = [_rows(Calls(self.instances[pair[0]], block, data).outputs) for block in smaller]
        inputs = [_inputs(Calls(self.instances[pair[1]], block, data)) for block in larger]
        return [fitted_map([(outputs[a], inputs[b]) for a, b in window]) for window in self._windows]


class Stitched(nn.Module):
    """The front of one instance, a map, and the back of another; called as the instances are.

    Its parameters are those of the blocks that it runs and of the map; embeddings, the last norm and the head
    are its instances' own, so train those of the pool.

    Args:
        pool: whose instances run; it is not registered, as the map is.
        stitch: from where to where.
        map: the linear map.
    """

    def __init__(self, pool: LearngenePool, stitch: Stitch, map: nn.Module) -> None:
        super().__init__()
        self._pool, self.stitch, self.map = (pool,), stitch, map
        self.front = pool.blocks(stitch.front)[: stitch.after + 1]
        self.back = pool.blocks(stitch.back)[stitch.before :]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the larger instance makes of the mapped hidden states."""
        pool, stitch = self._pool[0], self.stitch
        seen: list[Tensor] = []
        with pool.only(stitch.front, range(stitch.after + 1)) as blocks:
            handle = blocks[stitch.after].register_forward_hook(
                lambda block, inputs, output: seen.append(hidden_of(output))
            )
            try:
                pool.instances[stitch.front](*args, **kwargs)
            finally:
                handle.remove()
        with pool.only(stitch.back, range(stitch.before, len(blocks))) as blocks:
            handle = blocks[stitch.before].register_forward_pre_hook(
                lambda block, inputs, named: _replaced(self.map(seen[-1]), inputs, named), with_kwargs=True
            )
            try:
                return pool.instances[stitch.back](*args, **kwargs)
            finally:
                handle.remove()


class PoolDistillation(nn.Module):
    """The loss that makes an auxiliary model of a larger one, with the maps P_m that it learns.

    Args:
        student: trained.
        teacher: runs without gradients; it is not registered.
        data: one batch, which shows the widths.
        positions: pairs (block of the student, block of the teacher); None takes first, middle and last.

    Example:
        >>> import torch
        >>> student, teacher = (Chain([torch.nn.Linear(6, 6) for _ in range(n)]) for n in (2, 4))
        >>> distillation = PoolDistillation(student, teacher, torch.randn(3, 6))
        >>> distillation.positions, tuple(distillation(torch.randn(3, 6)).shape)
        ([(0, 0), (0, 1), (1, 3)], ())
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        data: Any,
        *,
        positions: Sequence[tuple[int, int]] | None = None,
    ) -> None:
        super().__init__()
        self.student, self._teacher = student, (teacher,)
        depths = [len(block_list(model)) for model in (student, teacher)]
        ends = [tuple(round(share * (depth - 1) - 1e-9) for depth in depths) for share in (0, 0.5, 1)]
        self.positions = [(s, t) for s, t in ends] if positions is None else list(positions)
        with torch.no_grad():
            _, mine = self._run(student, [s for s, _ in self.positions], data)
            _, theirs = self._run(teacher, [t for _, t in self.positions], data)
        self.maps = nn.ModuleList(
            nn.Linear(t.shape[-1], s.shape[-1], bias=False, device=s.device, dtype=s.dtype)
            for s, t in zip(mine, theirs, strict=True)
        )

    def forward(self, batch: Any) -> Tensor:
        """Return the loss of a batch."""
        with torch.no_grad():
            wanted, theirs = self._run(self._teacher[0], [t for _, t in self.positions], batch)
        given, mine = self._run(self.student, [s for s, _ in self.positions], batch)
        soft = F.cross_entropy(given.flatten(0, -2), wanted.flatten(0, -2).softmax(-1))
        apart = [F.mse_loss(s, p(t)) for s, p, t in zip(mine, self.maps, theirs, strict=True)]
        return soft + torch.stack(apart).sum()

    def mean_map(self) -> Tensor:
        """Return mean_m P_m^T (d_t, d_s), the start of stitches to an instance as wide as the teacher."""
        weights = [linear.weight for linear in self.maps if isinstance(linear, nn.Linear)]
        return torch.stack([weight.detach().T for weight in weights]).mean(0)

    @staticmethod
    def _run(model: nn.Module, places: Sequence[int], batch: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the logits and the hidden states after some blocks."""
        seen: dict[int, Tensor] = {}
        blocks = block_list(model)
        handles = [
            blocks[place].register_forward_hook(
                lambda block, inputs, output, place=place: seen.update({place: hidden_of(output)})
            )
            for place in set(places)
        ]
        try:
            output = call(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        logits = getattr(output, "logits", output)
        return hidden_of(logits), [seen[place] for place in places]


def fitted_map(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return M of the least sum of ||Y - X M^T||^2 over pairs X (n, d_i), Y (n, d_j): (d_j, d_i)."""
    given, wanted = (torch.cat([pair[side] for pair in pairs]).double() for side in (0, 1))
    solution: Tensor = torch.linalg.pinv(given) @ wanted  # also where tokens are fewer than dimensions
    return solution.T.to(pairs[0][1].dtype)


class Chain(nn.Module):
    """A plain list of blocks as a model."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the hidden states after all blocks."""
        for block in self.blocks:
            hidden = hidden_of(block(hidden))
        return hidden


def _model(instance: nn.Module | Sequence[nn.Module]) -> nn.Module:
    if isinstance(instance, nn.Module) and not isinstance(instance, nn.ModuleList):
        return instance
    return Chain(list(instance))


def _linear(start: Tensor) -> nn.Linear:
    layer = nn.Linear(start.shape[1], start.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(start.detach().clone())
    return layer


def _rows(states: Sequence[Tensor]) -> Tensor:
    return torch.cat([hidden.flatten(0, -2) for hidden in states])


def _inputs(calls: Calls) -> Tensor:
    return _rows([hidden for hidden, _, _ in calls.inputs])


def _replaced(hidden: Tensor, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a block's arguments with other hidden states."""
    if inputs:
        return (hidden, *inputs[1:]), named
    return inputs, {**named, "hidden_states": hidden}
