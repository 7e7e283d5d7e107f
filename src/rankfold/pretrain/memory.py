"""Memory of a pretraining step: predicted from shapes before it starts, counted while it runs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankfold.optim import unwrapped
from rankfold.training.memory import activations, readable

if TYPE_CHECKING:
    from transformers import TrainerCallback

DIRECT = 2**21  # numbers that train; the state of an optimizer of more is found from smaller copies
Make = Callable[[list[tuple[str, nn.Parameter]], int], Optimizer]


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one training step in one process; None is what is not known.

    Args:
        weights: parameters and buffers.
        gradients: of all that trains.
        optimizer: its state.
        activations: what the forward pass keeps for the backward pass.
    """

    weights: int | None
    gradients: int | None
    optimizer: int | None
    activations: int | None

    @property
    def total(self) -> int | None:
        """Sum of the four, where all are known."""
        values = [value for value in asdict(self).values() if value is not None]
        return sum(values) if len(values) == 4 else None

    def to_dict(self) -> dict[str, int | None]:
        """Return the four and their total."""
        return {**asdict(self), "total": self.total}

    def shared(self, processes: int) -> "StepMemory":
        """Return what each process holds where all but the activations are spread over several."""
        held = [None if v is None else -(-v // processes) for v in (self.weights, self.gradients)]
        state = None if self.optimizer is None else -(-self.optimizer // processes)
        return StepMemory(held[0], held[1], state, self.activations)

    def __str__(self) -> str:
        """Return one line."""
        parts = [f"{name} {shown(value)}" for name, value in asdict(self).items()]
        return f"{shown(self.total)}: {', '.join(parts)}"


def shown(count: int | None) -> str:
    """Return a number of bytes for a person, who is told where it is not known.

    Example:
        >>> shown(2**20), shown(None)
        ('1.0 MiB', 'not known')
    """
    return "not known" if count is None else readable(count)


def table(predicted: StepMemory, measured: StepMemory) -> str:
    """Return both beside each other, one line each."""
    rows = measured.to_dict()
    lines = [
        f"  {name:<12} {shown(value):>12} {shown(rows[name]):>12}"
        for name, value in predicted.to_dict().items()
    ]
    return "\n".join([f"  {'':<12} {'predicted':>12} {'measured':>12}", *lines])


def predict(
    model: nn.Module,
    make: Make,
    tokens: int,
    width: int,
    *,
    checkpointing: bool = False,
    one_by_one: bool = False,
) -> StepMemory:
    """Predict a step.

    Args:
        model: as it trains; its tensors need no values.
        make: makes its optimizer of other (name, parameter) pairs, with ranks divided by a number.
        tokens: of a forward pass.
        width: bytes of a number that is computed with.
        checkpointing: blocks are computed again in the backward pass.
        one_by_one: one gradient is alive at a time.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return StepMemory(
        weights=weight_bytes(model),
        gradients=(max if one_by_one else sum)(p.nbytes for _, p in trained),
        optimizer=predict_state(trained, make),
        activations=activations(model, tokens, width, checkpointing=checkpointing),
    )


def predict_state(trained: Sequence[tuple[str, nn.Parameter]], make: Make) -> int | None:
    """Predict the bytes of an optimizer's state by a step on random gradients of random parameters.

    Every part of a state has one or two sides of a weight, or ranks, as its own. In the scale t of copies of
    the parameters whose sides are all t times as long, the bytes are then a t^2 + b t + c; three small copies
    tell a, b and c, exactly where the sides can be divided.

    Args:
        trained: the parameters that train; they need no values.
        make: see `predict`.

    Returns:
        The bytes, or None where the optimizer cannot take that step.
    """
    total, divisor = sum(p.numel() for _, p in trained), 1
    while total / divisor**2 > DIRECT:
        divisor *= 2
    try:
        if divisor == 1:
            return _state_after_a_step(trained, make, 1)
        counts = [_state_after_a_step(trained, make, divisor * more) for more in (1, 2, 4)]
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return None
    return _at_full_size([1 / divisor, 0.5 / divisor, 0.25 / divisor], counts)


def _at_full_size(scales: Sequence[float], counts: Sequence[int]) -> int:
    """Return the value at 1 of the parabola through three points, by Lagrange's formula."""
    value = 0.0
    for i, (scale, count) in enumerate(zip(scales, counts, strict=True)):
        weight = 1.0
        for j, other in enumerate(scales):
            weight *= 1.0 if i == j else (1.0 - other) / (scale - other)
        value += weight * count
    return round(value)


def _state_after_a_step(trained: Sequence[tuple[str, nn.Parameter]], make: Make, divisor: int) -> int:
    generator = torch.Generator().manual_seed(0)
    copies = []
    for name, parameter in trained:
        shape = [max(1, side // divisor) for side in parameter.shape]
        copy = nn.Parameter(torch.randn(shape, generator=generator).to(parameter.dtype))
        copy.grad = torch.randn(shape, generator=generator).to(parameter.dtype)
        copies.append((name, copy))
    optimizer = make(copies, divisor)
    optimizer.step()
    return state_bytes(optimizer)


# Counting ---------------------------------------------------------------------------------------------


def held_bytes(tensor: Tensor) -> int:
    """Return the bytes that a tensor holds in this process, quantised and sharded ones too."""
    if hasattr(tensor, "to_local"):
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(held_bytes(tensor) for tensor in tensors.values())


def gradient_bytes(model: nn.Module) -> int:
    """Return the bytes of the gradients that are there."""
    return sum(held_bytes(p.grad) for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: Any) -> int:
    """Return the bytes of the tensors in an optimizer's state.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(3, requires_grad=True)], lr=0.1)
        >>> state_bytes(optimizer)
        0
    """
    states = unwrapped(optimizer).state.values()
    return sum(held_bytes(v) for state in states for v in state.values() if isinstance(v, Tensor))


@contextmanager
def kept_for_backward(model: nn.Module) -> Iterator[dict[int, int]]:
    """Count what forward passes in the block keep for the backward pass, but the model's own tensors.

    Yields:
        Bytes by storage.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


class Watched:
    """What was counted while a model trained, the most that there was of each.

    Attributes:
        gradients, optimizer, activations: bytes, or None before they are counted.
        handles: of hooks that count in the first backward pass.
    """

    def __init__(self) -> None:
        self.gradients: int | None = None
        self.optimizer: int | None = None
        self.activations: int | None = None
        self.handles: list[Any] = []

    def watch_backward(self, model: nn.Module) -> None:
        """Count the gradients that are alive whenever another one is there, in the first backward pass."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def count(parameter: Tensor) -> None:
            self.gradients = max(self.gradients or 0, gradient_bytes(model))

        self.handles += [p.register_post_accumulate_grad_hook(count) for p in trained]

    def result(self, model: nn.Module) -> StepMemory:
        """Return all that was counted, and the weights as they are."""
        return StepMemory(weight_bytes(model), self.gradients, self.optimizer, self.activations)

    def callback(self) -> "TrainerCallback":
        """Return a Trainer's callback that counts around every step."""
        from transformers import TrainerCallback

        watched = self

        class Counting(TrainerCallback):
            """Counts gradients before a step, and the optimizer's state after it."""

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """Count gradients."""
                watched.gradients = max(watched.gradients or 0, gradient_bytes(kwargs["model"]))

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                """Count the optimizer's state."""
                for handle in watched.handles:
                    handle.remove()
                watched.handles.clear()
                watched.optimizer = max(watched.optimizer or 0, state_bytes(kwargs["optimizer"]))

        return Counting()
