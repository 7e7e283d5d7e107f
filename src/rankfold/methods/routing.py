"""What routed structures share: how their experts start, how draws are scored and learnt from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InvalidOption, InvalidRank, NotAdapted
from ..layers import require
from ..weights import Base, Dense, Router, Sum
from .site import Factors, Site


def check_experts(name: str, experts: int, top_k: int | None) -> None:
    """Refuse impossible numbers of experts.

    Raises:
        InvalidOption: with both numbers.
    """
    if experts < 1 or not 1 <= (experts if top_k is None else top_k) <= experts:
        raise InvalidOption(
            f"{name}: experts must be at least 1 and top_k from 1 to experts, not {experts} and {top_k}"
        )


def expert_factors(site: Site, rank: int, experts: int, scaling: float, shared: bool = False) -> Factors:
    """Return the starts of experts side by side: up (out, E r), down (E r, in), or (r, in) where shared."""
    each = [replace(site, block_name=f"expert{e}").factors(rank, scaling) for e in range(experts)]
    downs = each[:1] if shared else each
    return Factors(torch.cat([f.up for f in each], 1), torch.cat([f.down for f in downs]), each[0].start)


def router_leaf(site: Site, experts: int) -> Dense:
    """Return R (E, in), started as a linear layer's weight is."""
    bound = 1 / math.sqrt(site.shape[1])
    return site.trained(site.uniform("router", experts, site.shape[1], bound=bound), "router")


def taken_factors(site: Site, adapter: str, rank: int, method: str) -> Factors:
    """Return the low-rank change that another adapter of the model makes, padded with zeros to a rank.

    Where that adapter leaves the weight alone, both factors are zero; so they are while shapes are built that
    a file will fill.

    Raises:
        InvalidOption: the model has no such adapter, or its change has no low rank.
        InvalidRank: its rank is larger.
    """
    up, down = site.zeros(site.shape[0], rank), site.zeros(rank, site.shape[1])
    if not site.blank and adapter not in site.known_adapters:
        raise InvalidOption(f"{method}: the model has no adapter {adapter!r}; it has {site.known_adapters}")
    if site.blank or adapter not in site.layer.adapters:
        return Factors(up, down, "displaced")
    expression: Any = site.layer.adapters[adapter]
    terms = [t for t in expression.parts() if not isinstance(t, Base)] if isinstance(expression, Sum) else []
    pair = Sum(*terms).factored() if terms and expression.has_matrix() else None
    if pair is None:
        raise InvalidOption(f"{method} takes adapters that add a low-rank change, and {adapter!r} does not")
    size = pair[0].shape[1]
    if size > rank:
        raise InvalidRank(f"{site.path}: {adapter!r} has rank {size}; pass rank={size} or more to {method}")
    up[:, :size], down[:size] = pair[0].detach(), pair[1].detach()
    return Factors(up, down, "displaced")


def check_taken(
    sites: Mapping[str, Any], ranks: Mapping[str, int], adapters: Sequence[str], method: str
) -> None:
    """Refuse adapters to be taken of which one is named twice, or which leave all the weights as they are.

    Args:
        sites: the weights, by path.
        ranks: of the factors, by path.
        adapters: their names.
        method: that takes them.

    Raises:
        InvalidOption: that is so.
    """
    twice = next((name for name in adapters if list(adapters).count(name) > 1), None)
    if twice is not None:
        raise InvalidOption(f"{method}: experts names {twice!r} twice")
    pairs = (
        taken_factors(site, name, ranks[path], method) for path, site in sites.items() for name in adapters
    )
    blank = any(site.blank for site in sites.values())
    if not blank and not any((pair.up.any(0) & pair.down.any(1)).any() for pair in pairs):
        names, paths = ", ".join(map(repr, adapters)), list(sites)
        more = "" if len(paths) < 4 else ", ..."
        raise InvalidOption(
            f"{method}: {names} change{'s' * (len(adapters) == 1)} none of {', '.join(paths[:3])}{more} "
            f"({len(paths)} targets): train them first, or name targets that they change"
        )


