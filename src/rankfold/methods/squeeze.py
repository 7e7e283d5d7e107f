"""Squeezing trained products to smaller ranks through the QR decompositions of their factors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..formats.changes import Changes, read_changes
from ..layers import Adaptation, Adapter, require
from ..layers.riders import is_ridden
from ..optim import unwrapped
from ..statistics import Statistics, collect
from ..weights import Dense, Pair, Sum, Weight
from ..weights.weight import tick
from . import registry
from .recipe import Recipe, resolve
from .squeezing import Choice, Cut, SqueezeReport, Terms, terms_of
from .squeezing_state import check_holds, follow, forget, start_again

Data = Iterable[Any] | Statistics | None


@overload
def squeeze(
    model: nn.Module,
    rank: int | None = None,
    *,
    energy: float | None = None,
    max_error: float | None = None,
    share: str = "uniform",
    data: Data = None,
    name: str | None = None,
    optimizer: Any = None,
    report: SqueezeReport | None = None,
    progress: bool = True,
) -> nn.Module: ...
@overload
def squeeze(
    model: str | Path | Changes,
    rank: int | None = None,
    *,
    energy: float | None = None,
    max_error: float | None = None,
    share: str = "uniform",
    data: Data = None,
    base: nn.Module | None = None,
    out: str | Path | None = None,
    format: str = "peft",
    overwrite: bool = False,
    report: SqueezeReport | None = None,
    progress: bool = True,
) -> Changes: ...
@torch.no_grad()
def squeeze(
    model: nn.Module | str | Path | Changes,
    rank: int | None = None,
    *,
    energy: float | None = None,
    max_error: float | None = None,
    share: str = "uniform",
    data: Data = None,
    name: str | None = None,
    optimizer: Any = None,
    base: nn.Module | None = None,
    out: str | Path | None = None,
    format: str = "peft",
    overwrite: bool = False,
    report: SqueezeReport | None = None,
    progress: bool = True,
) -> nn.Module | Changes:
    """Cut the trained product of every adapted weight to a smaller rank: of a model in place, or of a file.

        change = s B diag(g) A (- s B0 A0 where the start is subtracted from the base),   s B' A' = [change]_r
        with data:  s B' A' = argmin over rank r of ||(change - s B' A') C^(1/2)||,   C = mean of x x^T

    LoRA-Squeeze (Vulic et al. 2026): the best approximation of that rank, exact, never forming a matrix of
    the weight's size. Gates are multiplied in, and a start that is subtracted becomes part of it, so that
    what remains is a plain product beside the stored weight (within the normalised sum of dora); the scaling
    s stays what it was. The rank rule of the recipe, if any, ends.

    The parameters stay the same objects. With `optimizer` its state follows: first moments exactly as the
    gradients do, `dB' = dB N^T` and `dA' = M^T dA` where `B' = B M` and `A' = N A`, second moments by the
    squares of these coefficients, gates leave, and what dynamics remember begins anew. Where a start was
    subtracted the gradients of its part are not known, and the moments and step counts of that weight are
    reset. Without `optimizer`, create one afterwards.

    Without rank, energy and max_error nothing is approximated: only terms that are zero, by their gate or a
    factor, are dropped, and a start that is subtracted stays. One term always remains, so that the adapter
    can train on.

    Args:
        model: an adapted model; or an adapter's folder or file, in any form that is read, or its `Changes`.
        rank: the most that a product keeps, at least 1.
        energy: share of each change's squared singular values to keep, in (0, 1]; the smallest such rank.
        max_error: largest relative error of each change, in (0, 1): `energy = 1 - max_error^2`.
        share: "uniform", or "error": `rank` is an average, and ranks minimise the sum of all weights' squared
            errors with no more numbers in their factors, sum of r (out + in), than that rank everywhere has.
        data: batches as `rankfold.collect` takes them, or its `Statistics` with "input_gram": errors, and
            what energy means, are those of the outputs on these inputs. The model runs as it is.
        name: of the adapter in a model; None takes the only or the active one.
        optimizer: of PyTorch's shape, holding the adapter's parameters.
        base: of a file: the model that it was made for, where its form or `data` needs that.
        out: of a file: a folder to write, complete or not at all.
        format: of `out`, "peft" or "portable".
        overwrite: replace the folder `out`.
        report: filled with every weight's rank before and after and its error.
        progress: whether calibration shows a bar on a terminal.

    Returns:
        The model, which is unchanged if an error is raised, or the squeezed `Changes` of a file.

    Raises:
        NotAdapted: the model holds no such adapter.
        InvalidRank: the rank is no whole number of at least 1.
        InvalidOption: an option is out of range or does not belong to what is squeezed, or the optimizer
            lacks the parameters.
        Incompatible: the structure has no trained product that can be squeezed.
        UnsupportedLayer: data are given for a layer whose inputs have no Gram matrix, such as an embedding.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(16, 8)), "lora", rank=4, targets="0")
        >>> _ = torch.nn.init.normal_(model[0].expression.leaf("up").value)
        >>> rf.squeeze(model, rank=2)[0].expression
        W0[8x16] + (up*[8x2] @ down*[2x16])
    """
    choice = Choice(rank=rank, energy=energy, max_error=max_error, share=share)
    if data is not None and not choice.approximates:
        raise InvalidOption("data= weighs what is approximated: pass rank=, energy= or max_error= with it")
    report = SqueezeReport() if report is None else report
    if isinstance(model, nn.Module):
        _refuse_given("a file", base=base, out=out)
        _squeeze_model(model, choice, name, optimizer, data, report, progress)
        return model
    _refuse_given("a model", name=name, optimizer=optimizer)
    if data is not None and base is None:
        raise InvalidOption("data= needs the model that the adapter was made for: pass base=")
    changes = _of_changes(model, choice, base, data, report, progress)
    if out is not None and changes.flattened and base is None:
        raise Incompatible(f"{changes.paths[0]} is a name that only the model undoes; pass it as base=")
    if out is not None:
        changes.save(out, format, overwrite=overwrite)
        report.path = str(out)
    return changes


def _refuse_given(of: str, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise InvalidOption(f"{name}= belongs to squeezing {of}; leave it away here")


Grams = Callable[[str], Tensor | None]


def _grams(model: nn.Module | None, data: Data, paths: list[str], progress: bool) -> Grams:
    """Return what gives the Gram matrix of a weight's inputs, one at a time; None without data."""
    if data is None or model is None:
        return lambda path: None
    if isinstance(data, Statistics):
        data.check(model)
        found = data
    else:
        found = collect(model, data, "input_gram", targets=paths, progress=progress)
    return lambda path: found[path].get("input_gram")


