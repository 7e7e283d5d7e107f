"""PELA: a factorised model learns its teacher's features again, and its products stay near the weights.

    r = floor(keep out in / (out + in)),   W ~ W1 W0,   W1 = U_r S_r^(1/2),   W0 = S_r^(1/2) V_r^T
    L = L_task + l_fd mean_k ||h_k - h_k^teacher||^2 + l_p mean_p (max |W1_p W0_p - W_p| - eps)^2

Guo et al. 2023, 2024. h_k are the hidden states, where the model returns them, else the outputs of the
targeted layers; ||.||^2 is a mean over entries. The third term pulls the largest entry of every difference
towards eps, from both sides as the official code does; `hinge=True` bounds it by eps, as the paper says. Its
gradient touches one entry of each weight. Everything trains; the teacher is a copy of the model as it was.
L_task is the model's own loss where the batches give one.

l_fd = 0.1, l_p = 1 and eps = 1e-3 are the official code's for ALBEF (1 and 0 for DeiT). AdamW; steps and rate
are for the caller to choose: the papers train for epochs of their own corpora.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidOption
from ...layers import StructuredLayer, adaptation_of, fold, require
from ...statistics.batches import call, prepared
from ...statistics.calibrating import Progress
from ...statistics.watched import watch
from ..distortion import masked_mean
from ..job import compress
from ..registry import compressor
from ..task import Task, refuse_half_precision


@compressor(
    "pela",
    title="PELA: Learning Parameter-Efficient Models with Low-Rank Approximation",
    year=2023,
    arxiv="2310.10700",
    code="guoyang9/PELA",
    formula="W1 W0 = [W]_r, trained on L_task + l_fd |h - h_teacher|^2 + l_p (max |W1 W0 - W| - eps)^2",
    whole=True,
    example={"steps": 2},
)
def pela(
    task: Task,
    *,
    steps: int = 1000,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    features: float = 0.1,
    perturbation: float = 1.0,
    tolerance: float = 1e-3,
    hinge: bool = False,
) -> None:
    """Factorise the targeted weights and distil.

    Args:
        task: the model and training batches, which are gone through again and again.
        steps: of the optimizer, at least 0.
        lr: the largest learning rate; it falls to 0 as a cosine.
        weight_decay: of AdamW.
        features: l_fd >= 0.
        perturbation: l_p >= 0.
        tolerance: eps >= 0.
        hinge: a largest difference below eps costs nothing.

    Example:
        >>> import torch, rankfold as rf
        >>> model, inputs = (
        ...     torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)),
        ...     torch.randn(16, 8),
        ... )
        >>> _ = rf.compress(model, "pela", keep=0.5, data=[inputs], steps=3, progress=False)
    """
    if steps < 0 or min(features, perturbation, tolerance) < 0 or not lr > 0:
        raise InvalidOption(
            "pela: steps, features, perturbation and tolerance must be at least 0 and lr above 0, not "
            f"{steps}, {features}, {perturbation}, {tolerance} and {lr}"
        )
    refuse_half_precision(task.model, "pela")
    batches, teacher = task.batches(), deepcopy(task.model).eval().requires_grad_(False)
    compress(
        task.model, "svd", keep=task.keep, targets=task.targets, seed=task.seed, progress=task.progress,
        report=lambda report: task.report.rows.extend(report.rows),
    )  # fmt: skip
    if adaptation_of(task.model) is None:
        return
    loss = DistillationLoss(task.model, teacher, features, perturbation, tolerance, hinge, task.loss)
    was_training = task.model.training
    try:
        _train(task, batches, loss, steps, lr, weight_decay)
    except BaseException:
        fold(task.model)
        task.model.load_state_dict(teacher.state_dict())
        raise
    finally:
        task.model.train(was_training)
    task.report.facts["losses"] = loss.history
    task.report.notes.append("the errors are those before the distillation")
    require(task.model).adapter().record["compressed"]["method"] = "pela"


class DistillationLoss:
    """The loss of PELA for a factorised model and its teacher.

    Args:
        student: a compressed model.
        teacher: the model as it was.
        features: weight of the distance of hidden states.
        perturbation: weight of the perturbation term.
        tolerance: eps of that term.
        hinge: bound the perturbation instead of pulling it towards eps.
        loss: `loss(model, batch)`; None reads the loss off the output, where there is one.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        features: float = 0.1,
        perturbation: float = 1.0,
        tolerance: float = 1e-3,
        hinge: bool = False,
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        self.student, self.teacher, self.loss = student, teacher, loss
        self.weights = (features, perturbation)
        self.tolerance, self.hinge = tolerance, hinge
        self.paths = list(require(student).adapter().paths)
        self.originals = {w.path: w.layer.matrix().detach() for w in watch(teacher, self.paths)}
        self.history: list[float] = []

    def __call__(self, content: Any) -> Tensor:
        """Return the loss of a batch that lies on the model's device."""
        batch = prepared(0, content, next(self.student.parameters()).device, "padding")
        with torch.no_grad():
            _, aims = self._features(self.teacher, batch.content)
        output, found = self._features(self.student, batch.content)
        distances = [
            masked_mean((h - t).square(), batch.mask).mean() for h, t in zip(found, aims, strict=True)
        ]
        total = self.weights[0] * torch.stack(distances).mean() + self.weights[1] * self.perturbation()
        own = self._own(output, batch.content)
        total = total if own is None else total + own
        self.history.append(float(total.detach()))
        return total

    def perturbation(self) -> Tensor:
        """Return the mean over weights of (max |W1 W0 - W| - eps)^2."""
        terms = []
        for path, original in self.originals.items():
            layer = self.student.get_submodule(path)
            assert isinstance(layer, StructuredLayer)
            assert layer.expression is not None
            largest = (layer.expression.dense() - original).abs().max() - self.tolerance
            terms.append((largest.clamp(min=0) if self.hinge else largest).square())
        return torch.stack(terms).mean()

    def _own(self, output: Any, content: Any) -> Tensor | None:
        if self.loss is not None:
            return self.loss(self.student, content)
        found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        return found if isinstance(found, Tensor) else None

    def _features(self, model: nn.Module, content: Any) -> tuple[Any, Sequence[Tensor]]:
        """Return the output and the hidden states, or the outputs of the layers that are factorised."""
        if hasattr(model, "config") and isinstance(content, Mapping):
            output = call(model, {**content, "output_hidden_states": True, "return_dict": True})
            states = getattr(output, "hidden_states", None)
            if states:
                return output, states
        with _outputs(model, self.paths) as found:
            output = call(model, content)
        return output, found


@contextmanager
def _outputs(model: nn.Module, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """Gather what the modules at these paths return while the block runs."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for path in paths:
            handle = model.get_submodule(path).register_forward_hook(lambda m, i, out: found.append(out))
            stack.callback(handle.remove)
        yield found


def _train(
    task: Task, batches: Sequence[Any], loss: DistillationLoss, steps: int, lr: float, weight_decay: float
) -> None:
    """Train all parameters of the student."""
    parameters = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    bar = Progress(task.progress, steps, "distilling")
    task.model.train()
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(task.seed)
        for content in islice(cycle(batches), steps):
            optimizer.zero_grad()
            loss(content).backward()
            optimizer.step()
            schedule.step()
            bar.step()
    bar.close()
