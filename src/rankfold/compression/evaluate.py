"""What a compression costs and saves: measurements of a model, before and after."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankfold.compression.prepare import Collate, Prepared
from rankfold.errors import RankfoldError
from rankfold.layers import StructuredEmbedding, StructuredLayer, count
from rankfold.layers.targets import candidates
from rankfold.statistics.watched import layers_at
from rankfold.training.examples import Example
from rankfold.training.metrics import Score, evaluate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPEATS = 5  # forward passes whose median is the latency


@dataclass(frozen=True)
class Measured:
    """A model, measured.

    Attributes:
        numbers: in the model.
        flops: two for every multiply-add of its weights, per token; per position of a convolution.
        seconds: of the forward pass of one batch, the median of a few; None where there is no text.
        score: perplexity of a language model, accuracy of a classifier; None of others.
        pooled: (texts, channels), the mean of every text's last hidden states, of a model without a score.
    """

    numbers: int
    flops: int
    seconds: float | None = None
    score: Score | None = None
    pooled: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the measurements as plain data."""
        return {
            "parameters": self.numbers,
            "flops_per_token": self.flops,
            "latency_seconds": self.seconds,
            "score": None if self.score is None else self.score.to_dict(),
        }


def measured(prepared: Prepared) -> Measured:
    """Measure a model on the text that is held out."""
    model, rows = prepared.model, list(prepared.unseen)
    numbers, flops = count(model).stored, 2 * multiply_adds(model)
    if not rows:
        return Measured(numbers, flops)
    size, put = prepared.config.batch_size, prepared.collate
    seconds = latency(model, put(rows[:size]))
    if "labels" not in rows[0]:
        return Measured(numbers, flops, seconds, pooled=pooled(model, rows, put, size))
    return Measured(numbers, flops, seconds, evaluate(model, rows, put, batch_size=size))


def multiply_adds(model: nn.Module) -> int:
    """Return the multiply-adds of a model's weights for one token, or one position of a convolution.

    Lookups are free; products of activations with each other, as in attention, are not counted.

    Args:
        model: any module, adapted or not.

    Example:
        >>> import torch
        >>> multiply_adds(torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3)))
        12
    """
    return sum(_layer_macs(layer) for layer in _layers(model))


def _layers(model: nn.Module) -> list[StructuredLayer]:
    found: list[StructuredLayer] = []
    for target in candidates(model):
        with contextlib.suppress(RankfoldError):  # what has no weight of its own multiplies by none
            found += layers_at(model, [target.path]).values()
    return found


def _layer_macs(layer: StructuredLayer) -> int:
    if isinstance(layer, StructuredEmbedding):
        return 0
    return math.prod(layer.shape) if layer.expression is None else layer.expression.macs(1)


@torch.no_grad()
def latency(model: nn.Module, batch: Mapping[str, Tensor], repeats: int = REPEATS) -> float:
    """Return the seconds of a forward pass, the median of a few after one that is not counted."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    return statistics.median([_seconds(model, inputs) for _ in range(repeats + 1)][1:])


def _seconds(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    on_gpu = next(iter(inputs.values())).is_cuda
    began = time.perf_counter()
    model(**inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.no_grad()
def pooled(model: PreTrainedModel, rows: Sequence[Example], put: Collate, size: int) -> Tensor:
    """Return the mean of every text's last hidden states, without padding: (texts, channels) in float32."""
    found, device = [], next(model.parameters()).device
    for start in range(0, len(rows), size):
        batch = {name: value.to(device) for name, value in put(list(rows[start : start + size])).items()}
        last = model(**batch, output_hidden_states=True).hidden_states[-1].float()
        mask = batch["attention_mask"][..., None].to(last)
        found.append((last * mask).sum(1) / mask.sum(1))
    return torch.cat(found).cpu()


def similarity(before: Tensor, after: Tensor) -> float:
    """Return the mean cosine between the rows of two matrices (texts, channels), in [-1, 1]."""
    return float(nn.functional.cosine_similarity(before, after, dim=-1).mean())


def compared(before: Measured, after: Measured, predicted: int) -> dict[str, Any]:
    """Return what two measurements say together, as plain data.

    Args:
        before: of the model as it was.
        after: of the compressed one.
        predicted: how many numbers the compressed model was to have.
    """
    facts: dict[str, Any] = {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "predicted_parameters": predicted,
        "parameters_ratio": after.numbers / before.numbers,
        "flops_ratio": after.flops / max(1, before.flops),
    }
    if before.seconds is not None and after.seconds is not None:
        facts["latency_ratio"] = after.seconds / before.seconds
    if before.pooled is not None and after.pooled is not None:
        facts["similarity"] = similarity(before.pooled, after.pooled)
    return facts


def said(facts: Mapping[str, Any]) -> str:
    """Return the comparison for a person.

    Args:
        facts: of `compared`.
    """
    before, after = facts["before"], facts["after"]
    lines = {
        "parameters": f"{before['parameters']:,} became {after['parameters']:,} "
        f"({facts['predicted_parameters']:,} predicted, {100 * facts['parameters_ratio']:.1f} %)",
        "flops": f"{before['flops_per_token']:,} became {after['flops_per_token']:,} per token "
        f"({100 * facts['flops_ratio']:.1f} %)",
    }
    if "latency_ratio" in facts:
        times = [1e3 * each["latency_seconds"] for each in (before, after)]
        lines["latency"] = f"{times[0]:.1f} ms became {times[1]:.1f} ms ({facts['latency_ratio']:.2f} times)"
    for name in ("perplexity", "accuracy"):
        values = [(each["score"] or {}).get(name) for each in (before, after)]
        if None not in values:
            lines[name] = f"{values[0]:.4g} became {values[1]:.4g}"
    if "similarity" in facts:
        lines["similarity"] = f"{facts['similarity']:.4f}, mean cosine to the original on unseen text"
    return "\n".join(f"{name:<11} {line}" for name, line in lines.items())
