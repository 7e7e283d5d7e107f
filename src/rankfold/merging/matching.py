"""Matching the hidden units of models: which unit of one does what a unit of the other does.

Weight matching (Ainsworth et al. 2022) looks for the permutations that bring the weights closest together,

    max_P sum_l <W_l^A, P_l W_l^B P_{l-1}^T> + <b_l^A, P_l b_l^B>,

which is the same as the smallest distance ||th_A - th_B'||, by coordinate ascent: all tensors on which a
permutation acts enter its matrix M (units, units), the others held, and a linear assignment maximises
<M, P>. Activation matching takes M = Z_A Z_B^T, of the units' values Z (units, samples), instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption, MissingDependency
from ..optim.seeds import hashed
from ..statistics.batches import Batch, Loss, check_batches, loss_of, prepared
from ..statistics.calibrating import calibrating, hooks
from .permutations import Axis, Orders, Specification, named_tensors, permuted, shared, specified
from .symmetries import specification

Read: TypeAlias = Callable[[str], Tensor]
Given: TypeAlias = Specification | Mapping[str, Sequence[Any]] | None

# A gain below this share of the largest that a permutation could have is rounding.
_GAIN = 1e-12
_MEASURED = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Matching:
    """What a search found.

    Attributes:
        orders: for each permutation, which unit of the matched model comes to each place (units,).
        objectives: <th_A, th_B'> over all tensors that move, before the first sweep and after each.
        converged: whether the last sweep moved nothing.
    """

    orders: Orders
    objectives: tuple[float, ...]
    converged: bool


@torch.no_grad()
def match(
    reference: Read,
    model: Read,
    spec: Specification,
    *,
    seed: int = 0,
    sweeps: int = 100,
    start: Orders | None = None,
) -> Matching:
    """Find the permutations that bring a model's weights closest to a reference.

    Args:
        reference: returns a tensor of A by its name.
        model: returns a tensor of B by its name.
        spec: which permutation acts where; running statistics follow, but do not count.
        seed: of the order in which the permutations take their turns, sweep by sweep.
        sweeps: the most passes over all permutations, at least 1.
        start: where the search begins; None is the identity.

    Raises:
        InvalidOption: there is no sweep to make.
        Incompatible: a tensor holds NaN or infinite entries.
        MissingDependency: scipy is not installed.

    Example:
        >>> import torch
        >>> a = {"up": torch.eye(3), "down": torch.ones(1, 3)}
        >>> spec = specified({"up": ["h", None], "down": [None, "h"]}, {"up": (3, 3), "down": (1, 3)})
        >>> b = {"up": torch.eye(3)[[1, 2, 0]], "down": torch.ones(1, 3)}
        >>> match(a.__getitem__, b.__getitem__, spec).orders["h"].tolist()
        [2, 0, 1]
    """
    if sweeps < 1:
        raise InvalidOption(f"weight-matching: sweeps must be at least 1, not {sweeps}")
    search = _Search(reference, model, spec, dict(start or spec.identity()))
    generator = torch.Generator().manual_seed(hashed(seed, "weight-matching"))
    objectives, converged = [search.objective()], False
    names = list(spec.units)
    while len(objectives) <= sweeps and not converged:
        turns = torch.randperm(len(names), generator=generator).tolist()
        gains = [search.improve(names[turn]) for turn in turns]
        objectives.append(objectives[-1] + sum(gains))
        converged = not any(gains)
    return Matching(search.orders, tuple(objectives), converged)


class _Search:
    """Coordinate ascent, one permutation at a time; tensors are read when they are needed, in float64."""

    def __init__(self, reference: Read, model: Read, spec: Specification, orders: dict[str, Tensor]) -> None:
        self.reference, self.model, self.spec, self.orders = reference, model, spec, orders
        names = [name for name in spec.tensors if not name.endswith(_MEASURED)]
        self.tensors: dict[str, list[tuple[str, int, Axis]]] = {name: [] for name in spec.units}
        for name in names:
            for dim, axis in spec.places(name):
                self.tensors[axis.permutation].append((name, dim, axis))
        self.settled: set[str] = set()  # those whose M has not changed since they had their best order

    def objective(self, names: Iterable[str] | None = None) -> float:
        """Return <th_A, th_B'> over some tensors, or all that move."""
        moved = dict.fromkeys(name for places in self.tensors.values() for name, _, _ in places)
        return sum(self._product(name) for name in (moved if names is None else names))

    def improve(self, permutation: str) -> float:
        """Give one permutation its best order for the others' present ones; return the gain."""
        if permutation in self.settled:
            return 0.0
        self.settled.add(permutation)
        gain = self._improved(permutation)
        if gain:
            self.settled -= self._neighbours(permutation)
        return gain

    def _neighbours(self, permutation: str) -> set[str]:
        """Return the permutations in whose M this one occurs: they act on other axes of its tensors."""
        return {
            axis.permutation
            for name, own, _ in self.tensors[permutation]
            for dim, axis in self.spec.places(name)
            if dim != own
        }

    def _improved(self, permutation: str) -> float:
        similar = self._similarity(permutation)
        old, new = self.orders[permutation], assigned(similar)
        rows = torch.arange(len(old))
        gain = float(similar[rows, new].sum() - similar[rows, old].sum())
        smallest = _GAIN * len(old) * float(similar.abs().max())
        if not gain > smallest:
            return 0.0
        names = [name for name, _, _ in self.tensors[permutation]]
        if len(names) == len(set(names)):
            self.orders[permutation] = new
            return gain
        # On a tensor that it moves along two axes the objective is quadratic: M only proposes.
        before = self.objective(set(names))
        self.orders[permutation] = new
        gain = self.objective(set(names)) - before
        if gain > smallest:
            return gain
        self.orders[permutation] = old
        return 0.0

    def _similarity(self, permutation: str) -> Tensor:
        """Return M (units, units): what each unit of B brings at each place of A."""
        units = self.spec.units[permutation]
        total = torch.zeros(units, units, dtype=torch.float64)
        for name, dim, axis in self.tensors[permutation]:
            mine = self.reference(name).double()
            other = self.spec.permuted(name, self.model(name).to(mine), self.orders, but=dim)
            product = axis.unfolded(mine, dim) @ axis.unfolded(other, dim).T
            if not bool(product.isfinite().all()):
                raise Incompatible(f"{name} holds NaN or infinite entries in one of the models")
            total += product.cpu()
        return total

    def _product(self, name: str) -> float:
        mine = self.reference(name).double()
        other = self.spec.permuted(name, self.model(name).to(mine), self.orders)
        return float((mine * other).sum())


