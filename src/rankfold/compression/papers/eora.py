"""EoRA: what a compressed weight lost is given back by a product that the inputs weigh, without training.

    dW = W - W_c,   C = X^T X / n,   min over rank r of ||(dW - B A) C^(1/2)||,   y = W_c x + B A x
    dW C^(1/2) = U S V^T,   B = U_r S_r^(1/2),   A = S_r^(1/2) V_r^T C^(-1/2)

Liu et al. 2024. W_c is the weight of a model that was compressed by any means: quantised, pruned, or in
factors of Rankfold, whose products then take B and A up as further ranks. `original` holds W. Calibration
is sequential: the inputs of a weight come from the layers that are compensated before it. With W_c = 0 it is
SVD-LLM, with C = I a plain SVD of dW.

rank = 128, as in most of the paper's tables; 64 to 256 samples of the task that comes next. The official code
replaces negative eigenvalues of C only and divides by the zero ones; here nothing is divided.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ...errors import BaseMismatch, InvalidOption
from ...layers import StructuredLayer, adaptation_of, remove, require
from ...linalg import LowRank, RootGram, weighted_low_rank
from ...methods.replace import replace
from ...statistics import sequentially
from ...statistics.finite import require_finite
from ...statistics.statistics import WeightStatistics
from ...statistics.watched import Watched, layers_at, watch
from ...weights import Pair
from ...weights.kernels import at_least_float32
from ...weights.weight import tick
from ..registry import compressor
from ..report import Row, sampled, spacing
from ..task import Task, require_tokens


@compressor(
    "eora",
    title="EoRA: Fine-tuning-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation",
    year=2024,
    arxiv="2410.21271",
    code="NVlabs/EoRA",
    formula="W_c + B A,   B A = [(W - W_c) C^(1/2)]_r C^(-1/2)",
    whole=True,
    shrinks=False,
    compensates=True,
    example={"rank": 4},
)
def eora(task: Task, *, rank: int = 128, damping: float = 0.0) -> None:
    """Compensate a compressed model.

    Args:
        task: the compressed model and the original.
        rank: r >= 1, of every weight, at most min(out, in).
        damping: d >= 0; C + d mean(diag C) I, which helps where calibration data are few.

    Example:
        >>> import copy, torch, rankfold as rf
        >>> model, inputs = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(32, 8)
        >>> rounded = copy.deepcopy(model)
        >>> _ = rounded[0].weight.data.mul_(4).round_().div_(4)
        >>> rf.compress(rounded, "eora", original=model, data=[inputs], rank=2, progress=False)[0].expression
        W0[8x8] + (up*[8x2] @ down*[2x8])
    """
    if rank < 1:
        raise InvalidOption(f"eora: rank must be at least 1, not {rank}")
    originals = _originals(task)
    shapes = {path: layer.shape for path, layer in originals.items()}
    ranks = {path: min(rank, *shape) for path, shape in shapes.items()}
    factorised = adaptation_of(task.model) is not None
    if not factorised:
        zeros = {p: _zeros(*shapes[p], r) for p, r in ranks.items()}
        replace(
            task.model,
            ("lora", {"alpha": float(rank)}),
            ranks,
            zeros.__getitem__,
            seed=task.seed,
            reference=rank,
        )
    before: list[tuple[StructuredLayer, Tensor, Tensor]] = []
    try:
        for path, layer, near in _compensations(task, originals, ranks, damping):
            before.append((layer, *_factors(layer)))
            _put(layer, *near.split(_pair(layer).scale), further=factorised)
            task.report.rows.append(_row(path, layer, near))
    except BaseException:
        if not factorised:
            remove(task.model)
        for layer, up, down in before if factorised else ():
            _pair(layer).owner.resize(up, down)
        raise
    adapter = require(task.model).adapter()
    for path in ranks:
        adapter.record["ranks"][path] = _factors(task.model.get_submodule(path))[1].shape[0]


def _zeros(out: int, columns: int, rank: int) -> dict[str, Tensor]:
    return {"up": torch.zeros(out, rank), "down": torch.zeros(rank, columns)}


def _compensations(
    task: Task, originals: Mapping[str, StructuredLayer], ranks: Mapping[str, int], damping: float
) -> Iterator[tuple[str, StructuredLayer, LowRank]]:
    """Yield the product for every weight, with inputs from behind those that are in place."""
    groups = sequentially(
        task.model, task.batches(), "input_gram", targets=list(originals), loss=task.loss,
        progress=task.progress, seed=task.seed,
    )  # fmt: skip
    for paths, found in groups:
        for path in paths:
            require_tokens(task, path, originals[path].shape[1], found[path].tokens)
            layer = task.model.get_submodule(path)
            assert isinstance(layer, StructuredLayer)
            yield path, layer, _found(layer, originals[path], found[path], ranks[path], damping)


def _originals(task: Task) -> dict[str, StructuredLayer]:
    """Return the weights of the original model, by path, checked against those of the compressed one."""
    if task.original is None:
        raise InvalidOption(
            "eora compensates a compressed model; pass the model as it was before as original="
        )
    compressed = _compensated(task)
    originals = layers_at(task.original, compressed)
    for path, weight in compressed.items():
        if path not in originals or originals[path].shape != weight.layer.shape:
            there = "nothing" if path not in originals else "x".join(map(str, originals[path].shape))
            here = "x".join(map(str, weight.layer.shape))
            raise BaseMismatch(f"eora: {path} is {here} in the compressed model and {there} in the original")
        require_finite(originals[path].matrix().detach(), f"{path}: the weight of the original")
    return {path: originals[path] for path in compressed}


def _compensated(task: Task) -> dict[str, Watched]:
    """Return the targeted weights; where some are products already, those, which can take further ranks."""
    found = {weight.path: weight for weight in watch(task.model, task.targets)}
    if adaptation_of(task.model) is None:
        return found
    products = {path: weight for path, weight in found.items() if weight.layer.expression is not None}
    if not products:
        raise InvalidOption("eora: none of the targeted weights is a product; rankfold.fold(model) first")
    if len(products) < len(found):
        plain = ", ".join(path for path in found if path not in products)
        task.report.notes.append(f"not compensated, since they are no products: {plain}")
    return products


@torch.no_grad()
def _found(
    layer: StructuredLayer, original: StructuredLayer, statistics: WeightStatistics, rank: int, damping: float
) -> LowRank:
    """Return the best product for W - W_c where the inputs weigh it."""
    assert layer.expression is not None
    weight = original.matrix().detach()
    lost = weight.to(at_least_float32(weight)) - layer.expression.dense().to(at_least_float32(weight))
    return weighted_low_rank(lost, rank, right=RootGram(statistics.get("input_gram")), damping=damping)


def _pair(layer: nn.Module) -> Pair:
    assert isinstance(layer, StructuredLayer)
    assert layer.expression is not None
    return next(iter(layer.expression.pairs()))


def _factors(layer: nn.Module) -> tuple[Tensor, Tensor]:
    pair = _pair(layer)
    return pair.up.tensor().detach(), pair.down.tensor().detach()


@torch.no_grad()
def _put(layer: StructuredLayer, up: Tensor, down: Tensor, *, further: bool) -> None:
    """Let a product have these values, or take them up as further ranks where it was there before."""
    old_up, old_down = _factors(layer)
    up, down = up.to(old_up), down.to(old_down)
    if further:
        up, down = torch.cat([old_up, up], 1), torch.cat([old_down, down], 0)
    _pair(layer).owner.resize(up, down)
    tick()


def _row(path: str, layer: StructuredLayer, near: LowRank) -> Row:
    assert layer.expression is not None
    out, columns = layer.shape
    size = max(float(near.spectrum.norm()), 1e-300)
    kept = layer.expression.count().stored + (0 if layer.is_released else out * columns)
    note = "error relative to what was lost, in the outputs"
    return Row(
        path,
        (out, columns),
        near.rank,
        kept,
        near.error / size,
        0.0,
        sampled(near.spectrum),
        note,
        spacing(near.spectrum),
    )
