"""Losses that routed adapters want beside the model's own, inside transformers' Trainer."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rankfold.errors import Incompatible
from rankfold.layers import adaptation_of, auxiliary_loss
from rankfold.methods.routing import draws_experts, remix_loss

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import Trainer


# A callback is not told which Trainer calls it.
_ROUTED: ContextVar[bool] = ContextVar("rankfold_routed_trainer", default=False)


def routed_trainer() -> type[Trainer]:
    """Return the Trainer's class, which also trains the routers of mixtures.

    The balance losses of mixtures are added to the loss; experts that are drawn learn by `remix_loss`.
    """
    from transformers import Trainer

    class RoutedTrainer(Trainer):
        """Adds what the layers of an adapted model want to the loss of training."""

        def train(self, *args: Any, **kwargs: Any) -> Any:
            """Train, and let callbacks know that the losses of routers are seen to."""
            token = _ROUTED.set(True)
            try:
                return super().train(*args, **kwargs)
            finally:
                _ROUTED.reset(token)

        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """Return the loss, and the outputs where they are asked for."""
            root = adapted_root(self.accelerator.unwrap_model(model))
            if not model.training or root is None:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            steps = self.current_gradient_accumulation_steps
            if draws_experts(root):
                return remix_loss(root, inputs) / steps
            loss: Any = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return loss + auxiliary_loss(root).to(loss) / steps

    return RoutedTrainer


def adds_losses() -> bool:
    """Say whether the Trainer that is training adds the losses of routers itself."""
    return _ROUTED.get()


def refuse_unrouted(model: nn.Module) -> None:
    """Refuse experts that are drawn in a Trainer that gives their router no gradient.

    Raises:
        Incompatible: an adapter in use draws experts, and no routed Trainer is training.
    """
    if draws_experts(model) and not adds_losses():
        raise Incompatible(
            "the router of experts that are drawn (remix) learns by rankfold.remix_loss alone, which this "
            "Trainer does not compute: take the class of rankfold.training.routed.routed_trainer(), or "
            "derive yours from it"
        )


def adapted_root(model: nn.Module) -> nn.Module | None:
    """Return the module that holds adapters: a model or a part of it, or None."""
    return next((m for m in model.modules() if adaptation_of(m) is not None), None)


def add_to_loss(model: nn.Module, accumulated: int) -> RemovableHandle:
    """Let a model's forward add the losses of its layers to the loss that it returns in training.

    Args:
        model: the adapted model.
        accumulated: forwards per step; a loss that is divided by the items of a whole step gets its share.
    """

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        loss = output.get("loss") if isinstance(output, dict) else None
        if module.training and isinstance(loss, Tensor):
            steps = accumulated if kwargs.get("num_items_in_batch") is not None else 1
            output["loss"] = loss + auxiliary_loss(module).to(loss) / steps
        return output

    return model.register_forward_hook(hook, with_kwargs=True)