def assigned(similar: Tensor) -> Tensor:
    """Return the order of the units of B, one for each place of A, with the largest total similarity.

    Args:
        similar: M (units, units), a row for each unit of A and a column for each of B.

    Raises:
        MissingDependency: scipy is not installed.

    Example:
        >>> assigned(torch.tensor([[0.0, 2.0], [1.0, 2.5]])).tolist()
        [1, 0]
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingDependency(
            "matching hidden units needs the library scipy: pip install 'rankfold[solvers]'"
        ) from None
    _, columns = linear_sum_assignment(similar.numpy(), maximize=True)
    return torch.from_numpy(columns).long()


@torch.no_grad()
def match_many(
    models: Sequence[Read], spec: Specification, *, seed: int = 0, sweeps: int = 100
) -> list[dict[str, Tensor]]:
    """Find the permutations that bring several models together (MergeMany).

    Each model is matched to the running mean of those before it; with more than two, then each in turn, in a
    random order, to the mean of all the others, until none moves. The result is told in the places of the
    first model, whose orders are the identity.

    Args:
        models: each returns a tensor of one model by its name.
        spec: which permutation acts where.
        seed: of all orders.
        sweeps: the most passes, of each search and over the models.

    Raises:
        InvalidOption: there is no sweep to make.
        MissingDependency: scipy is not installed.
    """
    found = [spec.identity() for _ in models]

    def moved(which: int, name: str) -> Tensor:
        return spec.permuted(name, models[which](name).double(), found[which])

    def improve(which: int, others: Sequence[int]) -> bool:
        def mean(name: str) -> Tensor:
            return torch.stack([moved(other, name) for other in others]).mean(0)

        search = match(mean, models[which], spec, seed=seed, sweeps=sweeps, start=found[which])
        found[which] = dict(search.orders)
        return search.objectives[-1] > search.objectives[0]

    for which in range(1, len(models)):
        improve(which, range(which))
    generator = torch.Generator().manual_seed(hashed(seed, "merge-many"))
    for turn in count() if len(models) > 2 else ():
        order = torch.randperm(len(models), generator=generator).tolist()
        changes = [improve(which, [other for other in order if other != which]) for which in order]
        if not any(changes) or turn + 1 == sweeps:
            break
    back = {name: order.argsort() for name, order in found[0].items()}
    return [{name: order[back[name]] for name, order in orders.items()} for orders in found]


def match_activations(
    reference: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    spec: Specification,
    *,
    loss: Loss | None = None,
) -> dict[str, Tensor]:
    """Find the permutations by which hidden units do the same on data: M = Z_A Z_B^T.

    The units' values are read where the next layer takes them in, after the activation.

    Args:
        reference: A.
        model: B, of the same architecture.
        batches: what both are called with: a mapping by keywords, a tuple by position, else one argument.
        spec: which permutation acts where.
        loss: calls a model on a batch that holds more than its arguments; None calls it itself.

    Raises:
        Incompatible: the layers that take some units in saw nothing.
        MissingDependency: scipy is not installed.
    """
    check_batches(batches)
    units = {name: torch.zeros(size, size, dtype=torch.float64) for name, size in spec.units.items()}
    device = next(reference.parameters()).device
    for index, content in enumerate(batches):
        batch = prepared(index, content, device, None)
        mine, other = (_seen(one, batch, spec, loss) for one in (reference, model))
        for place, (name, values) in mine.items():
            units[name] += (values @ other[place][1].to(values).T).cpu()
    silent = next((name for name, similar in units.items() if not similar.any()), None)
    if silent is not None:
        raise Incompatible(
            "activation matching: data= holds no batch, or no layer of a known kind takes in the units "
            f"{silent!r}"
        )
    return {name: assigned(similar) for name, similar in units.items()}


def _seen(
    model: nn.Module, batch: Batch, spec: Specification, loss: Loss | None
) -> dict[str, tuple[str, Tensor]]:
    """Return, for each layer that takes hidden units in, their permutation and values (units, samples)."""
    seen: dict[str, tuple[str, Tensor]] = {}

    def watch(path: str, axis: Axis, dim: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[path] = (axis.permutation, axis.unfolded(inputs[0].detach().double(), dim))

        return hook

    with calibrating(model, ()), torch.no_grad(), hooks() as handles:
        for path, layer in model.named_modules():
            dim = _input_dim(layer)
            axis = dict(spec.places(f"{path}.weight" if path else "weight")).get(dim)
            if axis is not None:
                at = 1 if dim == 1 and not isinstance(layer, nn.Linear) else -1
                handles.append(layer.register_forward_pre_hook(watch(path, axis, at)))
        loss_of(model, batch, loss, needed=False)
    return seen


def _input_dim(layer: nn.Module) -> int:
    """Return which axis of a layer's weight its inputs are, or -1 where it is no projection."""
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return 1
    return 0 if type(layer).__name__ == "Conv1D" else -1


