"""Weight matching (Git Re-Basin): hidden units find their counterparts, then the models are interpolated.

    max_P sum_l <W_l^A, P_l W_l^B P_{l-1}^T> + <b_l^A, P_l b_l^B>
    M_l = W_l^A P_{l-1} (W_l^B)^T + (W_{l+1}^A)^T P_{l+1} W_{l+1}^B + b_l^A (b_l^B)^T,  P_l = argmax <M_l, P>
    th* = sum_t w_t th_t' / sum_t w_t

Ainsworth et al. 2022. P_l (n_l, n_l) permutes the units of layer l; the networks compute the same with their
units in another order. The P_l take their turns in a random order, sweep after sweep (at most 100), until no
assignment gains anything; no data are needed. With activation matching M_l = Z_A Z_B^T, of the units' values
on data. With w = (1 - c, c) it is the point c on the line between two models; 1 each gives their middle. More
than two models are matched each to the running mean of those before it, then in turn to the mean of the
others (MergeMany).

Running statistics of batch norms follow their units, but their mean is not what the merged model needs: pass
data=, and they are measured anew.

Deviations: a gain below 1e-12 of the largest that is possible counts as rounding, where the paper's code
compares with 1e-12 itself; on a tensor that one permutation moves along two axes, where M is a heuristic, an
assignment is taken only if it gains; MergeMany starts from running means, and tells its result in the places
of the first model; activations match each model to the first. The straight-through estimator is left out.

Use it to merge models that do not come from one base, such as runs from several seeds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import Incompatible, InvalidOption
from ...methods.limits import one_of
from ..connectivity import reset_statistics
from ..matching import match_activations, match_many
from ..permutations import Orders, Specification, named_tensors, specified, ties
from ..registry import merger
from ..sources import Sources
from ..symmetries import specification

_NEEDS_DATA = (
    "the models have batch norms, whose running statistics break the interpolation; pass data= to measure "
    "them anew, or call rankfold.merging.connectivity.reset_statistics on the merged model"
)


@merger(
    "weight-matching",
    title="Git Re-Basin: Merging Models modulo Permutation Symmetries",
    year=2022,
    arxiv="2209.04836",
    code="samuela/git-re-basin",
    formula="sum_t w_t P_t th_t, P_t = argmax <th_1, P th_t>",
    base="unused",
    whole=True,
)
def weight_matching(
    sources: Sources,
    *,
    spec: Mapping[str, Any] | None = None,
    by: str = "weights",
    residual: bool = False,
    sweeps: int = 100,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the interpolated models, after their units were matched to the first one's.

    Args:
        sources: the models.
        spec: for each tensor, axis by axis, the permutation that acts on it or None, or (name, units) where
            it moves blocks; None finds them by the architecture.
        by: weights or activations, which need data.
        residual: move the residual stream of a transformer too.
        sweeps: the most passes over all permutations.

    Raises:
        InvalidOption: an option is impossible, or the weights add up to nothing.
        Incompatible: activations are asked for without data.
        UnsupportedLayer: the architecture is not known and no `spec` is given.

    Example:
        >>> import torch
        >>> import rankfold as rf
        >>> from torch import nn
        >>> from rankfold.merging.permutations import permuted
        >>> from rankfold.merging.symmetries import specification
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> spec = specification(model)
        >>> shuffled = permuted(model, spec, spec.drawn())
        >>> merged = rf.merge([model, shuffled], "weight-matching", progress=False)
        >>> torch.equal(merged[0].weight, model[0].weight)
        True
    """
    one_of("weight-matching", ("weights", "activations"), by=by)
    full = _specification(sources, spec, residual)
    orders = _by_activations(sources, full) if by == "activations" else _by_weights(sources, full, sweeps)
    merged = _interpolated(sources, full, orders)
    if not any(name.endswith("running_mean") for name in sources.names):
        yield from merged
    elif sources.data is None:
        warnings.warn(_NEEDS_DATA, stacklevel=2)
        yield from merged
    else:
        model = sources.module(dict(merged))
        reset_statistics(model, sources.data, loss=sources.loss)
        found = named_tensors(model)
        yield from ((name, found[name].detach()) for name in sources.names)


def _specification(sources: Sources, spec: Mapping[str, Any] | None, residual: bool) -> Specification:
    if spec is None:
        model = sources.module()
        return _present(specification(model, residual=residual), sources.names, model)
    if residual:
        raise InvalidOption("residual: spec= already says which permutation acts where; leave one out")
    return specified(spec, {name: sources.read(0, name).shape for name in sources.names})


def _present(spec: Specification, names: Sequence[str], model: nn.Module) -> Specification:
    """Return a specification, all of whose tensors are there, under that name or one that is tied to it."""
    known = set(names)
    known.update(*(group for group in ties(model) if known.intersection(group)))
    missing = next((name for name in spec.tensors if name not in known), None)
    if missing is not None:
        raise Incompatible(
            f"{type(model).__name__} has the tensor {missing}, which the models' files do not hold under "
            "that name; pass spec= with the names that they use"
        )
    return spec


def _by_weights(sources: Sources, spec: Specification, sweeps: int) -> list[dict[str, Tensor]]:
    def reader(which: int) -> Any:
        return lambda name: sources.read(which, name)

    readers = [reader(which) for which in range(sources.count)]
    return match_many(readers, spec.only(sources.names), seed=sources.seed, sweeps=sweeps)


def _by_activations(sources: Sources, spec: Specification) -> list[Orders]:
    if sources.data is None:
        raise Incompatible("weight-matching: by='activations' compares hidden units on data; pass data=")
    batches = list(sources.data)
    models = [
        sources.module({name: sources.read(which, name) for name in sources.names})
        for which in range(sources.count)
    ]
    others = [match_activations(models[0], one, batches, spec, loss=sources.loss) for one in models[1:]]
    return [spec.identity(), *others]


def _interpolated(sources: Sources, spec: Specification, orders: list[Any]) -> Iterator[tuple[str, Tensor]]:
    total = sum(sources.weights)
    if not total:
        raise InvalidOption(f"weight-matching: the weights {list(sources.weights)} add up to nothing")
    for name in sources.names:
        moved = [spec.permuted(name, sources.read(t, name), order) for t, order in enumerate(orders)]
        shares = [weight / total for weight in sources.weights]
        yield name, torch.stack([share * one for share, one in zip(shares, moved, strict=True)]).sum(0)