def _ranks(
    terms: Mapping[str, Terms], choice: Choice, scales: Mapping[str, float]
) -> Mapping[str, int | None]:
    """Return the rank of every weight, or None where nothing is approximated."""
    if not choice.approximates:
        return dict.fromkeys(terms)
    spectra = [terms[path].spectrum * abs(scales.get(path, 1.0)) for path in terms]
    shapes = [(each.factors[0].shape[0], each.factors[1].shape[1]) for each in terms.values()]
    return dict(zip(terms, choice.ranks(spectra, shapes), strict=True))


# Files --------------------------------------------------------------------------------------------------


def _of_changes(
    source: str | Path | Changes,
    choice: Choice,
    base: nn.Module | None,
    data: Data,
    report: SqueezeReport,
    progress: bool,
) -> Changes:
    changes = source if isinstance(source, Changes) else _read(source, base)
    paths = [path for path in changes.paths if changes.rank(path)]
    grams = _grams(base, data, paths, progress)
    terms = {path: _named(path, *changes.pairs[path], grams(path), choice.most) for path in paths}
    rows, pairs = {}, dict(changes.pairs)
    for path, rank in _ranks(terms, choice, {}).items():
        cut, error = terms[path].keep(rank)
        pairs[path] = (cut.up.to(pairs[path][0]), cut.down.to(pairs[path][1]))
        rows[path] = (terms[path].rank, cut.rank, error)
    report.fill(rows, weighted=data is not None)
    return replace(changes, pairs=pairs)


def _read(path: str | Path, base: nn.Module | None) -> Changes:
    try:
        return read_changes(path, model=base)
    except Incompatible as error:
        if base is None and "model=" in str(error):
            raise Incompatible(f"{error}, which squeeze takes as base=") from None
        raise


def _named(path: str, up: Tensor, down: Tensor, gram: Tensor | None, most: int | None) -> Terms:
    try:
        return terms_of(up, down, gram, most)
    except InvalidOption as error:
        raise InvalidOption(f"{path}: {error}") from None


# Models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Product:
    """The one product of a weight, as what is squeezed.

    Attributes:
        expression: of the weight.
        pair: its leaves.
        start: whether factors of a start that is subtracted stand among the terms.
        terms: of the whole change.
    """

    expression: Weight
    pair: Pair
    start: bool
    terms: Terms

    def keep(self, rank: int | None) -> tuple[Cut, float]:
        """Return the factors at a rank and their error; those of a start never stay as they are."""
        if self.start and rank is not None:
            return self.terms.at(rank), self.terms.error(rank)
        return self.terms.keep(rank)


def _squeeze_model(
    model: nn.Module,
    choice: Choice,
    name: str | None,
    optimizer: Any,
    data: Data,
    report: SqueezeReport,
    progress: bool,
) -> None:
    adaptation = require(model)
    if any(is_ridden(each) for each in adaptation.adapters.values()):
        raise Incompatible("dynamics are attached to an optimizer; remove() their handle before squeezing")
    adapter = adaptation.adapter(name)
    with _active(adaptation, adapter.name):
        expressions = adaptation.expressions(adapter.name)
        pairs = _pairs(adapter, expressions, choice.approximates)
        if optimizer is not None:
            check_holds(optimizer, pairs)
        grams = _grams(model, data, list(pairs), progress)
        products = {path: _product(path, *pair, grams(path), choice) for path, pair in pairs.items()}
        _put_all(adapter, products, choice, optimizer, report, weighted=data is not None)


