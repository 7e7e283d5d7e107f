"""What a model achieves on examples: accuracy of a classifier, loss and perplexity of a language model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from rankfold.training.examples import IGNORED, Example

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """A measured metric.

    Args:
        loss: mean cross-entropy in nats: per example of a classifier, per counted token of a language model.
        accuracy: share of examples whose most probable class is right; None for a language model.
        count: how many examples or tokens were counted.
    """

    loss: float
    accuracy: float | None
    count: int

    @property
    def perplexity(self) -> float | None:
        """exp(loss) of a language model; None for a classifier."""
        return None if self.accuracy is not None else math.exp(min(self.loss, 700.0))

    def to_dict(self) -> dict[str, float | None]:
        """Return what has a value, by name; None stands for what is not finite, which JSON cannot say."""
        values = {**asdict(self), "perplexity": self.perplexity}
        given = {name: value for name, value in values.items() if value is not None}
        return {name: value if math.isfinite(value) else None for name, value in given.items()}

    def __str__(self) -> str:
        """Return the metric that a person compares, as text."""
        if self.accuracy is not None:
            return f"accuracy {self.accuracy:.3f}"
        return f"loss {self.loss:.3f}, perplexity {self.perplexity:.4g}"


def evaluate(
    model: "nn.Module",
    examples: Sequence[Example],
    collate: Callable[[list[Example]], dict[str, Any]],
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> Score:
    """Measure `model` on `examples`, each token or example counted once whatever the batches.

    Args:
        model: returns `.logits` of shape (batch, classes) or (batch, tokens, vocabulary).
        examples: `input_ids` and `labels`, not empty.
        collate: makes a batch of a list of examples.
        batch_size: examples per forward pass.
        autocast: the dtype to compute in, or None for the model's own.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, right, count = 0.0, 0, 0
    with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for start in range(0, len(examples), batch_size):
            batch = collate(list(examples[start : start + batch_size]))
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            logits, labels = _counted(model(**inputs).logits, batch["labels"].to(device))
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            right += int((logits.argmax(-1) == labels).sum())
            count += len(labels)
    model.train(was_training)
    classifier = isinstance(examples[0]["labels"], int)
    return Score(loss / count, right / count if classifier else None, count)


def mean_loss(outputs: Any, labels: "Tensor", num_items_in_batch: "Tensor | int | None" = None) -> "Tensor":
    """Return the cross-entropy per counted label, in the form that transformers' Trainer calls.

    Several forward passes of one step are weighed by what they count. Models do this each in its own way, and
    classifiers not at all: their gradients would grow with the number of passes.

    Args:
        outputs: has `.logits` of shape (batch, classes) or (batch, tokens, vocabulary).
        labels: (batch,) or (batch, tokens).
        num_items_in_batch: counted labels of all passes of the step; None counts those of this one.
    """
    logits, counted = _counted(outputs.logits, labels)
    items = len(counted) if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(logits, counted, reduction="sum") / items


def _counted(logits: "Tensor", labels: "Tensor") -> "tuple[Tensor, Tensor]":
    """Pair each counted label with the logits that predict it: (n, classes) in float32, and (n,)."""
    if labels.ndim == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return logits[counted].float(), labels[counted]
