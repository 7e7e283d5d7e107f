"""One optimizer for projected gradients: projector x refresh x inner optimizer x residual x side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidOption, InvalidRank, near_names
from .inner import INNERS, Inner
from .projectors import PROJECTORS, Kept, Projector
from .residuals import RESIDUALS, Residual, Scaled

SIDES = ("auto", "reverse", "left", "right")
TRANSPORTS = ("keep", "rotate", "reset")
ROUNDINGS = ("nearest", "stochastic", "master")
_BASIS = "basis."  # before the names of what a basis is made of


@dataclass
class _Work:
    """One parameter in one step."""

    group: dict[str, Any]
    name: str
    parameter: Tensor
    gradient: Tensor


class ProjectedOptimizer(Optimizer):
    """Keeps an optimizer's moments for low-rank projections of gradients instead of the gradients.

        R = P^T G,   N = inner(R),   D = scale P N + residual(G - P R),   W <- (1 - lr wd) W - lr D

    P (d, r) is a basis of the shorter side of G, refreshed every `refresh` steps. Parameters with fewer than
    two axes, and groups with `rank=None`, are moved by the inner optimizer as they are; kernels of
    convolutions are matrices (out, in * window). The state is tensors alone, and a run that is resumed from
    `state_dict()` goes on bit for bit.

    Args:
        params: parameters, (name, parameter) pairs or groups; a group may set any of the options below.
        lr: learning rate.
        rank: r, or None to project nothing.
        projector: how P is chosen: svd, randomized, sampled, gaussian, orthonormal, coordinates, dct,
            online-pca, or a `Projector`, such as `CrossHead(heads=8)`.
        refresh: steps between two choices of P.
        inner: adamw, lion, sgd, adafactor, or an `Inner`.
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
        clip: largest norm of all projected gradients together, or None.
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
        self.projector = _chosen("projector", PROJECTORS, projector)
        self.inner = _chosen("inner", {name: kind() for name, kind in INNERS.items()}, inner)
        self.residual = _chosen("residual", RESIDUALS, residual)
        self.clip, self.seed, self.staggered = clip, seed, staggered
        defaults = {
            "lr": lr, "rank": rank, "refresh": refresh, "side": side, "scale": scale, "transport": transport,
            "weight_decay": weight_decay, "overlap": overlap, "rounding": rounding,
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, and refuse what its weights cannot hold."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_lr", group["lr"])
        _check(group)
        for name, parameter in _named(len(self.param_groups) - 1, group):
            if _is_projected(group, parameter):
                most = min(_matrix_shape(parameter))
                if group["rank"] > most:
                    raise InvalidRank(f"{name}: rank {group['rank']} is more than its smaller side, {most}")

    # The step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            InvalidOption: a gradient is sparse or not finite; nothing has been changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = list(self._work())
        _check_gradients(work)
        prepared = [(each, self._prepared(each)) for each in work]
        factor = self._clip_factor([low for _, (_, low) in prepared])
        for each, (oriented, low) in prepared:
            self._move(each, oriented, low, factor)
        return loss

    def _work(self) -> Iterator[_Work]:
        for index, group in enumerate(self.param_groups):
            for name, parameter in _named(index, group):
                if parameter.grad is not None:
                    yield _Work(group, name, parameter, parameter.grad)

    def _prepared(self, work: _Work) -> tuple[Tensor, Tensor]:
        """Return the gradient with the projected side first, and what the inner optimizer sees of it."""
        state = self.state[work.parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.int64)
            state["inner_step"] = torch.zeros((), dtype=torch.int64)
            if work.group["rounding"] == "master" and work.parameter.dtype in _HALF:
                state["master"] = work.parameter.detach().float()
        gradient = work.gradient if work.gradient.dtype == torch.float64 else work.gradient.float()
        if not _is_projected(work.group, work.parameter):
            return gradient, gradient
        matrix = gradient.reshape(len(gradient), -1)
        oriented = matrix if _is_left(work.group, _matrix_shape(matrix)) else matrix.T
        if int(state["step"]) >= int(state.get("due", -1)):
            self._refresh(work, oriented, state)
        return oriented, self.projector.down(oriented, _basis(state))

    def _clip_factor(self, lows: list[Tensor]) -> Tensor | None:
        if self.clip is None or not lows:
            return None
        total = torch.stack([low.norm() for low in lows]).norm()
        factor: Tensor = (self.clip / (total + 1e-6)).clamp_max(1.0)
        return factor

    def _move(self, work: _Work, oriented: Tensor, low: Tensor, factor: Tensor | None) -> None:
        group, state = work.group, self.state[work.parameter]
        if factor is not None:
            oriented, low = oriented * factor, low * factor
        state["step"] += 1
        state["inner_step"] += 1
        step = int(state["inner_step"])
        inner, correction = self.inner.direction(low, state, step)
        if not _is_projected(group, work.parameter):
            self._subtract(work, correction * inner)
            return
        basis = _basis(state)
        left = _is_left(group, _matrix_shape(work.parameter))
        if self._adds_in_place(work):
            self._add_in_place(work, oriented, low, inner, correction, basis, left)
            self._moved(group, state, basis, oriented)
            return
        direction = group["scale"] * correction * self.projector.up(inner, basis, oriented)
        if not self.residual.drops:
            rest = oriented - self.projector.up(low, basis, oriented)
            more = self.residual.direction(rest, low, inner, correction, state, step)
            direction = direction if more is None else direction + more
        self._moved(group, state, basis, oriented)
        self._subtract(work, (direction if left else direction.T).reshape(work.parameter.shape))

    def _adds_in_place(self, work: _Work) -> bool:
        """Whether the change can be added to the weight without being formed."""
        full = work.parameter.dtype in (torch.float32, torch.float64)
        scaled = isinstance(self.residual, Scaled) and self.projector.orthonormal
        return (self.residual.drops or scaled) and full and work.parameter.is_contiguous()

    def _add_in_place(
        self,
        work: _Work,
        oriented: Tensor,
        low: Tensor,
        inner: Tensor,
        correction: float,
        basis: Kept,
        left: bool,
    ) -> None:
        """Subtract what comes back from the low rank, and a scaled rest as G phi - P (R phi)."""
        group = work.group
        weight, rate = work.parameter.view(len(work.parameter), -1), group["lr"] * correction
        if group["weight_decay"]:
            weight.mul_(1 - group["lr"] * group["weight_decay"])
        inner_sum = group["scale"] * inner
        if isinstance(self.residual, Scaled):
            scales = self.residual.scales(low, inner)
            squares = (oriented.square().sum(0) - low.square().sum(0)).clamp_min(0)
            size = (squares @ scales.square()).sqrt()
            scales = scales * self.residual.limited(size, self.state[work.parameter])
            inner_sum = inner_sum - low * scales
            gradient, phi = (oriented, scales) if left else (oriented.T, scales[:, None])
            weight.addcmul_(gradient, phi, value=-rate)
        self.projector.add_up(weight, inner_sum, basis, oriented, -rate, left)

    def _moved(self, group: dict[str, Any], state: dict[str, Any], basis: Kept, oriented: Tensor) -> None:
        self.projector.stepped(oriented, basis, group["lr"] / (group["initial_lr"] or 1.0))
        _keep(state, basis)

    def _subtract(self, work: _Work, direction: Tensor) -> None:
        group, parameter, state = work.group, work.parameter, self.state[work.parameter]
        rate, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
        if parameter.dtype not in _HALF or group["rounding"] == "nearest":
            parameter.mul_(kept).sub_(direction.to(parameter.dtype), alpha=rate)
        elif group["rounding"] == "master":
            parameter.copy_(state["master"].mul_(kept).sub_(direction, alpha=rate))
        else:
            wanted = parameter.float().mul_(kept).sub_(direction, alpha=rate)
            parameter.copy_(stochastically_rounded(wanted, parameter.dtype, self._generator(work, state)))

    # The basis -------------------------------------------------------------------------------------------

    def _refresh(self, work: _Work, oriented: Tensor, state: dict[str, Any]) -> None:
        """Choose the basis anew, and let moments follow as they are meant to."""
        group, old = work.group, _basis(state)
        new = self.projector.fit(oriented, group["rank"], old, self._generator(work, state))
        shared = None
        if old and (group["transport"] == "rotate" or group["overlap"] is not None):
            shared = self.projector.matrix(new, oriented).T @ self.projector.matrix(old, oriented)
        if old:
            self._transport(group["transport"], state, shared)
        _keep(state, new)
        state.pop("support", None)
        clock, gap = int(state["step"]), int(state.get("gap", group["refresh"]))
        if shared is not None and group["overlap"] is not None:
            same = float(shared.square().sum()) / group["rank"] >= group["overlap"]
            gap = min(2 * gap, _MOST * group["refresh"]) if same else group["refresh"]
            state["gap"] = torch.tensor(gap)
        first = "due" not in state and self.staggered
        shift = _hashed(work.name) % group["refresh"] if first else 0
        state["due"] = torch.tensor(clock + (shift or gap))

    def _transport(self, transport: str, state: dict[str, Any], shared: Tensor | None) -> None:
        moments = {
            name: power for names, power in ((self.inner.first, 1), (self.inner.second, 2)) for name in names
        }
        if transport == "reset":
            state["inner_step"].zero_()
        for name, power in moments.items():
            if transport == "reset" and name in state:
                state[name].zero_()
            elif transport == "rotate" and name in state and shared is not None:
                state[name] = shared**power @ state[name]

    def _generator(self, work: _Work, state: dict[str, Any]) -> torch.Generator:
        return torch.Generator().manual_seed(_hashed(self.seed, work.name, int(state["step"])))

    # Around it -------------------------------------------------------------------------------------------

    def step_in_backward(self) -> RemovableHandle:
        """Let every parameter step as soon as its gradient is there, and free the gradient.

        So one gradient is alive at a time. Gradients cannot be accumulated or clipped together then, and
        `step()` has nothing left to do.

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
            for name, parameter in _named(index, group):
                if parameter.requires_grad:
                    handles.add(parameter.register_post_accumulate_grad_hook(self._hook(group, name)))
        return handles  # type: ignore[return-value]

    def _hook(self, group: dict[str, Any], name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def stepped(parameter: Tensor) -> None:
            assert parameter.grad is not None
            work = _Work(group, name, parameter, parameter.grad)
            _check_gradients([work])
            self._move(work, *self._prepared(work), None)
            parameter.grad = None

        return stepped

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; moments keep their own precision, whatever that of the weights.

        Raises:
            ValueError: the groups differ.
        """
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, order, strict=True):
            stored = state_dict["state"].get(number)
            if stored is not None:
                self.state[parameter] = {
                    key: value.detach().clone().to(_place(key, value, parameter))
                    for key, value in stored.items()
                }


