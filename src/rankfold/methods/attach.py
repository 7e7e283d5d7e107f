"""Attaching dynamics and dynamic ranks to an optimizer: they ride on its step hooks, in any training loop."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import Incompatible, InvalidOption
from ..layers import Adaptation, require
from ..layers.riders import is_ridden, let_go, ride
from ..optim import adam_options, unwrapped
from ..weights.weight import tick
from . import registry
from .recipe import Recipe, Resolved, resolve
from .rules import Dynamics
from .run import MEMORY, Run

_log = logging.getLogger("rankfold")
_HANDLE = "_rankfold_attached"  # on the optimizer
_WRAPPERS = (
    register_optimizer_step_post_hook.__code__.co_filename
)  # where PyTorch wraps the steps of optimizers


class TotalStepsChanged(UserWarning):
    """A training goes on with another number of steps than it was begun with."""


class Attached:
    """Dynamics that ride on an optimizer's step until `remove()`; also a context manager.

    Attributes:
        methods: by name, in the order in which they act on gradients; empty where there are none.
        run: the training under way, or None where there is nothing to attach.
        scheduled: names of the methods that act by the number of steps of the whole training.
    """

    def __init__(
        self, methods: dict[str, Dynamics], run: Run | None, point: str, scheduled: Sequence[str] = ()
    ) -> None:
        self.methods, self.run, self._point, self.scheduled = methods, run, point, tuple(scheduled)
        self._handles: list[Any] = []
        if run is not None:
            self._attach(run)

    def _attach(self, run: Run) -> None:
        if getattr(run.optimizer, _HANDLE, None) is not None:
            raise Incompatible("dynamics are attached to this optimizer already; remove() the first handle")
        self._resume(run)
        for name, method in self.methods.items():
            run.enter(name)
            for path, expression in run.expressions.items():
                method.suits(path, expression)
            method.check(run)
        setattr(run.optimizer, _HANDLE, self)
        ride(self, run.adapter)
        run.adapter.attached = True
        self._handles = [
            run.optimizer.register_step_pre_hook(self._before),
            run.optimizer.register_step_post_hook(self._after),
        ]
        for name, method in self.methods.items():
            run.enter(name)
            self._handles += method.watch(run)

    @torch.no_grad()
    def remove(self) -> None:
        """Let every method finish, and let go of the optimizer; what is remembered stays in its state.

        Where the adapter was removed from the model there is nothing left to finish.
        """
        if self.run is None or not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        let_go(self)
        self.run.restore_rates()
        delattr(self.run.optimizer, _HANDLE)
        if self.run.removed:
            return
        for name, method in self.methods.items():
            self.run.enter(name)
            method.finish(self.run)
        tick()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    # Around a step --------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _is_inner(optimizer):
            return None
        if getattr(optimizer, "grad_scale", None) is not None:
            raise Incompatible(
                "a fused optimizer divides out a gradient scaler's scale inside its own step, after the "
                "dynamics have seen the gradients; create it with fused=False"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._gradients_ready()
            return None
        wrapped = self._once_ready(closure)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _once_ready(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        """Return a closure after whose first call the gradients are there."""
        ready = False

        def wrapped() -> Any:
            nonlocal ready
            with torch.enable_grad():
                loss = closure()
            if ready:
                raise Incompatible("dynamics need an optimizer that evaluates its closure once a step")
            ready = True
            self._gradients_ready()
            return loss

        return wrapped

    @torch.no_grad()
    def _gradients_ready(self) -> None:
        run = self._running()
        if run.removed or run.name not in run.adaptation.active:
            raise Incompatible(
                f"the adapter {run.name!r}, whose dynamics are attached to this optimizer, is not in use: "
                "use it, or remove() the handle that attach returned"
            )
        self._resume(run)
        run.restore_rates()  # of a step that failed
        try:
            if not run.state["begun"]:
                self._each(run, "begin")
                run.state.update(begun=True, point=self._point, total_steps=run.total_steps)
            self._each(run, "gradients_ready")
        except BaseException:
            run.restore_rates()
            raise

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_inner(optimizer):
            return
        run = self._running()
        run.restore_rates()
        run.state["clock"] += 1
        for name, method in reversed(self.methods.items()):
            run.enter(name)
            method.stepped(run)
        tick()

    def _each(self, run: Run, phase: str) -> None:
        for name, method in self.methods.items():
            run.enter(name)
            getattr(method, phase)(run)

    def _running(self) -> Run:
        assert self.run is not None
        return self.run

    def _resume(self, run: Run) -> None:
        """Refuse to go on from the state of another point, and warn of another number of steps."""
        known = run.optimizer.param_groups[0].get(MEMORY)
        if known is None or not known["begun"]:
            return
        if known["point"] != self._point:
            raise Incompatible(
                f"the optimizer's state was left by {known['point']!r} and cannot be continued as "
                f"{self._point!r}"
            )
        before = known.get("total_steps", run.total_steps)  # what older files do not say is what it was
        known["total_steps"] = run.total_steps
        if self.scheduled and before != run.total_steps:
            names = " and ".join(self.scheduled)
            warnings.warn(
                f"the training was begun with total_steps={before} and goes on with {run.total_steps}: "
                f"{names} follow{'s' * (len(self.scheduled) == 1)} the new total",
                TotalStepsChanged,
                stacklevel=2,
            )


def _is_inner(optimizer: Optimizer) -> bool:
    """Say whether the hook that asks runs in a step that another step of the same optimizer has called.

    PyTorch wraps `step` once in every class, so a class that calls its parent's step runs hooks twice. It is
    read off the stack, because a flag would stay behind when a step raises.
    """
    frame: FrameType | None = sys._getframe(1)
    steps = 0
    while frame is not None and steps < 2:
        if frame.f_code.co_filename == _WRAPPERS and frame.f_locals.get("self") is optimizer:
            steps += frame.f_code.co_name == "wrapper"
        frame = frame.f_back
    return steps > 1


def attach(
    model: nn.Module,
    optimizer: Any,
    *,
    total_steps: int | None = None,
    scheduler: Any = None,
    validation: Iterable[Any] | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> Attached:
    """Let the active adapter's dynamics and dynamic ranks ride on an optimizer's steps.

    They work in any training loop: gradients may be accumulated, a closure passed, a `GradScaler` used
    (skipped steps do not count). All that they remember is part of `optimizer.state_dict()`, so training that
    is resumed from the adapter's and the optimizer's files goes on as if it had never stopped.

    Args:
        model: an adapted model.
        optimizer: holds the adapter's parameters; a wrapper such as Accelerate's will do.
        total_steps: optimizer steps of the whole training, for schedules. Training that resumes with another
            number warns (`TotalStepsChanged`), and the schedules follow the new one from there.
        scheduler: of the learning rate, for dynamics that restart it.
        validation: batches, for dynamics that need them.
        loss: `loss(model, batch)`, for dynamics that need it.

    Returns:
        A handle; `.remove()` ends it. It is empty, and says so in the log, where the adapter has no dynamics.

    Raises:
        NotAdapted: the model holds no adapter.
        InvalidOption: something is missing that a method needs, or the optimizer lacks the parameters.
        Incompatible: a method cannot act on this optimizer, or the optimizer is attached already.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), "lora/lora+", rank=2, targets="0")
        >>> optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-3))
        >>> with rf.attach(model, optimizer):
        ...     model(torch.ones(1, 8)).sum().backward()
        ...     optimizer.step()
    """
    adaptation = require(model)
    name, resolved = attachable(adaptation)
    if resolved is None:
        _log.info("nothing to attach: %s has neither dynamics nor dynamic ranks", name)
        return Attached({}, None, "")
    inner = unwrapped(optimizer)
    if not isinstance(inner, Optimizer):
        raise InvalidOption(f"attach needs an optimizer of PyTorch, not {type(optimizer).__name__}")
    if isinstance(inner, torch.optim.LBFGS) and inner.param_groups[0]["max_iter"] > 1:
        raise Incompatible(
            "dynamics need an optimizer that evaluates its closure once a step, and LBFGS does not"
        )
    given = {"total_steps": total_steps, "scheduler": scheduler, "validation": validation, "loss": loss}
    _check_given(resolved, given)
    _check_holds(adaptation, name, inner)
    if is_ridden(adaptation.adapter(name)) and getattr(inner, _HANDLE, None) is None:
        raise Incompatible(
            f"the dynamics of {name!r} are attached to another optimizer; remove() that handle first"
        )
    run = Run(adaptation, name, inner, **given)
    _check_owned(resolved, run)
    scheduled = [name for name, need in _needs(resolved) if need == "total_steps"]
    return Attached(resolved.riding, run, resolved.recipe.text(), scheduled)


def attachable(adaptation: Adaptation) -> tuple[str, Resolved | None]:
    """Return the one active adapter that has anything to attach, and its recipe; or a name and None.

    Raises:
        Incompatible: several active adapters have.
    """
    found = []
    for name in adaptation.active:
        resolved = resolve(Recipe.from_dict(adaptation.adapter(name).record["recipe"]), {})
        if resolved.riding:
            found.append((name, resolved))
    if len(found) > 1:
        names = [name for name, _ in found]
        raise Incompatible(f"the active adapters {names} all have dynamics; use one at a time")
    return found[0] if found else (", ".join(adaptation.active) or "no active adapter", None)


def _needs(resolved: Resolved) -> Iterator[tuple[str, str]]:
    """Yield the methods by name with what each of them has to be given."""
    for name in resolved.dynamics:
        yield from ((name, need) for need in registry.get("dynamics", name).traits["needs"])
    for scope, rule in resolved.riding.items():
        yield from ((scope.rpartition("=")[2], need) for need in getattr(rule, "needs", ()))


def _check_given(resolved: Resolved, given: dict[str, Any]) -> None:
    for name, need in _needs(resolved):
        if given[need] is None:
            raise InvalidOption(f"{name} needs {need}: pass {need}= to attach")
    scheduler = given["scheduler"]
    if scheduler is not None and not all(hasattr(scheduler, word) for word in ("state_dict", "step")):
        raise InvalidOption(f"scheduler must be one of PyTorch's or a wrapper of it, not {scheduler!r}")
    steps = given["total_steps"]
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise InvalidOption(f"total_steps must be a whole number of at least 1, not {steps!r}")


def _check_holds(adaptation: Adaptation, name: str, optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for key, (module, attribute) in adaptation.owned(name).items():
        value = getattr(module, attribute)
        if isinstance(value, nn.Parameter) and id(value) not in held:
            raise InvalidOption(
                f"the optimizer does not hold {key}, which the adapter trains; create it from "
                "rankfold.param_groups(model, lr=...) after adapting"
            )


def _check_owned(resolved: Resolved, run: Run) -> None:
    for name in resolved.dynamics:
        owns = registry.get("dynamics", name).traits["owns_step"]
        if owns and any(adam_options(run.optimizer, pair.up) is None for pair in run.pairs):
            raise Incompatible(
                f"{name} takes Adam's step in a metric of its own, which it cannot do for "
                f"{type(run.optimizer).__name__}; use torch.optim.Adam or AdamW"
            )
    gates = [pair.gate for pair in run.pairs if isinstance(pair.gate, nn.Parameter)]
    if any(run.group(gate).get("weight_decay") for gate in gates):
        raise Incompatible(
            "the gates of a rank rule are in a parameter group with weight decay, which would prune them; "
            "create the optimizer from rankfold.param_groups(model, lr=...)"
        )
