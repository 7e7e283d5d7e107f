"""Dynamics and dynamic ranks inside transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rankfold.errors import MissingDependency
from rankfold.layers import adaptation_of
from rankfold.methods.attach import attach
from rankfold.training.routed import adapted_root, add_to_loss, adds_losses, refuse_unrouted

if TYPE_CHECKING:
    from transformers import TrainerCallback as Base


def TrainerCallback(  # noqa: N802  # stands where the library's class of that name would
    *, validation: Iterable[Any] | None = None, loss: Callable[[nn.Module, Any], Tensor] | None = None
) -> Base:
    """Return a callback that attaches the adapter's dynamics to a Trainer's optimizer while it trains.

    What the dynamics remember is in the optimizer's state, so the Trainer's checkpoints resume them. Dynamics
    that set learning rates by side, and gates under weight decay, need parameter groups of their own, so give
    the Trainer an optimizer that is made from them:

        optimizer = torch.optim.AdamW(rf.param_groups(model, lr=1e-3))
        Trainer(model, ..., callbacks=[rf.TrainerCallback()], optimizers=(optimizer, None))

    The balance losses of routed mixtures are added to the loss that the model returns. Experts that are drawn
    (remix) learn by a loss of their own, so their Trainer has to be the class that
    `rankfold.training.routed.routed_trainer()` returns, or one derived from it; another is refused when
    training begins (`Incompatible`).

    Args:
        validation: batches, for dynamics that need them.
        loss: `loss(model, batch)`, for dynamics that need it. Steps and scheduler are the Trainer's.

    Raises:
        MissingDependency: transformers is not installed.

    Example:
        >>> import rankfold as rf
        >>> rf.TrainerCallback()  # doctest: +ELLIPSIS
        <...AttachedTraining object at ...>
    """
    try:
        from transformers import TrainerCallback as Base
    except ImportError:
        raise MissingDependency(
            "the Trainer's callback needs transformers: pip install 'rankfold[transformers]'"
        ) from None

    class AttachedTraining(Base):
        """Attaches when training begins and lets go when it ends."""

        handle: Any = None
        hook: Any = None

        def on_train_begin(
            self,
            args: Any,
            state: Any,
            control: Any,
            *,
            model: Any = None,
            optimizer: Any = None,
            **kwargs: Any,
        ) -> None:
            """Attach to the optimizer, whose state has been loaded where training resumes."""
            if self.handle is not None:  # of a training that was interrupted
                self.on_train_end(args, state, control)
            adapted = adapted_root(model) or model
            if adaptation_of(adapted) is not None:
                refuse_unrouted(adapted)
                if not adds_losses():
                    self.hook = add_to_loss(adapted, args.gradient_accumulation_steps)
            scheduler = kwargs.get("lr_scheduler")
            self.handle = attach(
                adapted,
                optimizer,
                total_steps=state.max_steps,
                scheduler=scheduler,
                validation=validation,
                loss=loss,
            )

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Let the methods finish."""
            self.handle.remove()
            if self.hook is not None:
                self.hook.remove()

    return AttachedTraining()
