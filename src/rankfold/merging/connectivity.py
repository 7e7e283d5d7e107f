"""The line between two models: the loss along it, its barrier, and how well their singular vectors agree."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidOption, MissingDependency
from ..formats.files import complete_file
from ..methods.limits import in_range
from ..statistics.batches import Loss, check_batches, loss_of, prepared
from ..statistics.calibrating import calibrating

_BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Curve:
    """The loss on the line th(c) = (1 - c) th_A + c th_B.

    Attributes:
        shares: c, from 0 to 1.
        losses: at each of them.
    """

    shares: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def barrier(self) -> float:
        """The most by which the loss rises above the straight line between its ends; 0 where it never does.

        max_c L(th(c)) - (1 - c) L(th_A) - c L(th_B)
        """
        first, last = self.losses[0], self.losses[-1]
        pairs = zip(self.shares, self.losses, strict=True)
        return max(0.0, *(loss - (1 - share) * first - share * last for share, loss in pairs))


@dataclass(frozen=True)
class Connectivity:
    """What was measured between two models, before and after the second was matched to the first.

    Attributes:
        before: the loss on the line to the second model as it is.
        after: the loss on the line to the matched model.
        distances: ||th_A - th_B|| before and after.
        alignments: R by gamma: of A with B, of A with the matched B', and of A with the middle of A and B'.
    """

    before: Curve
    after: Curve
    distances: tuple[float, float]
    alignments: Mapping[float, tuple[float, float, float]]

    @property
    def distance_ratio(self) -> float:
        """What is left of the distance between the models; 1 where there was none."""
        before, after = self.distances
        return after / before if before else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return {
            "shares": list(self.before.shares),
            "losses": {"before": list(self.before.losses), "after": list(self.after.losses)},
            "barrier": {"before": self.before.barrier, "after": self.after.barrier},
            "distance": dict(zip(("before", "after"), self.distances, strict=True)),
            "alignment": {
                f"{gamma:g}": dict(zip(("before", "after", "merged"), found, strict=True))
                for gamma, found in self.alignments.items()
            },
        }

    def __str__(self) -> str:
        """Return the summary for a person."""
        rows = [
            f"barrier    {self.before.barrier:.4g} before matching, {self.after.barrier:.4g} after",
            f"distance   {self.distance_ratio:.1%} of what it was",
        ]
        for gamma, (before, after, merged) in self.alignments.items():
            rows.append(
                f"R({gamma:g})".ljust(11) + f"{before:.3f} before, {after:.3f} after, {merged:.3f} merged"
            )
        return "\n".join(rows)

    def save_picture(self, path: str | Path) -> None:
        """Draw the two curves, and the alignment against gamma.

        Args:
            path: of the picture; its suffix names the format, such as .png or .svg.

        Raises:
            MissingDependency: matplotlib is not installed.
            InvalidOption: matplotlib does not write such files.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingDependency(
                "a picture needs the library matplotlib: pip install 'rankfold[plots]'"
            ) from None
        figure = Figure(figsize=(9, 4), layout="constrained")
        line, alignment = figure.subplots(1, 2)
        for name, curve in (("before matching", self.before), ("after matching", self.after)):
            line.plot(curve.shares, curve.losses, marker="o", markersize=3, label=name)
        line.set(xlabel="share of the second model", ylabel="loss")
        for place, name in enumerate(("before matching", "after matching", "with the merged model")):
            values = [found[place] for found in self.alignments.values()]
            alignment.plot(list(self.alignments), values, marker="o", markersize=3, label=name)
        alignment.set(xlabel="gamma: least singular value / largest", ylabel="alignment R")
        for axes in (line, alignment):
            axes.grid(alpha=0.3)
            axes.legend()
        kind = Path(path).suffix[1:]
        if kind not in figure.canvas.get_supported_filetypes():
            raise InvalidOption(f"{path}: matplotlib writes no such pictures; name a .png, .svg or .pdf file")
        with complete_file(Path(path)) as partial:
            figure.savefig(partial, dpi=120, format=kind)


def loss_curve(
    first: nn.Module,
    second: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    points: int = 11,
) -> Curve:
    """Return the loss on the line between two models.

    Running statistics of batch norms, which are wrong between two models, are measured anew on the batches.

    Args:
        first: A.
        second: B, of the same architecture.
        batches: what the loss is the mean over.
        loss: of a model and a batch; None reads it off the model's output.
        points: how many, both ends included; at least 2.

    Raises:
        InvalidOption: there are too few points or no batches.
        Incompatible: there is no loss.

    Example:
        >>> import torch
        >>> ends = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
        >>> for model, value in zip(ends, (-1.0, 1.0)):
        ...     _ = torch.nn.init.constant_(model.weight, value)
        >>> curve = loss_curve(*ends, [torch.ones(4, 1)], loss=lambda m, x: (m(x).abs() - 1).square().mean())
        >>> curve.barrier
        1.0
    """
    in_range("lmc", "[2, inf)", points=points)
    check_batches(batches)
    batches = list(batches)
    shares = torch.linspace(0, 1, points, dtype=torch.float64).tolist()
    losses = []
    for share in shares:
        model = interpolated(first, second, share)
        if 0 < share < 1:
            reset_statistics(model, batches, loss=loss)
        losses.append(mean_loss(model, batches, loss=loss))
    return Curve(tuple(shares), tuple(losses))


