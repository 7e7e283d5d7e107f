"""The optimizer of a run, by name."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

import rankfold as rf
from rankfold.catalogue import Method, get, methods, require_kind
from rankfold.errors import Incompatible, InvalidOption, InvalidRank, UnknownMethod, near_names
from rankfold.layers import adaptation_of
from rankfold.optim import ProjectedOptimizer
from rankfold.optim.widths import tables
from rankfold.pretrain.config import PretrainConfig
from rankfold.pretrain.model import OPTIMIZER, usual_rank

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAMW = "adamw"
ADAMW_RATE = 1e-3
ADAMW_OPTIONS: tuple[str, ...] = ("weight_decay", "betas", "eps", "amsgrad", "fused", "foreach")

Named = list[tuple[str, nn.Parameter]]


def check_optimizer(name: str, options: Mapping[str, Any]) -> float:
    """Refuse what is no optimizer, and options that it has not; return its usual learning rate.

    Raises:
        UnknownMethod: there is none of that name.
        InvalidOption: it has no such option, or one of another kind, or is no optimizer.
    """
    method = None if name == ADAMW else _named(name)
    rate = ADAMW_RATE if method is None else usual_rate(method)
    known = ADAMW_OPTIONS if method is None else known_options(method)
    for key, value in options.items():
        if key not in known:
            hint = near_names(key, known) or f"; its options: {', '.join(known)}"
            raise InvalidOption(f"{name} has no option {key!r}{hint}")
        own = method is not None and key in method.options
        passed = torch.optim.AdamW.__init__ if method is None else ProjectedOptimizer.__init__
        require_kind(name, method.build if method is not None and own else passed, key, value)
    return rate


def _named(name: str) -> Method:
    """Return an optimizer of the catalogue, or refuse the name with the nearest ones, AdamW's among them."""
    names = [method.name for method in methods("optim")]
    if name not in names and (near := near_names(name, [ADAMW, *names])):
        raise UnknownMethod(f"there is no optimizer {name!r}{near}")
    return get("optim", name)


def optimizer_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options among `axis.option` settings that are the optimizer's."""
    parts = ((key.partition("."), value) for key, value in settings.items())
    return {option: value for (axis, _, option), value in parts if axis == OPTIMIZER}


def known_options(method: Method) -> tuple[str, ...]:
    """Return the options of a named optimizer, those that it passes on among them."""
    kinds = [parameter.kind for parameter in inspect.signature(method.build).parameters.values()]
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return tuple(method.options)
    passed = inspect.signature(ProjectedOptimizer.__init__).parameters.values()
    more = [p.name for p in passed if p.kind is inspect.Parameter.KEYWORD_ONLY]
    return tuple(dict.fromkeys((*method.options, *more)))


def usual_rate(method: Method) -> float:
    """Return the learning rate that a named optimizer takes by itself.

    Raises:
        InvalidOption: it takes none, so it is no optimizer of a model's parameters.
    """
    parameters = inspect.signature(method.build).parameters
    rate = parameters["lr"].default if "lr" in parameters else None
    if "params" not in parameters or not isinstance(rate, float):
        raise InvalidOption(
            f"{method.name} is no optimizer that moves a model's parameters by their gradients; "
            f"choose {ADAMW} or, for example, galore"
        )
    return rate