_HALF = (torch.bfloat16, torch.float16)
_MOST = 16  # times the interval may grow


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


def _chosen(what: str, known: dict[str, Any], wanted: Any) -> Any:
    if not isinstance(wanted, str):
        return wanted
    if wanted not in known:
        listed = near_names(wanted, known) or f"; known: {', '.join(known)}"
        raise InvalidOption(f"there is no {what} {wanted!r}{listed}")
    return known[wanted]


def _check(group: dict[str, Any]) -> None:
    for key, choices in (("side", SIDES), ("transport", TRANSPORTS), ("rounding", ROUNDINGS)):
        if group[key] not in choices:
            raise InvalidOption(f"{key} must be one of {', '.join(choices)}, not {group[key]!r}")
    for key, least in (("lr", 0.0), ("weight_decay", 0.0), ("refresh", 1), ("rank", 1), ("overlap", 0.0)):
        value = group[key]
        if value is not None and not least <= value < math.inf:
            raise InvalidOption(f"{key} must be a finite number of at least {least:g}, not {value!r}")


def _named(index: int, group: dict[str, Any]) -> Iterator[tuple[str, nn.Parameter]]:
    names = group.get("param_names", [f"{index}.{i}" for i in range(len(group["params"]))])
    yield from zip(names, group["params"], strict=True)


