"""Reading the YAML files of mergekit, as far as they mean the same here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FormatError, Incompatible, InvalidOption, MissingPath

_TOP = ("merge_method", "models", "base_model", "parameters", "dtype", "out_dtype")
_IGNORED = ("int8_mask",)  # how a mask is stored while it is computed


@dataclass(frozen=True)
class MergeFile:
    """What such a file asks for, as arguments of `merge`.

    Attributes:
        models: folders.
        method: name of the rule here.
        base: a folder, or None.
        weights: of each model, or None.
        dtype: of the result, or None.
        options: of the rule.
    """

    models: list[str]
    method: str
    base: str | None
    weights: list[float] | None
    dtype: str | None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> dict[str, Any]:
        """Return it as keyword arguments of `merge`."""
        named = {key: getattr(self, key) for key in ("models", "method", "base", "weights", "dtype")}
        return {**named, **self.options}


@dataclass(frozen=True)
class _Settings:
    """The models of a file and their parameters.

    Attributes:
        file: for sentences.
        base: of the models, or None.
        models: without the base.
        own: parameters of each model, by its path; the base's too.
        shared: parameters of all.
    """

    file: Path
    base: str | None
    models: list[str]
    own: Mapping[str, Mapping[str, Any]]
    shared: Mapping[str, Any]

    def each(
        self, key: str, default: float | None = None, models: Sequence[str] | None = None
    ) -> list[float]:
        """Return a number for every model: its own, or that of all, or the default."""
        found = []
        for model in self.models if models is None else models:
            value = self.own.get(model, {}).get(key, self.shared.get(key, default))
            if value is None:
                raise InvalidOption(f"{self.file}: {model} has no {key}")
            found.append(_number(value, key, self.file))
        return found

    def flag(self, key: str, default: bool) -> bool:
        """Return a switch that holds for all models."""
        value = self.shared.get(key, default)
        if not isinstance(value, bool):
            raise InvalidOption(f"{self.file}: {key} must be true or false for all tensors, not {value!r}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number that holds for all models."""
        return _number(self.shared.get(key, default), key, self.file)


def read_mergekit(path: str | Path) -> MergeFile:
    """Read a mergekit file: its method, its models with weight, density and gamma, base, dtype, parameters.

    A method keeps mergekit's own defaults, which differ from the papers' here and there: `rescale` of DARE
    restores the sum of magnitudes, and the election of `dare_ties` is followed by a sum.

    Args:
        path: the file.

    Raises:
        MissingPath: there is no such file.
        FormatError: it is no YAML, or no table.
        Incompatible: it asks for what means something else here or nothing: slices, modules, values by layer
            or tensor, tokenizers, adapters applied to models, other methods.
        InvalidOption: a value is of another kind, or one is missing.
    """
    file = Path(path)
    data = _table(file)
    for key in data:
        if key not in _TOP:
            raise Incompatible(f"{file}: {key} is not read; merge with {', '.join(_TOP)} only")
    method = data.get("merge_method")
    if method not in _METHODS:
        known = ", ".join(sorted(_METHODS))
        raise Incompatible(
            f"{file}: merge_method {method!r} is none of those that mean the same here: {known}"
        )
    known_parameters, build = _METHODS[method]
    settings = _settings(file, data)
    for scope in (settings.shared, *settings.own.values()):
        unknown = next((key for key in scope if key not in (*known_parameters, *_IGNORED)), None)
        if unknown is not None:
            raise Incompatible(f"{file}: the parameter {unknown} of {method} is not read")
    return build(settings, _dtype(data, file))


def _table(file: Path) -> Mapping[str, Any]:
    import yaml

    if not file.is_file():
        raise MissingPath(f"there is no file {file}")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise FormatError(f"{file} is not a table of keys and values")
    return data


def _settings(file: Path, data: Mapping[str, Any]) -> _Settings:
    entries = data.get("models")
    if not isinstance(entries, list) or not entries:
        raise FormatError(f"{file} lists no models")
    own: dict[str, Mapping[str, Any]] = {}
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) - {"model", "parameters"}:
            raise FormatError(f"{file}: each of the models has a model and parameters, and {entry!r} has not")
        name = _folder(entry.get("model"), file)
        if name in own:
            raise FormatError(f"{file} lists the model {name} twice")
        own[name] = _parameters(entry, file)
    base = None if data.get("base_model") is None else _folder(data["base_model"], file)
    models = [name for name in own if name != base]
    return _Settings(file, base, models, own, _parameters(data, file))


def _folder(name: Any, file: Path) -> str:
    if not isinstance(name, str) or not name:
        raise FormatError(f"{file}: a model is the path of a folder, not {name!r}")
    if "+" in name and not Path(name).exists():
        raise Incompatible(f"{file}: {name} applies an adapter to a model; fold it first (rankfold fold)")
    return name