def matched(
    model: nn.Module,
    *,
    to: nn.Module,
    spec: Given = None,
    data: Iterable[Any] | None = None,
    residual: bool = False,
    sweeps: int = 100,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model whose hidden units stand where those of another one do the same.

    It computes what the model computes. Weights are matched, or activations where data are given.

    Args:
        model: B.
        to: A, of the same architecture.
        spec: which permutation acts where, as `specified` takes it; None finds it by the architecture.
        data: batches, for activation matching.
        residual: move the residual stream too.
        sweeps: the most passes over all permutations.
        seed: of their turns.

    Raises:
        Incompatible: the models have other tensors, or one holds NaN.
        UnsupportedLayer: the architecture is not known and no `spec` is given.
        InvalidOption: `spec` does not fit the model, or there is no sweep to make.
        MissingDependency: scipy is not installed.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2))
        >>> spec = specification(model)
        >>> shuffled = permuted(model, spec, spec.drawn())
        >>> torch.equal(matched(shuffled, to=model)[0].weight, model[0].weight)
        True
    """
    mine, other = ({n: t.detach() for n, t in named_tensors(one).items()} for one in (to, model))
    for name in {**mine, **other}:
        shapes = [tuple(state[name].shape) if name in state else "missing" for state in (mine, other)]
        if shapes[0] != shapes[1]:
            raise Incompatible(f"the models differ: {name} is {shapes[0]} in one, {shapes[1]} in the other")
    full = specification_of(to, spec, residual=residual)
    if data is not None:
        return permuted(model, full, match_activations(to, model, data, full))
    once = full.only(name for name, _ in (*to.named_parameters(), *to.named_buffers()))
    search = match(mine.__getitem__, other.__getitem__, once, seed=seed, sweeps=sweeps)
    return permuted(model, full, search.orders)


def specification_of(model: nn.Module, spec: Given, *, residual: bool = False) -> Specification:
    """Return the specification that was given for a model, checked, or the one of its architecture.

    Raises:
        UnsupportedLayer: the architecture is not known and no `spec` is given.
        InvalidOption: `spec` does not fit the model, or is given together with `residual`.
    """
    if spec is None:
        return specification(model, residual=residual)
    if residual:
        raise InvalidOption(
            "residual: spec= already says which permutation acts where; leave one of them out"
        )
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    return shared(specified(spec, shapes), model)