def _is_projected(group: dict[str, Any], parameter: Tensor) -> bool:
    return group["rank"] is not None and parameter.dim() > 1


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    return parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])


def _is_left(group: dict[str, Any], shape: tuple[int, int]) -> bool:
    rows, columns = shape
    if group["side"] in ("left", "right"):
        return bool(group["side"] == "left")
    return bool((rows < columns) == (group["side"] == "auto"))


def _basis(state: dict[str, Any]) -> Kept:
    return {key.removeprefix(_BASIS): value for key, value in state.items() if key.startswith(_BASIS)}


def _keep(state: dict[str, Any], basis: Kept) -> None:
    state.update({f"{_BASIS}{key}": value for key, value in basis.items()})


def _hashed(*parts: object) -> int:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _check_gradients(work: list[_Work]) -> None:
    for each in work:
        if each.gradient.is_sparse:
            raise InvalidOption(f"{each.name} has a sparse gradient, which cannot be projected")
    if not work:
        return
    norms = torch._foreach_norm([each.gradient for each in work])
    finite = torch.stack([norm.isfinite().to(norms[0].device) for norm in norms])
    if not bool(finite.all()):
        name = work[int((~finite).nonzero()[0])].name
        raise InvalidOption(
            f"the gradient of {name} is not finite; no step was taken and nothing has changed"
        )


def _place(key: str, value: Tensor, parameter: Tensor) -> torch.device:
    """Return where a tensor of the state lives: counters on the CPU, the rest beside the parameter."""
    return value.device if value.dim() == 0 and not value.is_floating_point() else parameter.device


def stochastically_rounded(value: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 to bfloat16 up or down at random, so that the mean is the value.

    Args:
        value: float32.
        dtype: bfloat16.
        generator: on the CPU.

    Raises:
        InvalidOption: the dtype is another.

    Example:
        >>> import torch
        >>> value = torch.full((4000,), 1 + 2**-9)
        >>> rounded = stochastically_rounded(value, torch.bfloat16, torch.Generator().manual_seed(0))
        >>> sorted(rounded.unique().tolist()), bool((rounded.float().mean() - value[0]).abs() < 1e-3)
        ([1.0, 1.0078125], True)
    """
    if dtype != torch.bfloat16:
        raise InvalidOption(f"stochastic rounding is for bfloat16, not {dtype}; use rounding='master'")
    noise = torch.randint(1 << 16, value.shape, generator=generator, dtype=torch.int32).to(value.device)
    bits = (value.view(torch.int32) + noise) & -(1 << 16)
    return bits.view(torch.float32).to(dtype)