def _parameters(entry: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    found = entry.get("parameters") or {}
    if not isinstance(found, Mapping):
        raise FormatError(f"{file}: parameters are a table, not {found!r}")
    return found


def _number(value: Any, key: str, file: Path) -> float:
    if isinstance(value, list | Mapping):
        raise Incompatible(
            f"{file}: {key} has values by layer or tensor, which are not read; give one number"
        )
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidOption(f"{file}: {key} must be a number, not {value!r}")
    return float(value)


def _dtype(data: Mapping[str, Any], file: Path) -> str | None:
    dtype = data.get("out_dtype") or data.get("dtype")
    if dtype is not None and not isinstance(dtype, str):
        raise InvalidOption(f"{file}: dtype must be a name such as bfloat16, not {dtype!r}")
    return dtype


# How each method's parameters read here -----------------------------------------------------------------


def _linear(settings: _Settings, dtype: str | None) -> MergeFile:
    # The base is a model like the others, listed or not.
    unlisted = [] if settings.base is None or settings.base in settings.own else [settings.base]
    models = [*unlisted, *settings.own]
    weights = settings.each("weight", models=models)
    options = {"normalize": settings.flag("normalize", True)}
    return MergeFile(models, "linear", settings.base, weights, dtype, options)


def _slerp(settings: _Settings, dtype: str | None) -> MergeFile:
    if settings.base is None or len(settings.models) != 1:
        raise InvalidOption(f"{settings.file}: slerp goes from base_model to one other model")
    options = {"t": settings.each("t", models=settings.models)[0]}
    return MergeFile([settings.base, *settings.models], "slerp", settings.base, None, dtype, options)


def _task_arithmetic(settings: _Settings, dtype: str | None) -> MergeFile:
    return _added(settings, dtype, "task-arithmetic", {})


def _ties(settings: _Settings, dtype: str | None) -> MergeFile:
    mean = "weighted" if settings.flag("normalize", True) else "sum"
    return _elected(settings, dtype, "ties", {"density": settings.each("density", 1.0), "mean": mean})


def _dare_linear(settings: _Settings, dtype: str | None) -> MergeFile:
    return _added(settings, dtype, "dare-linear", _kept_at_random(settings))


def _dare_ties(settings: _Settings, dtype: str | None) -> MergeFile:
    mean = "weighted" if settings.flag("normalize", False) else "sum"
    return _elected(settings, dtype, "dare-ties", {**_kept_at_random(settings), "mean": mean})


def _breadcrumbs(settings: _Settings, dtype: str | None) -> MergeFile:
    if settings.flag("rescale", False):
        raise Incompatible(f"{settings.file}: breadcrumbs does not rescale what it keeps; leave rescale away")
    densities, tops = settings.each("density", 1.0), settings.each("gamma", 0.01)
    # The top cut gives way where both together would leave less than the density; all kept means all.
    large = [min(top, max(0.0, 1 - density)) for density, top in zip(densities, tops, strict=True)]
    small = [max(0.0, 1 - density - top) for density, top in zip(densities, large, strict=True)]
    return _added(settings, dtype, "breadcrumbs", {"drop_smallest": small, "drop_largest": large})


def _kept_at_random(settings: _Settings) -> dict[str, Any]:
    rescale = "l1" if settings.flag("rescale", True) else "none"
    return {"density": settings.each("density", 1.0), "rescale": rescale}


def _added(settings: _Settings, dtype: str | None, method: str, options: dict[str, Any]) -> MergeFile:
    """Return a merge by a sum of changes, divided by the sum of the weights where that is asked for."""
    weights = settings.each("weight")
    total = sum(weights)
    if settings.flag("normalize", False) and abs(total) > 1e-8:
        weights = [weight / total for weight in weights]
    options = {**options, "scale": settings.number("lambda", 1.0)}
    return MergeFile(settings.models, method, settings.base, weights, dtype, options)


def _elected(settings: _Settings, dtype: str | None, method: str, options: dict[str, Any]) -> MergeFile:
    options = {**options, "scale": settings.number("lambda", 1.0)}
    return MergeFile(settings.models, method, settings.base, settings.each("weight"), dtype, options)


_SUM = ("weight", "normalize", "lambda")
_METHODS: dict[str, tuple[tuple[str, ...], Callable[[_Settings, str | None], MergeFile]]] = {
    "linear": (("weight", "normalize"), _linear),
    "slerp": (("t",), _slerp),
    "task_arithmetic": (_SUM, _task_arithmetic),
    "ties": ((*_SUM, "density"), _ties),
    "dare_linear": ((*_SUM, "density", "rescale"), _dare_linear),
    "dare_ties": ((*_SUM, "density", "rescale"), _dare_ties),
    "breadcrumbs": ((*_SUM, "density", "gamma", "rescale"), _breadcrumbs),
}