@dataclass(frozen=True)
class OptimizerPlan:
    """How the optimizer of a run is made.

    Args:
        name: `adamw` or a name of the catalogue.
        lr: peak learning rate.
        options: of the optimizer, those that follow from the model and the seed among them.
    """

    name: str
    lr: float
    options: Mapping[str, Any]

    @classmethod
    def of(cls, model: "PreTrainedModel", config: PretrainConfig) -> "OptimizerPlan":
        """Return the plan for a model; its tensors need no values.

        A rank that is not given is a quarter of the model's width; embeddings and heads are not projected.

        Raises:
            Incompatible: the structure's dynamics set rates that only AdamW knows.
        """
        options = optimizer_options(config.set)
        lr = config.lr or check_optimizer(config.optimizer, options)
        if config.optimizer != ADAMW:
            refuse_rates(model, config.optimizer, lr)
            method = get("optim", config.optimizer)
            usual = {"rank": usual_rank(model), "plain": tuple(sorted(tables(model)))}
            options = {key: value for key, value in usual.items() if key in method.options} | options
            if "seed" in known_options(method):
                options.setdefault("seed", config.seed)
        return cls(config.optimizer, lr, options)

    def build(self, model: nn.Module) -> Optimizer:
        """Return the optimizer of all that trains in a model.

        Raises:
            RankfoldError: when it cannot be made, or would project nothing.
        """
        if self.name == ADAMW:
            return adamw(model, self.lr, self.options)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return named_optimizer(trained, self.name, self.lr, self.options)

    def small(self, trained: Named, divisor: int) -> Optimizer:
        """Return the optimizer of copies whose sides, and ranks, are divided."""
        if self.name == ADAMW:
            options = {key: value for key, value in self.options.items() if key != "weight_decay"}
            return _made_adamw([{"params": [p for _, p in trained]}], self.lr, options)
        options = dict(self.options)
        if isinstance(options.get("rank"), int):
            options["rank"] = max(1, options["rank"] // divisor)
        return named_optimizer(trained, self.name, self.lr, options)


def named_optimizer(trained: Named, name: str, lr: float, options: Mapping[str, Any]) -> Optimizer:
    """Return a named optimizer of (name, parameter) pairs.

    Raises:
        InvalidOption: what is made is no optimizer.
        InvalidRank: it would project nothing.
    """
    made = get("optim", name).build(trained, lr, **options)
    if not isinstance(made, Optimizer):
        raise InvalidOption(f"{name} makes a {type(made).__name__} and no optimizer; choose another")
    if isinstance(made, ProjectedOptimizer) and all(group["rank"] is None for group in made.param_groups):
        plain = options.get("plain") or ()
        sides = (min(p.shape) for key, p in trained if p.dim() > 1 and not any(w in key for w in plain))
        raise InvalidRank(
            f"{name} projects no weight at rank {options.get('rank')}; the smaller side of the largest is "
            f"{max(sides, default=0)}: lower it with --set optimizer.rank=..."
        )
    return made


def adamw(model: nn.Module, lr: float, options: Mapping[str, Any]) -> torch.optim.AdamW:
    """Return AdamW, with the groups that a structure's dynamics need; vectors do not decay."""
    given: dict[str, Any] = dict(options)
    decay = given.pop("weight_decay", 0.0)
    if adaptation_of(model) is not None:
        groups = rf.param_groups(model, lr, weight_decay=decay)
    else:
        groups = decayed_groups(((n, p) for n, p in model.named_parameters() if p.requires_grad), decay)
    return _made_adamw(groups, lr, {**given, "weight_decay": decay})


def _made_adamw(groups: list[dict[str, Any]], lr: float, options: Mapping[str, Any]) -> torch.optim.AdamW:
    """Return AdamW, or refuse options that it does not take."""
    given = dict(options)
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    try:
        return torch.optim.AdamW(groups, lr=lr, **given)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise InvalidOption(f"AdamW does not take these options: {error}") from error


def decayed_groups(named: Iterable[tuple[str, nn.Parameter]], decay: float) -> list[dict[str, Any]]:
    """Return two groups, matrices, which decay, and vectors, which do not."""
    listed = list(named)
    matrices = [parameter for _, parameter in listed if parameter.dim() > 1]
    vectors = [parameter for _, parameter in listed if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def refuse_rates(model: nn.Module, name: str, lr: float) -> None:
    """Refuse dynamics that set learning rates by side, which a named optimizer's groups do not know.

    Raises:
        Incompatible: they do.
    """
    if adaptation_of(model) is None:
        return
    if any(group["lr"] != lr for group in rf.param_groups(model, lr)):
        raise Incompatible(
            f"the structure's dynamics set learning rates by side, which {name} does not know; use "
            f"--optimizer {ADAMW}"
        )


def describe_optimizer(optimizer: Optimizer, name: str) -> str:
    """Return what an optimizer projects, in words.

    Example:
        >>> layer = nn.Linear(16, 8)
        >>> describe_optimizer(rf.optim.galore(layer, rank=4), "galore")
        'galore: 1 of 2 tensors projected, rank 4'
    """
    if not isinstance(optimizer, ProjectedOptimizer):
        return name
    groups = optimizer.param_groups
    count = sum(len(group["params"]) for group in groups)
    low = [group for group in groups if group["rank"] is not None]
    projected = sum(sum(p.dim() > 1 for p in group["params"]) for group in low)
    ranks = sorted({group["rank"] for group in low})
    said = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return f"{name}: {projected} of {count} tensors projected, {said}"