@torch.no_grad()
def interpolated(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """Return a model on the line between two, (1 - c) th_A + c th_B.

    Args:
        first: A; integers are its own.
        second: B, of the same architecture.
        share: c.
    """
    twin = copy.deepcopy(first)
    others = {**dict(second.named_parameters()), **dict(second.named_buffers())}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        if tensor.is_floating_point():
            tensor.lerp_(others[name].to(tensor), share)
    return twin


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None) -> float:
    """Return the mean loss over all examples, or label tokens, of the batches, in evaluation mode.

    Raises:
        InvalidOption: there are no batches.
        Incompatible: there is no loss.
    """
    total, count = 0.0, 0
    device = next(model.parameters()).device
    with calibrating(model, ()):
        for index, content in enumerate(batches):
            batch = prepared(index, content, device, None)
            found = loss_of(model, batch, loss, needed=True)
            assert found is not None
            total, count = total + float(found) * batch.count(), count + batch.count()
    if not count:
        raise InvalidOption("there are no batches to compute the loss on")
    return total / count


@torch.no_grad()
def reset_statistics(model: nn.Module, batches: Iterable[Any], *, loss: Loss | None = None) -> None:
    """Measure the running statistics of a model's batch norms anew, in place.

    Between two models the mean of their running statistics is not the statistics of the mean: units cancel,
    variances collapse and the loss rises. Measuring them on some batches mends that (REPAIR, Jordan et al.
    2022, in its simplest form). A model without batch norms is left alone.

    Args:
        model: any module; modes are restored.
        batches: what it is called with; the statistics are the mean over all of them.
        loss: calls the model on a batch, where a batch holds more than its arguments; None calls it itself.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> reset_statistics(model, [torch.tensor([[1.0], [3.0]])])
        >>> model[0].running_mean
        tensor([2.])
    """
    norms = [module for module in model.modules() if isinstance(module, _BATCH_NORM)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    device = next(iter(model.state_dict().values())).device
    try:
        with calibrating(model, ()):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean over all batches
                norm.training = True
            for index, content in enumerate(batches):
                loss_of(model, prepared(index, content, device, None), loss, needed=False)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def distance(first: nn.Module, second: nn.Module) -> float:
    """Return ||th_A - th_B|| over all parameters of two models."""
    others = dict(second.named_parameters())
    squares = (
        (mine.detach().double() - others[name].detach().double()).square().sum()
        for name, mine in first.named_parameters()
    )
    return math.sqrt(math.fsum(float(square) for square in squares))


@dataclass(frozen=True)
class _Spectrum:
    """The singular triplets of one weight."""

    left: Tensor
    values: Tensor
    right: Tensor

    def count(self, gamma: float) -> int:
        """Return how many singular values are at least gamma times the largest; none of a zero weight."""
        largest = self.values[0]
        return int((self.values >= gamma * largest).sum()) if largest else 0


def alignment(first: nn.Module, second: nn.Module, gammas: Sequence[float]) -> dict[float, float]:
    """Return how well the strong singular vectors of two models agree.

        R = sum_l sum_ij (u_i^T u'_j) (v_i^T v'_j) / sum_l (|Gamma_l| + |Gamma'_l|) / 2

    over the components i of A and j of B whose singular values are at least gamma times the largest of their
    weight. It is 1 for equal models, at most 1, and about 0 for unrelated ones. All pairs count, not i = i
    alone, because values that lie close together mix their vectors.

    Args:
        first: A.
        second: B, of the same architecture.
        gammas: each in [0, 1].

    Raises:
        InvalidOption: a gamma is not within.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(5, 3)
        >>> alignment(model, model, [0.0, 0.5])
        {0.0: 1.0, 0.5: 1.0}
    """
    for gamma in gammas:
        in_range("lmc", "[0, 1]", gammas=gamma)
    totals = {gamma: [0.0, 0.0] for gamma in gammas}
    mine, other = _spectra(first), _spectra(second)
    for name, one in mine.items():
        two = other[name]
        overlaps = (one.left.T @ two.left) * (one.right @ two.right.T)
        for gamma, total in totals.items():
            rows, columns = one.count(gamma), two.count(gamma)
            total[0] += float(overlaps[:rows, :columns].sum())
            total[1] += (rows + columns) / 2
    return {gamma: _ratio(*total) for gamma, total in totals.items()}


def _ratio(part: float, whole: float) -> float:
    """Return their ratio to twelve digits, beyond which it is rounding."""
    return round(part / whole, 12) if whole else 1.0


def _spectra(model: nn.Module) -> dict[str, _Spectrum]:
    """Return the singular triplets of every weight of two or more axes."""
    weights = {
        name: weight.detach().double().flatten(1)
        for name, weight in model.named_parameters()
        if weight.dim() > 1
    }
    return {name: _Spectrum(*torch.linalg.svd(w, full_matrices=False)) for name, w in weights.items()}
