"""Training a network that predicts networks: sampled architectures take the losses of their predictions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import InvalidOption
from .limits import in_range
from .networks import graph_of
from .scratch.logah import GraphHypernetwork

Batch = tuple[Tensor, Tensor]


def train_hypernetwork(
    predictor: GraphHypernetwork,
    sample: Callable[[torch.Generator], nn.Module],
    batches: Iterable[Batch],
    *,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    networks: int = 1,
    lr: float = 3e-4,
    weight_decay: float = 1e-2,
    clip: float = 5.0,
    warmup: float = 0.05,
    seed: int = 0,
) -> list[float]:
    """Train a predictor so that networks are good with the weights that it predicts.

    In every step some networks are sampled, predicted and run on one batch, and the gradient of their mean
    loss goes back into the predictor. AdamW; the learning rate climbs linearly, then falls along a cosine.
    Zhou et al. 2024.

    Args:
        predictor: is trained in place.
        sample: `sample(generator)` returns a network of the family, drawn with the generator.
        batches: (inputs, targets), gone through again when they end; not empty.
        steps: at least 1.
        loss: of a network's output and the targets.
        networks: sampled in one step.
        lr: the largest learning rate.
        weight_decay: of AdamW.
        clip: largest norm of the predictor's gradient; infinity leaves it as it is.
        warmup: share of the steps in which the rate climbs, in [0, 1).
        seed: of the sampling.

    Returns:
        The mean loss of every step.

    Raises:
        InvalidOption: an option is impossible, or there is no batch.
    """
    in_range("train_hypernetwork", "[1, inf)", steps=steps, networks=networks)
    in_range("train_hypernetwork", "[0, 1)", warmup=warmup)
    in_range("train_hypernetwork", "(0, inf)", lr=lr)
    in_range("train_hypernetwork", "(0, inf]", clip=clip)
    in_range("train_hypernetwork", "[0, inf)", weight_decay=weight_decay)
    known = list(batches)
    if not known:
        raise InvalidOption("train_hypernetwork needs at least one batch")
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, warmup))
    losses = []
    for batch in itertools.islice(itertools.cycle(known), steps):
        optimizer.zero_grad()
        sampled = [_loss(predictor, sample(generator), batch, loss) / networks for _ in range(networks)]
        total = torch.stack(sampled).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(predictor.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(total.item())
    return losses


def _loss(
    predictor: GraphHypernetwork, network: nn.Module, batch: Batch, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    predicted = predictor(graph_of(network))
    return loss(functional_call(network, predicted, (batch[0],)), batch[1])


def _rate(step: int, steps: int, warmup: float) -> float:
    """Return the share of the largest learning rate."""
    climb = warmup * steps
    if step < climb:
        return (step + 1) / (climb + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - climb) / max(1.0, steps - climb)))