@contextlib.contextmanager
def _active(adaptation: Adaptation, name: str) -> Iterator[None]:
    """Within the block an adapter is active, for only what is active is known to train."""
    active = adaptation.active
    if name not in active:
        adaptation.use([name])
    try:
        yield
    finally:
        if name not in active:
            adaptation.use(active)


def _put_all(
    adapter: Adapter,
    products: Mapping[str, _Product],
    choice: Choice,
    optimizer: Any,
    report: SqueezeReport,
    *,
    weighted: bool,
) -> None:
    """Work everything out, then change the model."""
    terms = {path: product.terms for path, product in products.items()}
    scales = {path: product.pair.scale for path, product in products.items()}
    kept = {path: products[path].keep(rank) for path, rank in _ranks(terms, choice, scales).items()}
    ranks = {path: cut.rank for path, (cut, _) in kept.items()}
    record = _recorded(adapter.record, ranks, choice.approximates)
    before = {path: int(product.pair.up.shape[1]) for path, product in products.items()}
    for path, product in products.items():
        _put(product, kept[path][0], optimizer, plain=choice.approximates)
    if optimizer is not None:
        forget(unwrapped(optimizer))
    adapter.record = record
    rows = {path: (before[path], cut.rank, error) for path, (cut, error) in kept.items()}
    report.fill(rows, weighted=weighted)
    tick()


def _pairs(adapter: Adapter, expressions: dict[str, Weight], plain: bool) -> dict[str, tuple[Weight, Pair]]:
    """Return the one product of every expression."""
    structure = registry.structure_named(adapter.record["recipe"]["structure"][0])
    found = {path: (expression, list(expression.pairs())) for path, expression in expressions.items()}
    single = found and all(len(pairs) == 1 for _, pairs in found.values())
    if not single or adapter.branches:
        raise Incompatible(
            f"squeeze cuts the one product of two trained factors in a weight; {structure.name} has none or "
            "several"
        )
    if plain and not all(pairs[0].additive for _, pairs in found.values()):
        raise Incompatible(
            f"the product in {structure.name} is not a term of the weight, so that cutting it is no best "
            "approximation; leave rank= away to drop terms that are zero"
        )
    return {path: (expression, pairs[0]) for path, (expression, pairs) in found.items()}


def _product(path: str, expression: Weight, pair: Pair, gram: Tensor | None, choice: Choice) -> _Product:
    """Return a product with its gate multiplied in and its start beside it, decomposed."""
    up, down = pair.up.tensor().detach(), pair.down.tensor().detach()
    if pair.gate is not None:
        down = pair.gate.tensor().detach()[:, None] * down
    start = _start(expression, pair) if choice.approximates else None
    if start is not None:
        up, down = torch.cat([up, -start[0]], 1), torch.cat([down, start[1]], 0)
    return _Product(expression, pair, start is not None, _named(path, up, down, gram, choice.most))


def _start(expression: Weight, pair: Pair) -> tuple[Tensor, Tensor] | None:
    """Return the factors of the start that is subtracted, or None."""
    frozen = {leaf.name: leaf.tensor().detach() for leaf in expression.leaves() if not leaf.trainable}
    up, down = (frozen.get(f"{leaf.name}.start") for leaf in (pair.up, pair.down))
    return None if up is None or down is None else (up, down)


def _put(product: _Product, cut: Cut, optimizer: Any, *, plain: bool) -> None:
    pair = product.pair
    if optimizer is not None:
        if product.start:
            start_again(unwrapped(optimizer), pair, cut.rank)
        else:
            follow(unwrapped(optimizer), pair, cut)
    if pair.gate is not None:
        pair.owner.remove_gate()
    pair.owner.resize(cut.up, cut.down)
    if plain:
        _drop_start(product.expression)


def _drop_start(expression: Weight) -> None:
    """Take terms out of sums that are made of start leaves only."""
    for module in expression.modules():
        if isinstance(module, Sum):
            kept = [term for term in module.terms if not _is_start(term)]
            module.terms = nn.ModuleList(kept)  # type: ignore[assignment]  # a registered sequence


def _is_start(term: Weight) -> bool:
    leaves = list(term.leaves())
    return bool(leaves) and all(isinstance(leaf, Dense) and leaf.name.endswith(".start") for leaf in leaves)


def _recorded(record: Mapping[str, Any], ranks: Mapping[str, int], plain: bool) -> dict[str, Any]:
    """Return a record that says what there is now."""
    recipe = Recipe.from_dict(record["recipe"])
    references = {**record["ranks"], **record.get("references", {})}
    init = _init_of(recipe, plain)
    return {
        **record,
        "recipe": resolve(Recipe(recipe.structure, init, None, recipe.dynamics), {}).recipe.to_dict(),
        "ranks": {**record["ranks"], **ranks},
        "references": {path: references[path] for path in ranks},
        "squeezed": True,
    }


def _init_of(recipe: Recipe, plain: bool) -> Any:
    """Return the initialiser of the record; the structure's own where the start is no longer part of it."""
    part = resolve(recipe, {}).recipe.init
    if part is None:
        return None
    gives = registry.get("init", part[0]).traits["gives"]
    gone = plain if "residual" in gives else not {"zero", "displaced"} & set(gives)
    return None if gone else part
