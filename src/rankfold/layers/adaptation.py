"""What an adapted model remembers of its adapters, and switching, disabling, removing and folding them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, NotAdapted, NotDense, UnsupportedLayer, near_names
from ..weights import Moved, Weight, owned
from .carrier import Carrier
from .foreign import check_known
from .layer import StructuredAttention, StructuredForeign, StructuredLayer, kind_of, why_refused
from .riders import is_ridden
from .targets import Target
from .watch import FirstForward

STAGES = ("replace", "transform", "modulate", "add", "normalise", "activation")
_HANDLE, _RESIZE = "_rankfold", "resize_token_embeddings"


class Branch(nn.Module):
    """A change of a module's output, not of a weight: `edit(output)` replaces the output."""

    leaves_owned: dict[str, tuple[nn.Module, str]]

    def edit(self, hidden: Tensor) -> Tensor:
        """Return the edited activation, of the same shape (batch, token, channels)."""
        raise NotImplementedError

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the input: registered in an `nn.Sequential` that it edits, the branch is called by it."""
        return hidden

    def owned(self) -> dict[str, tuple[Any, str]]:
        """Map every stored leaf name to the module and attribute that hold it."""
        return {name: (self, name) for name, _ in self.named_parameters(recurse=False)}

    def formula(self) -> str:
        """Return the change as a formula."""
        raise NotImplementedError

    def hook(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Edit the first tensor of a module's output, while the branch is active."""
        if not self.__dict__.get("active", True):
            return output
        if isinstance(output, tuple):
            return (self.edit(output[0]), *output[1:])
        if not isinstance(output, Tensor):
            raise UnsupportedLayer(
                f"the output of {type(module).__name__} is {type(output).__name__}; only a tensor, or "
                "a tuple that starts with one, can be edited"
            )
        return self.edit(output)


@dataclass
class Adapter:
    """One named adapter of a model.

    Attributes:
        name: chosen by the user.
        record: everything that a file needs to rebuild it: recipe, ranks, seed, versions.
        stage: where its change stands in the order of `STAGES`.
        paths: the adapted modules.
        shared: attribute name on the root model of every tensor that layers share, by key.
        values: tensors of the modules trained whole, as this adapter left them, by parameter name.
        branches: the modules that edit activations, by path, with the handles of their hooks.
        gate_keys: the gates that it needs.
        watch: waits for the first forward, to see whether every layer is called.
        attached: its dynamics have ridden on an optimizer, or there are none that have to.
        scratch: whatever it does not read of the stored weights is let go, so it cannot be removed.
        rest_frozen: what it holds of the model beside its expressions does not train.
    """

    name: str
    record: dict[str, Any]
    stage: str
    paths: list[str]
    shared: dict[str, str] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    branches: dict[str, tuple[Branch, Any]] = field(default_factory=dict)
    gate_keys: set[str] = field(default_factory=set)
    watch: FirstForward | None = None
    attached: bool = True
    scratch: bool = False
    rest_frozen: bool = False


class NeverAttached(UserWarning):
    """An adapter's dynamics have never ridden on an optimizer, so it is not what its recipe says."""


def warn_never_attached(adapter: Adapter) -> None:
    """Warn where the dynamics of an adapter have not acted."""
    if not adapter.attached:
        warnings.warn(
            NeverAttached(
                f"the dynamics or rank rule of the adapter {adapter.name!r} have never been attached to an "
                "optimizer (rankfold.attach, rankfold.TrainerCallback), so they have not acted"
            ),
            stacklevel=3,
        )


