"""u-muP: every weight starts at N(0, 1), and the width stands in the layers and the learning rates.

                 output times    gradient to the input times    Adam's lr times
    hidden       1 / sqrt(in)    1 / sqrt(in)                   1 / sqrt(in)
    head         1 / in          1 / sqrt(in)                   1
    embedding    1                                              1 / sqrt(width)
    gain, bias                                                  1
    in D blocks                                                 the above / sqrt(D)

Blake et al. 2024: muP with unit scaling. Activations, weights and gradients start with a root mean square
near 1 at any width, so no base width is needed and half precision loses little. The gradients of weights
are divided by the root of how many positions they sum over. lr is of the order of 1. Decay is independent
of lr: the share that is given is what is subtracted, being divided by each group's lr here. `u_mup` returns
groups for any optimizer of Adam's kind. `u_mup_model` draws the weights, seeded by name, and lets linear
layers, embeddings and the head multiply as above; stock weights with these rates do not train well, nor do
these weights in stock layers. Start: `u_mup_model` makes a new model.

Deviations: the gradient to a hidden layer's input is the true one, as in the official code, whose scales
are constrained to agree; that to the head's input is the paper's, where the code has the root of what the
head writes. What stands between layers is the model's own code and is not scaled: the sum of a branch and
its skip (`residual_weights` gives its factors), attention, activation functions, gains, the loss. So long
as the model's code has none of these factors, the root mean square of 1 holds for chains of layers and
norms only. Convolutions and others with matrices are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InvalidOption, UnsupportedLayer
from ...layers.targets import blocks
from ..recipes import optimizer
from ..seeds import hashed
from ..unit_scale import scale_embedding, scale_linear
from ..widths import embedding_tables, tables
from .mup import grouped


@optimizer(
    "u-mup",
    title="u-μP: The Unit-Scaled Maximal Update Parametrization",
    year=2024,
    arxiv="2407.17465",
    code="graphcore-research/unit-scaling",
    formula="W ~ N(0, 1), y = W x / sqrt(in), lr(hidden) = lr / sqrt(in), logits = U x / in",
    traits={
        "use": "Gives the groups of parameters that any optimizer of Adam's kind takes; call "
        "`rf.optim.u_mup_model` on the new model before.",
        "cost": "None: rates and decays of groups are numbers, and a layer's factor multiplies its output.",
    },
)
def u_mup(model: nn.Module, lr: float = 0.5, *, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Return parameter groups.

    Args:
        model: made by `u_mup_model`.
        lr: learning rate, of the order of 1.
        weight_decay: share of a weight that is subtracted in a step, whatever the learning rate.

    Raises:
        InvalidOption: the learning rate is not above 0.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Linear(64, 64))
        >>> groups = rf.optim.u_mup(rf.optim.u_mup_model(model), 1.0)
        >>> [(group["name"], group["lr"]) for group in groups]
        [('hidden', 0.25), ('vector', 1.0), ('hidden', 0.125)]
    """
    if lr <= 0:
        raise InvalidOption(f"u-mup: lr must be above 0, as decay is divided by it, not {lr}")
    rates = [(kind, name, p, lr * factor) for kind, name, p, factor in _kinds(model)]
    return grouped((kind, name, p, rate, weight_decay / rate) for kind, name, p, rate in rates)


def _kinds(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter, float]]:
    """Yield every trained parameter with its kind and what its learning rate is multiplied by."""
    embeddings, depths = embedding_tables(model), _depths(model)
    heads = tables(model) - embeddings
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            depth = next((depth for path, depth in depths.items() if name.startswith(path)), 1)
            kind = "vector" if parameter.dim() < 2 else "head" if name in heads else "hidden"
            kind = "embedding" if name in embeddings else kind
            wide = kind in ("hidden", "embedding")
            factor = math.prod(parameter.shape[1:]) ** -0.5 if wide else 1.0
            yield kind, name, parameter, factor / math.sqrt(depth)


def _depths(model: nn.Module) -> dict[str, int]:
    """Return the length of the list that a block stands in, by the start of its parameters' names."""
    paths = [f"{target.path}." for target in blocks(model)]
    lists = [path.rstrip(".").rpartition(".")[0] for path in paths]
    return {path: lists.count(owner) for path, owner in zip(paths, lists, strict=True)}


def u_mup_model(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw the weights of a new model and scale its layers, in place.

    Args:
        model: of linear layers, embeddings, and what has vectors only.
        seed: of the weights, with their names.

    Returns:
        The model.

    Raises:
        UnsupportedLayer: another layer has a matrix.

    Example:
        >>> model = u_mup_model(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)))
        >>> round(model(torch.randn(64, 512)).square().mean().item())
        1
    """
    _require_scaled(model)
    for name, parameter in model.named_parameters():
        _draw(name, parameter, seed)
    heads = tables(model) - embedding_tables(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            is_head = f"{path}.weight".lstrip(".") in heads or _is_tied(model, layer)
            scale_linear(layer, 1 / (layer.in_features if is_head else math.sqrt(layer.in_features)))
        elif isinstance(layer, nn.Embedding):
            scale_embedding(layer)
    return model


def _require_scaled(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.dim() > 1 and not isinstance(layer, nn.Linear | nn.Embedding):
                raise UnsupportedLayer(
                    f"{path}.{name} is of a {type(layer).__name__}, for which u-mup has no scale here"
                )


@torch.no_grad()
def _draw(name: str, parameter: Tensor, seed: int) -> None:
    if parameter.dim() > 1:
        generator = torch.Generator().manual_seed(hashed(seed, "u-mup", name))
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    elif name.endswith("bias"):
        parameter.zero_()


def _is_tied(model: nn.Module, layer: nn.Linear) -> bool:
    return any(layer.weight is m.weight for m in model.modules() if isinstance(m, nn.Embedding))


def residual_weights(blocks: int, residual: float = 1.0, attention: float = 1.0) -> list[tuple[float, float]]:
    """Return the factors of every branch and of its skip, of blocks with attention and a feed-forward part.

        x <- a f(x) + b x,   a = tau / sqrt(tau^2 + 1),   b = 1 / sqrt(tau^2 + 1)

    Args:
        blocks: how many; each has two branches, attention first.
        residual: what the branches contribute against the embedding.
        attention: what attention contributes against the feed-forward parts.

    Returns:
        (a, b) of 2 * blocks branches.

    Example:
        >>> [(round(a, 3), round(b, 3)) for a, b in residual_weights(1)]
        [(0.707, 0.707), (0.577, 0.816)]
    """
    of_feedforward = residual * math.sqrt(2 / (1 + attention**2))
    shares = (attention * of_feedforward, of_feedforward)
    total, found = float(blocks), []
    for branch in range(2 * blocks):
        share = shares[branch % 2] ** 2
        found.append((math.sqrt(share / (total + share)), math.sqrt(total / (total + share))))
        total += share
    return found
