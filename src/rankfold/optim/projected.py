"""One optimizer for projected gradients: projector x refresh x inner optimizer x residual x side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidOption, RankfoldError
from .bases import is_due, refresh
from .inner import INNERS, Inner
from .matrices import Layout, State, Work, basis_of, keep_basis, layout_of, named
from .projectors import PROJECTORS, Coordinates, Projector
from .refusals import (
    chosen,
    require_finite,
    require_fitting,
    require_options,
    require_same,
    require_weight,
    spelled,
)
from .residuals import RESIDUALS, Residual, Split
from .rounding import HALF
from .state import keep_precision


class ProjectedOptimizer(Optimizer):
    """Keeps an optimizer's moments for low-rank projections of gradients instead of the gradients.

        R = P^T G,   N = inner(R),   D = scale P N + residual(G - P R),   W <- (1 - lr wd) W - lr D

    P (d, r) is a basis of the shorter side of G, refreshed every `refresh` steps. Parameters with fewer than
    two axes, and groups with `rank=None`, are moved by the inner optimizer as they are; kernels of
    convolutions are matrices (out, in * window). The state is tensors alone, and a run that is resumed from
    `state_dict()` goes on bit for bit.

    Of weights that FSDP2 shards, moments and basis are shards too; G is gathered, one weight at a time, when
    a basis is chosen. The inner optimizers adamw8bit and adafactor, online-pca and the sparse rest see
    columns together: there every process gathers G in every step and keeps the whole state.

    Args:
        params: parameters, (name, parameter) pairs or groups; a group may set any of the options below.
        lr: learning rate.
        rank: r, or None to project nothing.
        projector: how P is chosen: svd, randomized, sampled, gaussian, orthonormal, coordinates, dct,
            online-pca, or a `Projector`, such as `CrossHead(heads=8)`.
        refresh: steps between two choices of P.
        inner: adamw, adamw8bit (moments in 8 bits, needs torchao), lion, sgd, adafactor, or an `Inner`.
        residual: what is done with the rest of G: drop, scaled, sign, sgd, sparse, or a `Residual`.
        side: which side is projected: auto (the shorter), reverse (the longer), left (rows) or right
            (columns).
        scale: of what comes back from the low rank.
        transport: what becomes of moments when P is chosen anew: keep, rotate (into the new basis) or reset
            (which also starts the step count of the corrections again).
        weight_decay: decoupled.
        overlap: where a new basis shares at least this much with the last one, in (0, 1], the interval
            doubles, up to 16 times; None keeps it.
        staggered: spread the refreshes of the parameters over the interval, so that no step pays for all.
        clip: largest norm of all projected gradients together, above 0, or None.
        rounding: of weights in half precision: nearest, stochastic, or master (a float32 copy in the state).
        seed: of random bases, with the parameter's name.

    Raises:
        InvalidOption: an option is impossible.
        InvalidRank: a weight cannot hold the rank.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(32, 16)
        >>> optimizer = ProjectedOptimizer(layer.named_parameters(), lr=1e-2, rank=4)
        >>> layer(torch.ones(2, 32)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.weight]["exp_avg"].shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        rank: int | None = 128,
        projector: str | Projector = "svd",
        refresh: int = 200,
        inner: str | Inner = "adamw",
        residual: str | Residual = "drop",
        side: str = "auto",
        scale: float = 1.0,
        transport: str = "keep",
        weight_decay: float = 0.0,
        overlap: float | None = None,
        staggered: bool = False,
        clip: float | None = None,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        self.projector: Projector = chosen("projector", PROJECTORS, projector)
        self.inner = chosen("inner", INNERS, inner)
        if isinstance(self.inner, type):
            self.inner = self.inner()
        self.residual: Residual = chosen("residual", RESIDUALS, residual)
        self.clip, self.seed, self.staggered = clip, seed, staggered
        if clip is not None and not clip > 0:
            raise InvalidOption(f"clip must be above 0, not {clip!r}")
        defaults = {
            "lr": lr, "rank": rank, "refresh": refresh, "side": side, "scale": scale, "transport": transport,
            "weight_decay": weight_decay, "overlap": overlap, "rounding": rounding, "parts": "",
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or nothing where its weights cannot hold what is asked."""
        super().add_param_group(param_group)
        try:
            self._admit(len(self.param_groups) - 1, self.param_groups[-1])
        except RankfoldError:
            self.param_groups.pop()
            raise

    def _admit(self, index: int, group: dict[str, Any]) -> None:
        """Refuse what a new group's weights cannot hold."""
        group.setdefault("first_lr", group["lr"])
        require_options(group)
        for name, parameter in named(index, group):
            require_weight(group, name, parameter)

    # The step --------------------------------------------------------------------------------------------

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step; where it is compiled, it runs as it is.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            InvalidOption: a gradient is sparse or not finite, or a weight has another shape than its state;
                nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step(list(self._work()))
        return loss

    def _work(self) -> Iterator[Work]:
        for index, group in enumerate(self.param_groups):
            for name, parameter in named(index, group):
                if parameter.grad is not None:
                    yield Work(group, name, parameter, parameter.grad, self.seed)

    def _step(self, work: list[Work]) -> None:
        """Move these parameters, or none of them."""
        layouts = [self._layout(each) for each in work]
        for each, layout in zip(work, layouts, strict=True):
            require_fitting(each, self.inner, layout.low, self.state.get(each.parameter, {}))
        both = list(zip(work, layouts, strict=True))
        lows = [self._early(each, layout) for each, layout in both]
        seen = [
            layout.local(each.gradient) if low is None else low
            for (each, layout), low in zip(both, lows, strict=True)
        ]
        require_finite(work, seen)
        factor = None
        if self.clip is not None and work:
            projected = [self._low(each, layout) for each, layout in both]
            factor, lows = self._clip_factor(self.clip, projected, layouts), list(projected)
        for (each, layout), low in zip(both, lows, strict=True):
            self._move(each, layout, low, factor)

    @staticmethod
    def _clip_factor(clip: float, lows: list[Tensor], layouts: list[Layout]) -> Tensor:
        squares = [layout.total(low.square().sum()) for low, layout in zip(lows, layouts, strict=True)]
        factor: Tensor = (clip / (torch.stack(squares).sum().sqrt() + 1e-6)).clamp_max(1.0)
        return factor

    def _layout(self, work: Work) -> Layout:
        columnwise = self.projector.columnwise and self.residual.columnwise and self.inner.columnwise
        return layout_of(work.group, work.parameter, columnwise)

    def _begun(self, work: Work) -> State:
        """Return the state of a parameter, with its counters."""
        state: State = self.state[work.parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["inner_step"] = torch.zeros((), dtype=torch.int64)
            state["shape"] = torch.tensor(work.parameter.shape)
            if work.group["rounding"] == "master" and work.parameter.dtype in HALF:
                state["master"] = work.parameter.detach().float().contiguous()
        return state

    def _early(self, work: Work, layout: Layout) -> Tensor | None:
        """Return R where it tells whether G is finite: a product with all of G that changes no state."""
        state = self.state.get(work.parameter, {})
        if (
            not layout.projected
            or layout.is_sharded
            or is_due(state)
            or isinstance(self.projector, Coordinates)
        ):
            return None
        return self.projector.down(layout.gradient(work.gradient), basis_of(state))

    def _low(self, work: Work, layout: Layout) -> Tensor:
        """Return R, by a new basis where one is due."""
        kept = self._begun(work)
        state = layout.opened(kept)
        low = self._projected(work, layout, layout.gradient(work.gradient), state)
        layout.close(kept, state)
        return low

    def _projected(self, work: Work, layout: Layout, gradient: Tensor, state: State) -> Tensor:
        if not layout.projected:
            return gradient
        if is_due(state):
            self._refresh(work, layout.whole(work.gradient) if layout.spread else gradient, state)
        return self.projector.down(gradient, basis_of(state))

    def _refresh(self, work: Work, oriented: Tensor, state: State) -> None:
        """Choose the basis anew from the whole of G (d, n)."""
        refresh(self.projector, self.inner, work, oriented, state, self.staggered)

    def _move(self, work: Work, layout: Layout, low: Tensor | None, factor: Tensor | None) -> None:
        kept = self._begun(work)
        state, gradient = layout.opened(kept), layout.gradient(work.gradient)
        low = self._projected(work, layout, gradient, state) if low is None else low
        if factor is not None:
            gradient, low = gradient * factor, low * factor
        state["step"] += 1
        state["inner_step"] += 1
        step = int(state["inner_step"])
        inner, correction = self.inner.direction(low, state, step)
        base, target = layout.begin(work.group, state)
        if layout.projected:
            basis = basis_of(state)
            split = Split(gradient, low, inner, correction, step, state, self.projector, basis, layout.total)
            self._add(target, split, work.group)
            keep_basis(state, basis)
        else:
            target.sub_(inner, alpha=work.group["lr"] * correction)
        layout.end(work, state, base, target)
        layout.close(kept, state)

    def _add(self, target: Tensor, split: Split, group: dict[str, Any]) -> None:
        """Subtract what comes back from the low rank, and what becomes of the rest."""
        more, factor = self.residual.add(target, split, group["lr"]), group["scale"] * split.factor
        if more is None:
            self.projector.add_up(target, split.inner, split.kept, -group["lr"] * factor)
        else:
            self.projector.add_up(target, more.add_(split.inner, alpha=factor), split.kept, -group["lr"])
        share = min(1.0, group["lr"] / (group["first_lr"] or 1.0))
        self.projector.stepped(split.gradient, split.low, split.kept, share)

    def _subtract(self, work: Work, direction: Tensor) -> None:
        """Subtract a direction of the parameter's shape, times the learning rate."""
        layout, state = Layout(work.group, work.parameter), self.state[work.parameter]
        base, target = layout.begin(work.group, state)
        target.sub_(layout.turned(direction), alpha=work.group["lr"])
        layout.end(work, state, base, target)

    # Around it -------------------------------------------------------------------------------------------

    def step_in_backward(self) -> RemovableHandle:
        """Let every parameter step as soon as its gradient is there, and free the gradient.

        So one gradient is alive at a time. Gradients cannot be accumulated or clipped together then, and
        `step()` has nothing left to do. Where FSDP2 reduces gradients, they are the reduced ones;
        `DistributedDataParallel` averages them later, so with it, step as usual.
        A weight that segments of reentrant checkpointing share would step once for each of them: give
        `use_reentrant=False`.

        Returns:
            A handle; `.remove()` ends it.

        Raises:
            InvalidOption: gradients are to be clipped together.
        """
        if self.clip is not None:
            raise InvalidOption(
                "clip needs all gradients at once, and steps in backward free them one by one"
            )
        handles = _Handles()
        for index, group in enumerate(self.param_groups):
            for name, parameter in named(index, group):
                if parameter.requires_grad:
                    handles.add(parameter.register_post_accumulate_grad_hook(self._hook(index, name)))
        return handles  # type: ignore[return-value]

    def _hook(self, index: int, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def stepped(parameter: Tensor) -> None:
            assert parameter.grad is not None
            group = self.param_groups[index]  # as it is now: loading a state replaces groups
            self._step([Work(group, name, parameter, parameter.grad, self.seed)])
            parameter.grad = None

        return stepped

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies need, the parts too; not the step, which schedules wrap."""
        own = {key: value for key, value in vars(self).items() if not key.startswith("_") and key != "step"}
        return {**super().__getstate__(), **own}

    def _parts(self) -> str:
        """Return what the state is only right with, as text."""
        names = ("projector", "inner", "residual", "staggered", "clip", "seed")
        return ", ".join(f"{name}={spelled(getattr(self, name))}" for name in names)

    def state_dict(self) -> dict[str, Any]:
        """Return the state: tensors, and numbers and text in the groups."""
        for group in self.param_groups:
            group["parts"] = self._parts()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments keep their own precision, whatever that of the weights.

        Raises:
            InvalidOption: it was saved with other parts, ranks or fixed options.
            ValueError: the groups differ.
        """
        own = [{**group, "parts": self._parts()} for group in self.param_groups]
        require_same(state_dict["param_groups"], own)
        super().load_state_dict(state_dict)
        keep_precision(self, state_dict)


class _Handles:
    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(self, handle: RemovableHandle) -> None:
        """Keep a handle."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Remove them all."""
        for handle in self._handles:
            handle.remove()
