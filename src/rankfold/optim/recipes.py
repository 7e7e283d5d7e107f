"""What the named projected optimizers share: how they register, and which parameters they project."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ..catalogue import StepZero, register
from ..errors import InvalidOption
from .widths import tables

_STEP = StepZero("exact")
_PLAIN = ("embed", "lm_head")


def optimizer(name: str, **about: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a named optimizer: `build(params, lr, *, options) -> torch.optim.Optimizer`.

    Args:
        name: in the catalogue.
        about: title, year, arxiv, code, formula, status: see `Method`.
    """
    return register("optim", name, start=_STEP, **about)


def groups(params: Any, rank: int | None, plain: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Return two groups, the projected weights and the others.

    Args:
        params: a model, (name, parameter) pairs, parameters, or groups (which are returned as they are).
        rank: of the projection; weights that are too small for it are not projected.
        plain: words in the names of weights that are not projected either, see `is_plain`.

    Raises:
        InvalidOption: there is no parameter that is trained.

    Example:
        >>> from torch import nn
        >>> made = groups(nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)), 4, plain=("0.",))
        >>> [(len(group["params"]), group["rank"]) for group in made]
        [(1, 4), (2, None)]
    """
    listed: list[Any] = list(params.named_parameters() if isinstance(params, nn.Module) else params)
    if not listed:
        raise InvalidOption("there is nothing to optimize: no parameters were given")
    if isinstance(listed[0], dict):
        return listed
    pairs = [p if isinstance(p, tuple) else (str(i), p) for i, p in enumerate(listed)]
    pairs = [(name, p) for name, p in pairs if p.requires_grad]
    stays = is_plain(params, plain)
    low = [(name, p) for name, p in pairs if _fits(p, rank) and not stays(name)]
    chosen = {name for name, _ in low}
    rest = [(name, p) for name, p in pairs if name not in chosen]
    found: list[dict[str, Any]] = [{"params": low, "rank": rank}, {"params": rest, "rank": None}]
    if not pairs:
        raise InvalidOption("there is nothing to optimize: no parameter is trained")
    return [group for group in found if group["params"]]


def is_plain(params: Any, words: Iterable[str] | None) -> Callable[[str], bool]:
    """Return what tells by a name whether a weight is moved by Adam alone.

    Args:
        params: a model, or anything else.
        words: that are in such names; None means the tables of a model's embeddings and heads, and names with
            "embed" or "lm_head" where no model is given.

    Example:
        >>> from torch import nn
        >>> model = nn.ModuleDict({"wte": nn.Embedding(9, 8), "mid": nn.Linear(8, 8)})
        >>> stays = is_plain(model, None)
        >>> stays("wte.weight"), stays("mid.weight")
        (True, False)
    """
    if words is None and isinstance(params, nn.Module):
        return tables(params).__contains__
    known = _PLAIN if words is None else tuple(words)
    return lambda name: any(word in name for word in known)


def _fits(parameter: Tensor, rank: int | None) -> bool:
    if rank is None or parameter.dim() < 2:
        return False
    return min(parameter.shape[0], parameter.numel() // max(1, parameter.shape[0])) >= rank
