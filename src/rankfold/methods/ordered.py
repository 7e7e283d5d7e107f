"""Training products so that their terms come out ordered, and taking the first ones: what MAESTRO does.

    HGL = sum_b ||U[:, b:]||_F + ||V[:, b:]||_F,   I_b = ||U[:, b:]||_F ||V[:, b:]||_F,   b = 1 .. R

Horvath et al. 2023. In every step one weight of the model is cut to its first b terms, the pair (weight, b)
drawn uniformly from all; I is non-increasing, so that cutting what is below a threshold leaves a prefix.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import Incompatible, InvalidOption, NotAdapted
from ..layers import require
from ..layers.riders import is_ridden
from ..optim import resize as resize_state
from ..weights import Ordered
from ..weights.weight import tick
from .limits import in_range
from .rules import Dynamics
from .run import Run


@dataclass(kw_only=True)
class OrderedDropout(Dynamics):
    """One weight is cut in every step, tails are penalised, and those that have vanished are dropped.

    Args:
        penalty: lambda of HGL, at least 0.
        threshold: eps; terms from the first b on with I_b < eps are dropped.
        interval: steps between two droppings, at least 1.
    """

    penalty: float = 5e-3
    threshold: float = 1e-5
    interval: int = 1000

    def __post_init__(self) -> None:
        in_range("maestro", "[0, inf)", penalty=self.penalty, threshold=self.threshold)
        in_range("maestro", "[1, inf)", interval=self.interval)

    def watch(self, run: Run) -> Sequence[RemovableHandle]:
        """Cut a weight for the step to come, again where the optimizer loads another step."""
        scope = run.scope

        def loaded(optimizer: Optimizer) -> None:
            run.enter(scope)
            cut_one(run)

        cut_one(run)
        return [run.optimizer.register_load_state_dict_post_hook(loaded)]

    def gradients_ready(self, run: Run) -> None:
        """Add the gradient of the penalty."""
        for weight in trained_weights(run):
            for tensor, axis in factors(weight):
                if tensor.grad is not None and self.penalty:
                    tensor.grad.add_(self.penalty * lasso_gradient(tensor, axis))

    def stepped(self, run: Run) -> None:
        """Drop the terms that have vanished, and cut a weight for the next step."""
        if run.step % self.interval == 0:
            for weight in trained_weights(run):
                self.shrink(run, weight)
        cut_one(run)

    def shrink(self, run: Run, weight: Ordered) -> None:
        """Keep the terms of a weight up to the last that matters, and the first in any case."""
        width = max(1, int((importance(weight) >= self.threshold).sum()))
        if width < weight.width:
            for tensor, axis in factors(weight):
                resize_state(run.optimizer, tensor, axis, torch.arange(width))
            weight.keep_first(width)

    def finish(self, run: Run) -> None:
        """Let all terms take part again."""
        for weight in ordered_weights(run).values():
            weight.cut(None)


def cut_one(run: Run) -> None:
    """Cut one weight to its first b terms, (weight, b) drawn uniformly for this step."""
    widths = [weight.width for weight in trained_weights(run)]
    place = int(torch.randint(max(1, sum(widths)), (1,), generator=run.generator("cut")))
    for weight in ordered_weights(run).values():
        width = weight.width if is_trained(weight) else 0
        weight.cut(place + 1 if 0 <= place < width else None)
        place -= width


def ordered_weights(run: Run) -> dict[str, Ordered]:
    """Return the weights by path."""
    return {path: w for path, w in run.expressions.items() if isinstance(w, Ordered)}


def trained_weights(run: Run) -> list[Ordered]:
    """Return the weights that nobody has frozen."""
    return [weight for weight in ordered_weights(run).values() if is_trained(weight)]


def is_trained(weight: Ordered) -> bool:
    """Say whether gradients reach a weight."""
    return all(tensor.requires_grad for tensor, _ in factors(weight))


def factors(weight: Ordered) -> list[tuple[Tensor, int]]:
    """Return up and down, each with the axis of its terms."""
    up, down = weight.factors
    return [(up.dense(), 1), (down.dense(), 0)]


def tail_norms(factor: Tensor, axis: int) -> Tensor:
    """Return ||factor from term b on||_F for b = 1 .. R, (R,).

    Example:
        >>> tail_norms(torch.tensor([[0.0, 3.0, 4.0]]), 1)
        tensor([5., 5., 4.])
    """
    return factor.detach().square().sum(1 - axis).flip(0).cumsum(0).flip(0).sqrt()


def lasso_gradient(factor: Tensor, axis: int) -> Tensor:
    """Return the gradient of `tail_norms(factor, axis).sum()`, zero for a tail of zeros.

    Term j is in the tails 1 .. j: its gradient is itself times sum_{b <= j} 1 / norm_b.
    """
    norms = tail_norms(factor, axis)
    weights = torch.where(norms > 0, 1 / norms, 0).cumsum(0)
    return factor.detach() * (weights if axis == 1 else weights[:, None])


def importance(weight: Ordered) -> Tensor:
    """Return I (R,), which never increases."""
    (up, outer), (down, inner) = factors(weight)
    return tail_norms(up, outer) * tail_norms(down, inner)


# The loss of both passes --------------------------------------------------------------------------------


def maestro_loss(
    model: nn.Module, batch: Any, logits: Callable[[nn.Module, Any], Tensor] | None = None
) -> Tensor:
    """Return cross-entropy of the whole model, and of the cut one with what the whole one says.

        L = CE(whole(x), target) + CE(cut(x), softmax(whole(x)))

    Without it the loss of the cut model is what trains.

    Args:
        model: adapted by maestro, attached to its optimizer and in training mode.
        batch: with `labels` (batch,), or (batch, token) of the next tokens, -100 where there is none.
        logits: `logits(model, batch)` returns (batch, class) or (batch, token, class); by default those of
            `model(**batch)`.

    Raises:
        NotAdapted: nothing in the model is cut.
        InvalidOption: the batch has no labels.
        Incompatible: the model checkpoints gradients, and would repeat the first of the two forwards with the
            cut of the second.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 3)), "maestro")
        >>> batch = {"x": torch.ones(4, 8), "labels": torch.arange(4) % 3}
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with rf.attach(model, optimizer):
        ...     rf.maestro_loss(model, batch, lambda model, batch: model(batch["x"])).backward()
        ...     optimizer.step()
    """
    found = [w for w in _ordered(model) if w.is_cut]
    if not found:
        raise NotAdapted("nothing is cut: adapt with maestro, attach its optimizer, and call model.train()")
    if "labels" not in batch:
        raise InvalidOption("maestro_loss reads batch['labels']")
    if getattr(model, "is_gradient_checkpointing", False):
        raise Incompatible(
            "gradient checkpointing would repeat the whole pass as a cut one; disable it, or train the loss "
            "of the cut pass alone"
        )
    read = logits or _logits
    with _whole(found):
        whole = read(model, batch)
    cut, labels = read(model, batch), batch["labels"]
    if whole.dim() == 3:
        whole, cut, labels = whole[:, :-1].flatten(0, 1), cut[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    counts = labels != -100
    soft = F.cross_entropy(cut[counts], whole[counts].detach().softmax(-1))
    return F.cross_entropy(whole, labels) + soft


def _logits(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(**batch).logits
    return result


def _ordered(model: nn.Module) -> list[Ordered]:
    adaptation = require(model)
    used = [w for name in adaptation.active for w in adaptation.expressions(name).values()]
    return [weight for weight in used if isinstance(weight, Ordered)]


@contextlib.contextmanager
def _whole(weights: list[Ordered]) -> Iterator[None]:
    for weight in weights:
        weight.take_whole(True)
    try:
        yield
    finally:
        for weight in weights:
            weight.take_whole(False)


# Taking a prefix ----------------------------------------------------------------------------------------


@torch.no_grad()
def keep_prefix(
    model: nn.Module, widths: float | Mapping[str, int], data: Iterable[Any] | None = None
) -> nn.Module:
    """Keep the first terms of every weight of a model that maestro has trained, in place.

    `rankfold.fold` then makes plain layers of it; where r (out + in) > out in those are the smaller form.

    Args:
        model: adapted by maestro, its training ended.
        widths: how many terms, a number for all weights or by path; a fraction below 1 is a share of each.
        data: batches to estimate the statistics of batch normalisation from again, as `adapt` takes them;
            None keeps those of the whole model.

    Returns:
        The model.

    Raises:
        NotAdapted: maestro is not in use.
        Incompatible: its training is still attached to an optimizer.
        InvalidOption: a width is not positive, or a path is no weight of it.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), "maestro")
        >>> rf.keep_prefix(model, 2)[0].expression
        up*[6x2] @ down*[2x8]
    """
    adaptation = require(model)
    used = [entry for name in adaptation.active for entry in adaptation.expressions(name).items()]
    found = {path: weight for path, weight in used if isinstance(weight, Ordered)}
    if not found:
        raise NotAdapted("the model has no weights whose terms are ordered: adapt it with maestro")
    if any(is_ridden(adaptation.adapter(name)) for name in adaptation.active):
        raise Incompatible("the optimizer still trains all terms: remove() the handle that attach returned")
    chosen = widths if isinstance(widths, Mapping) else dict.fromkeys(found, widths)
    unknown = [path for path in chosen if path not in found]
    if unknown:
        raise InvalidOption(f"{unknown[0]!r} is no weight of maestro; there are {', '.join(found)}")
    counts = {path: _width(found[path], wanted) for path, wanted in chosen.items()}
    for path, width in counts.items():
        found[path].keep_first(width)
    tick()
    if data is not None:
        estimate_again(model, data)
    return model


def _width(weight: Ordered, wanted: float) -> int:
    if not (math.isfinite(wanted) and wanted > 0):
        raise InvalidOption(f"a width must be positive, not {wanted}")
    width = math.ceil(wanted * weight.width) if wanted < 1 else int(wanted)
    return min(width, weight.width)


@torch.no_grad()
def estimate_again(model: nn.Module, data: Iterable[Any]) -> None:
    """Set running means and variances of batch normalisation to their average over batches."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    before, modes = [norm.momentum for norm in norms], [(m, m.training) for m in model.modules()]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    try:
        for batch in data:
            model(**batch) if isinstance(batch, Mapping) else model(*batch)
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