class Adaptation:
    """The adapters of one model; it lives in the model's `__dict__` and is copied with it."""

    def __init__(self, root: nn.Module) -> None:
        self._root = (root,)
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.layers: dict[str, StructuredLayer] = {}
        self.flags = {name: p.requires_grad for name, p in root.named_parameters(remove_duplicate=False)}
        self.base_values: dict[str, Tensor] = {}
        self.carrier = Carrier(root)
        self.inference_path = InferencePath()

    @property
    def root(self) -> nn.Module:
        """The adapted model."""
        return self._root[0]

    def adapter(self, name: str | None = None) -> Adapter:
        """Return an adapter by name; without a name, the only active one.

        Raises:
            NotAdapted: there is none of that name, or several are active.
        """
        if name is None:
            if len(self.active) == 1:
                return self.adapters[self.active[0]]
            if len(self.adapters) == 1:
                return next(iter(self.adapters.values()))
            raise NotAdapted(
                f"the model holds the adapters {sorted(self.adapters)}; say which one with name="
            )
        if name not in self.adapters:
            raise NotAdapted(f"no adapter {name!r} in the model{near_names(name, self.adapters)}")
        return self.adapters[name]

    def expressions(self, name: str) -> dict[str, Weight]:
        """Return the expressions of an adapter by path; a tied one appears once."""
        found = {}
        for path in self.adapter(name).paths:
            layer = self.layers.get(path)
            if layer is not None and name in layer.adapters:
                found[path] = layer.adapters[name]
        return found  # type: ignore[return-value]

    def owned(self, name: str) -> dict[str, tuple[Any, str]]:
        """Map every saved key of an adapter to the module and attribute that hold its tensor.

        Keys are `<module path>:<leaf>` and `shared:<key>`; saving and loading both read this one map.
        """
        adapter, keys = self.adapter(name), {}
        for path, expression in self.expressions(name).items():
            keys.update({f"{path}:{leaf}": place for leaf, place in owned(expression).items()})
        for path, (branch, _) in adapter.branches.items():
            keys.update({f"{path}:{leaf}": place for leaf, place in branch.owned().items()})
        keys.update({f"shared:{key}": (self.root, attribute) for key, attribute in adapter.shared.items()})
        return keys

    def whole(self, name: str) -> dict[str, Tensor]:
        """Return the tensors of the modules trained whole, by parameter name, as this adapter has them."""
        adapter = self.adapter(name)
        if name in self.active:
            adapter.values = {key: self._tensor(key).detach() for key in adapter.values}
        return adapter.values

    def _tensor(self, key: str) -> Tensor:
        module, _, attribute = key.rpartition(".")
        return getattr(self.root.get_submodule(module), attribute)  # type: ignore[no-any-return]

    def trainable(self, name: str) -> Iterator[nn.Parameter]:
        """Yield the parameters that training this adapter moves."""
        seen: set[int] = set()
        for module, attribute in self.owned(name).values():
            value = getattr(module, attribute)
            if isinstance(value, nn.Parameter) and id(value) not in seen:
                seen.add(id(value))
                yield value
        for key in self.adapter(name).values if not self.adapter(name).rest_frozen else ():
            value = self._tensor(key)
            if isinstance(value, nn.Parameter) and id(value) not in seen:
                seen.add(id(value))
                yield value

    # Switching ----------------------------------------------------------------------------------------

    def use(self, names: Sequence[str]) -> None:
        """Make exactly these adapters active, in the order of `STAGES`."""
        chosen = [self.adapter(name) for name in dict.fromkeys(names)]
        self._check_base(chosen)
        self._check_together(chosen)
        ordered = sorted(chosen, key=lambda a: STAGES.index(a.stage))
        self._store_values()
        for layer in self.layers.values():
            layer.activate([a.name for a in ordered])
        for adapter in self.adapters.values():
            for branch, _ in adapter.branches.values():
                branch.__dict__["active"] = adapter in chosen
        self.active = tuple(a.name for a in ordered)
        self.carrier.wanted = {key for adapter in chosen for key in adapter.gate_keys}
        self._restore_values()
        self._set_flags()

    @property
    def scratch(self) -> str | None:
        """The adapter without which there is no base to go back to, or None."""
        return next((name for name, adapter in self.adapters.items() if adapter.scratch), None)

    def _check_base(self, chosen: list[Adapter]) -> None:
        name = self.scratch
        if name is not None and name not in [adapter.name for adapter in chosen]:
            method = self.adapters[name].record["recipe"]["structure"][0]
            raise Incompatible(
                f"{method} took the place of the weights: there is no base without it to go back to; "
                "rankfold.fold(model) makes plain layers of it"
            )

    def _check_together(self, chosen: list[Adapter]) -> None:
        for stage in ("replace", "modulate", "normalise"):
            same = [a.name for a in chosen if a.stage == stage]
            if len(same) > 1:
                raise Incompatible(
                    f"adapters {same} all {stage} the weight, and two such changes have no joint meaning"
                )
        gated = [a.name for a in chosen if a.gate_keys and a.stage == "add"]
        lengths = [a.name for a in chosen if a.stage == "normalise"]
        if gated and lengths:
            raise Incompatible(
                f"{lengths[0]!r} normalises the weight and {gated[0]!r} changes it for some tokens only, so "
                "the length of its rows would differ from token to token"
            )
        moved = [a.name for a in chosen if self._moves_base(a.name)]
        if moved and len(chosen) > 1:
            raise Incompatible(
                f"{moved[0]!r} has moved the stored weights themselves, and no other change stands on those"
            )
        whole = [a.name for a in chosen if a.values]
        if len(whole) > 1:
            raise Incompatible(
                f"adapters {whole} each hold their own copy of modules trained whole; use one of them"
            )

    def _moves_base(self, name: str) -> bool:
        expressions = self.expressions(name).values()
        return any(isinstance(leaf, Moved) for e in expressions for leaf in e.leaves())

    def _store_values(self) -> None:
        for name in self.active:
            self.adapters[name].values = {k: v.data for k, v in self.whole(name).items()}

    def _restore_values(self) -> None:
        """Put the values of the modules trained whole in place: the active adapter's, or the base's.

        Memory is exchanged, not copied: a graph recorded before `disabled` finds its tensors unchanged
        after it.
        """
        values = dict(self.base_values)
        for name in self.active:
            values.update(self.adapters[name].values)
        for key, value in values.items():
            tensor = self._tensor(key)
            tensor.data = value.to(tensor.device, tensor.dtype)  # the model may have been moved since

    def _set_flags(self) -> None:
        for parameter in self.root.parameters():
            parameter.requires_grad_(False)
        for name in self.active:
            for parameter in self.trainable(name):
                parameter.requires_grad_(True)

    # Adding and removing ------------------------------------------------------------------------------

    def layer_for(self, target: Target) -> StructuredLayer:
        """Return the structured layer at a target, made but not yet put in place where there was none.

        Raises:
            UnsupportedLayer: the module cannot hold an expression.
        """
        if target.path in self.layers:
            return self.layers[target.path]
        module = target.module
        if target.part:
            attention = self._attention(target, module)
            layer: StructuredLayer = getattr(attention, target.part)
        elif isinstance(module, StructuredLayer):
            layer = module
        else:
            kind = kind_of(module)
            if kind is None:
                raise UnsupportedLayer(f"{target.path}: {type(module).__name__} {why_refused(module)}")
            layer = kind(module)
        return layer

    def _attention(self, target: Target, module: nn.Module) -> StructuredAttention:
        if isinstance(module, StructuredAttention):
            return module
        made = self.__dict__.setdefault("_attentions", {})
        path = target.path.rpartition(".")[0]
        if path not in made:
            assert isinstance(module, nn.MultiheadAttention)
            made[path] = StructuredAttention(module)
        return made[path]  # type: ignore[no-any-return]

    def place(self, target: Target, layer: StructuredLayer) -> None:
        """Put a structured layer where its original was."""
        self.layers[target.path] = layer
        path, module = target.path, layer
        if target.part:
            path = target.path.rpartition(".")[0]
            module = self._attention(target, target.module)
        if self.root.get_submodule(path) is not module:
            module.train(module.original.training)  # it may have been made some time ago
            _set_module(self.root, path, module)
        self.inference_path.avoid(self.root, path)

    def add(self, adapter: Adapter, whole: Iterable[str]) -> None:
        """Take in a new adapter whose layers are in place, and make it the active one.

        Args:
            adapter: the adapter.
            whole: names of the tensors that are trained whole beside it; where there is a base to go back to,
                it gets copies of them.
        """
        self.adapters[adapter.name] = adapter
        for key in whole:
            value = self._tensor(key).data
            if self.scratch is None:
                value = self.base_values.setdefault(key, value).clone()
            adapter.values[key] = value
        self.use([adapter.name])

    def remove(self, name: str) -> None:
        """Take an adapter away; with the last one the model is bit for bit what it was before."""
        adapter = self.adapter(name)
        self.use([n for n in self.active if n != name])
        if adapter.watch is not None:
            adapter.watch.end()
        for path in adapter.paths:
            layer = self.layers.get(path)
            if layer is not None and name in layer.adapters:
                del layer.adapters[name]
        for branch, handle in adapter.branches.values():
            handle.remove()
            for parent in self.root.modules():
                for key in [k for k, child in parent._modules.items() if child is branch]:
                    del parent._modules[key]
        for attribute in adapter.shared.values():
            delattr(self.root, attribute)
        self.carrier.discard(adapter.gate_keys)
        del self.adapters[name]
        if not self.adapters:
            self.dissolve()

    def dissolve(self) -> None:
        """Put every original layer back and restore `requires_grad`."""
        self.carrier.discard(set(self.carrier.rules))
        for path, module in list(self.root.named_modules(remove_duplicate=False)):
            if isinstance(module, StructuredLayer) and _get_module(self.root, path) is module:
                _set_module(self.root, path, module.original)
        for name, parameter in self.root.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self.flags.get(name, True))
        self.inference_path.restore()
        for attribute in (_HANDLE, "save_pretrained", "load_state_dict", "push_to_hub", _RESIZE):
            self.root.__dict__.pop(attribute, None)

    # What a model of transformers does with its own embeddings --------------------------------------------

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Resize the embeddings as the model's class does, where no adapter holds them.

        Raises:
            Incompatible: an adapter holds the embedding or the output head.
        """
        model: Any = self.root
        held = sorted(path for path in self._embeddings() if self._holds(path))
        if not held:
            return type(model).resize_token_embeddings(model, new_num_tokens, *args, **kwargs)
        embedding = model.get_input_embeddings()
        if args or kwargs or new_num_tokens not in (None, embedding.weight.shape[0]):
            raise Incompatible(
                f"{held[0]} is adapted or trained whole, and its rows cannot be resized under the adapter; "
                "resize before adapting, or fold first"
            )
        return embedding

    def _embeddings(self) -> list[str]:
        root: Any = self.root
        ends = [end for end in (root.get_input_embeddings(), root.get_output_embeddings()) if end is not None]
        named = root.named_modules(remove_duplicate=False)
        return [path for path, module in named if any(module is end for end in ends)]

    def _holds(self, path: str) -> bool:
        structured = isinstance(self.root.get_submodule(path), StructuredLayer)
        return structured or any(key.startswith(f"{path}.") for key in self.base_values)


_ENCODERS = nn.TransformerEncoder | nn.TransformerEncoderLayer


class InferencePath:
    """Keeps `nn.TransformerEncoder` off its inference path, which reads weights without calling layers."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._encoders: list[tuple[nn.TransformerEncoder, bool]] = []
        self._seen: set[str] = set()

    def avoid(self, root: nn.Module, path: str) -> None:
        """Let every encoder around a path call its parts in inference too."""
        parts = path.split(".")
        for above in (".".join(parts[:i]) for i in range(len(parts))):
            module = root.get_submodule(above)
            if above in self._seen or not isinstance(module, _ENCODERS):
                continue
            self._seen.add(above)
            if isinstance(module, nn.TransformerEncoder):
                self._encoders.append((module, module.use_nested_tensor))
                module.use_nested_tensor = False
            else:
                self._handles.append(module.register_forward_pre_hook(_no_change))

    def restore(self) -> None:
        """Allow the inference path again."""
        for handle in self._handles:
            handle.remove()
        for module, nested in self._encoders:
            module.use_nested_tensor = nested
        self._handles, self._encoders, self._seen = [], [], set()