def log_probability(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return log p of drawing these experts in this order without replacement, (...).

    Args:
        logits: (..., E).
        chosen: (..., k) distinct experts.

    Example:
        >>> import torch
        >>> log_probability(torch.zeros(4), torch.tensor([2, 0])).exp()
        tensor(0.0833)
    """
    total = logits.new_zeros(logits.shape[:-1])
    for place in chosen.unbind(-1):
        total = total + logits.log_softmax(-1).gather(-1, place[..., None])[..., 0]
        logits = logits.scatter(-1, place[..., None], -torch.inf)
    return total


def example_losses(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of every example, (batch,), of a model that gives logits for labels.

    Cross-entropy for whole numbers, of the next token where there are logits per token; for fractions the
    mean square, or with several of them per example the binary cross-entropy.
    """
    if "labels" not in batch:
        raise InvalidOption("remix_loss reads batch['labels']; pass loss=callable(model, batch) otherwise")
    labels: Tensor = batch["labels"]
    logits: Tensor = model(**batch).logits.float()
    if labels.is_floating_point() and labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels).square()
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    mean: Tensor = losses.sum(1) / (labels != -100).sum(1).clamp_min(1)
    return mean


def _per_example(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise InvalidOption(
            f"remix_loss needs the loss of every example, (batch,), not {given}: a loss that is a mean "
            "already tells the router nothing"
        )
    return losses


def draws_experts(model: nn.Module) -> bool:
    """Say whether an adapter in use draws experts, whose router learns by `remix_loss` alone."""
    adaptation = require(model)
    used = [e for name in adaptation.active for e in adaptation.expressions(name).values()]
    routers = [part for e in used for part in e.modules() if isinstance(part, Router)]
    return any(getattr(router.policy, "draws", False) for router in routers)


def leave_one_out(losses: Tensor) -> Tensor:
    """Return the weights of the draws' scores, whose sum is an unbiased gradient of the mean loss.

    Args:
        losses: (draw, ...), at least two draws.

    Example:
        >>> leave_one_out(torch.tensor([3.0, 1.0]))
        tensor([ 1., -1.])
    """
    return (losses - losses.mean(0)).detach() / (len(losses) - 1)


def remix_loss(
    model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None = None, draws: int = 2
) -> Tensor:
    """Return a scalar loss whose gradient trains experts and routers of a model adapted by remix.

    Args:
        model: in training mode.
        batch: what `loss` takes.
        loss: `loss(model, batch)` returns every example's loss, (batch,); by default cross-entropy of the
            logits of `model(**batch)` with `batch["labels"]`, shifted by one where logits are per token.
        draws: M, selections per example, at least 2; the batch runs through the model as often.

    Raises:
        NotAdapted: no adapter of the model has drawn experts.
        InvalidOption: fewer than two draws, or the loss is not one of every example.
    """
    if draws < 2:
        raise InvalidOption(f"remix compares draws with each other: draws must be at least 2, not {draws}")
    losses, scores = [], []
    for _ in range(draws):
        losses.append(_per_example((loss or example_losses)(model, batch)))
        left = require(model).carrier.read_drawn().values()
        if not left:
            raise NotAdapted("no remix adapter has drawn experts: adapt with remix, and call model.train()")
        scores.append(torch.stack([score() for score in left]).sum(0))
        if losses[-1].shape != scores[-1].shape:
            raise InvalidOption(
                f"remix_loss needs the loss of every example, {tuple(scores[-1].shape)}, not one of shape "
                f"{tuple(losses[-1].shape)}"
            )
    rewards, log_p = torch.stack(losses), torch.stack(scores)
    policy = (leave_one_out(rewards) * (log_p - log_p.detach())).sum(0).mean()
    return rewards.mean() + policy.to(rewards.dtype)