def _no_change(module: nn.Module, args: Any) -> None:
    """Leave the inputs alone; a module with hooks stays off its inference path."""


def _get_module(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def adaptation_of(model: nn.Module) -> Adaptation | None:
    """Return what an adapted model remembers of its adapters, or None."""
    return model.__dict__.get(_HANDLE)


def require(model: nn.Module) -> Adaptation:
    """Return what an adapted model remembers of its adapters.

    Raises:
        NotAdapted: the model holds no adapter.
    """
    adaptation = adaptation_of(model)
    if adaptation is None:
        inner = [name for name, m in model.named_modules() if name and adaptation_of(m) is not None]
        hint = f"; its part {inner[0]!r} does" if inner else ""
        raise NotAdapted(f"{type(model).__name__} holds no adapter{hint}; adapt or load one first")
    return adaptation


def attach(model: nn.Module, adaptation: Adaptation) -> None:
    """Let a model remember its adapters; nothing is registered on it."""
    model.__dict__[_HANDLE] = adaptation
    if hasattr(model, _RESIZE):
        model.__dict__[_RESIZE] = adaptation.resize_token_embeddings


def use(model: nn.Module, names: str | Sequence[str]) -> nn.Module:
    """Make the named adapters the active ones; the others stay in the model, frozen and without effect.

    Several active adapters act in the order replace, transform, modulate, add, normalise, whatever the order
    of the names; two that transform act in the order given. Training moves the active ones.

    Args:
        model: an adapted model.
        names: one name or several.

    Raises:
        NotAdapted: there is no such adapter.
        Incompatible: the adapters have no joint meaning.
    """
    require(model).use([names] if isinstance(names, str) else list(names))
    return model


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Within the block the model is its base: no adapter acts, modules trained whole have their old values.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        >>> x = torch.ones(1, 8)
        >>> before = model(x)
        >>> _ = rf.adapt(model, "diablo", blocks=2)
        >>> _ = torch.nn.init.ones_(model[0].adapters["default"].leaf("blocks").tensor())
        >>> with rf.disabled(model):
        ...     bool((model(x) == before).all())
        True
    """
    adaptation = require(model)
    active = adaptation.active
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    adaptation.use([])
    try:
        yield model
    finally:
        if adaptation_of(model) is adaptation:  # else the last adapter was removed in the block
            adaptation.use([name for name in active if name in adaptation.adapters])
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags.get(name, False))


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter away, or all of them; the last one leaves the model bit for bit as it was.

    Args:
        model: an adapted model; changed in place and returned.
        name: of the adapter; None takes all away.

    Raises:
        NotAdapted: there is no such adapter.
    """
    adaptation = require(model)
    for each in [name] if name is not None else list(adaptation.adapters):
        adaptation.remove(each)
    return model


@dataclass(frozen=True)
class FoldError:
    """How far a weight that was folded and quantised again is from its expression.

    Attributes:
        weight: path of the module.
        relative: Frobenius norm of the difference over that of the expression's matrix.
    """

    weight: str
    relative: float

    def __str__(self) -> str:
        """Return a line of a report."""
        return f"{self.weight}: relative error {self.relative:.3g}"


class Requantised(UserWarning):
    """Folded weights were quantised again, which rounds them; the text lists the error of each."""


@torch.no_grad()
def fold(
    model: nn.Module, *, requantise: bool = False, report: Callable[[FoldError], object] | None = None
) -> nn.Module:
    """Multiply the active adapters into plain layers: the model is a stock model again.

    Modules trained whole keep their trained values. Inactive adapters are dropped.

    Args:
        model: an adapted model; changed in place and returned.
        requantise: quantise the folded weight of a quantised layer again.
        report: called with the error of every weight that was quantised again, such as `print` or the
            `append` of a list; None gives one warning that lists them.

    Returns:
        The model.

    Raises:
        NotAdapted: the model holds no adapter.
        NotDense: an active adapter acts on activations.
        Incompatible: the dynamics of an active adapter are still attached to an optimizer.
        UnsupportedLayer: a quantised layer is adapted and `requantise` is false, or its form is not known.

    Example:
        >>> import torch, rankfold as rf
        >>> model = rf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), "lora", rank=2)
        >>> rf.fold(model)
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    adaptation = require(model)
    layers = {path: layer for path, layer in adaptation.layers.items() if layer._active}
    for name in adaptation.active:
        _refuse_activations(adaptation.adapters[name])
        _refuse_biases(model, adaptation.adapters[name])
        _refuse_ridden(adaptation.adapters[name])
        warn_never_attached(adaptation.adapters[name])
    for path, layer in layers.items():
        _refuse_fold(path, layer, requantise)
    dense = {path: layer._active[0].dense() for path, layer in layers.items()}
    errors = [error for path, matrix in dense.items() for error in _put(model, path, layers[path], matrix)]
    for name in adaptation.active:
        adaptation.base_values.update({k: v.clone() for k, v in adaptation.whole(name).items()})
    for name in list(adaptation.adapters):
        adaptation.adapters[name].scratch = False  # its weights are there again
        adaptation.remove(name)
    if errors and report is None:
        warnings.warn("\n".join(map(str, errors)), Requantised, stacklevel=3)  # above it, that of no_grad
    for error in errors if report is not None else ():
        report(error)  # type: ignore[misc]
    return model


def _put(model: nn.Module, path: str, layer: StructuredLayer, matrix: Tensor) -> Iterator[FoldError]:
    """Store a matrix in a layer and in everything that shares its stored tensor."""
    if layer.is_released:
        layer.store(matrix)
        for module in model.modules():
            if isinstance(module, StructuredLayer) and module.lender is layer:
                module.restore(layer.stored())  # type: ignore[arg-type]
        return
    old = layer.stored()
    layer.store(matrix)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = layer.stored()  # type: ignore[assignment]
    if isinstance(layer, StructuredForeign):
        difference = torch.linalg.vector_norm((layer.matrix() - matrix).float())
        yield FoldError(path, float(difference / torch.linalg.vector_norm(matrix.float())))


def _refuse_biases(model: nn.Module, adapter: Adapter) -> None:
    """Refuse to make a stock model of one whose class would not read the biases that an adapter gave it."""
    given = adapter.record.get("biases")
    if given and hasattr(model, "config") and hasattr(model, "save_pretrained"):
        raise Incompatible(
            f"{given[0]} was given a bias, which a stock {type(model).__name__} has not and would lose; "
            "save the model with rankfold.save, or compress it without add_bias"
        )


def _refuse_activations(adapter: Adapter) -> None:
    if adapter.branches:
        method = adapter.record.get("recipe", {}).get("structure", [adapter.name])[0]
        raise NotDense(f"{method} acts on activations and has no dense matrix: it cannot be folded")


def _refuse_ridden(adapter: Adapter) -> None:
    """Refuse an adapter of which a method has not finished; some change it, or what it does, at their end."""
    if is_ridden(adapter):
        raise Incompatible(
            f"the dynamics or rank rule of the adapter {adapter.name!r} is attached to an optimizer; "
            "remove() the handle that attach returned, or leave its with block, and then fold"
        )


def _refuse_fold(path: str, layer: StructuredLayer, requantise: bool) -> None:
    if not isinstance(layer, StructuredForeign):
        return
    if not requantise:
        raise UnsupportedLayer(
            f"{path} holds its weight in a quantised form; fold(model, requantise=True) quantises the folded "
            "weight again and reports the error"
        )
    check_known(layer.stored())
