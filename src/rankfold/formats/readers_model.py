"""The layers of a model, as a file's names and shapes mean them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor, nn

from ..errors import BaseMismatch, Incompatible
from ..layers import Adaptation, StructuredLayer, adaptation_of
from ..layers.targets import candidates
from . import native
from .changes import Changes

# What trainers call the parts of a diffusion model, and what such a part may be called in a model.
_PARTS = {
    "unet": ("unet",), "te": ("text_encoder",), "te1": ("text_encoder",), "te2": ("text_encoder_2",),
    "te3": ("text_encoder_3",), "transformer": ("transformer",), "prior_unet": ("prior", "unet"),
    "prior_te": ("text_encoder",),
}  # fmt: skip
FLAT = re.compile(rf"(?:lycoris|lora_({'|'.join(_PARTS)})|lora)_(?=.)")
_COMPONENTS = re.compile(
    r"(unet|transformer(_2)?|text_encoder(_[23])?|prior|base_model\.model|diffusion_model|model\.diffusion_model)\."
)


class Places:
    """The layers of a model that can hold a change.

    Args:
        model: not changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._targets = {target.path: target for target in candidates(model)}
        self._adaptation = adaptation_of(model) or Adaptation(model)
        self._flat: dict[str, list[str]] = {}
        for path in self._targets:
            self._flat.setdefault(path.replace(".", "_"), []).append(path)

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the layers."""
        return tuple(self._targets)

    def path(self, name: str, key: str = "") -> str:
        """Return the path of the layer that a file's name means.

        Args:
            name: as in the file: dotted, perhaps with a component before it, or flattened.
            key: of the tensor, for the sentence.

        Raises:
            BaseMismatch: the model has no such layer.
            Incompatible: it has several.
        """
        for candidate in _dotted(name):
            if candidate in self._targets:
                return candidate
        for candidate in _flattened(name):
            found = self._flat.get(candidate, [])
            if len(found) > 1:
                raise Incompatible(f"{key or name} may mean {found[0]} or {found[1]}")
            if found:
                return found[0]
        raise BaseMismatch(f"{key or name} matches no layer of the model")

    def layer(self, path: str) -> StructuredLayer:
        """Return the layer at a path."""
        if path not in self._targets:
            raise BaseMismatch(f"the adapter was made for a model that has {path}; this one has not")
        return self._adaptation.layer_for(self._targets[path])

    def matrix(self, path: str) -> Tensor:
        """Return W0 (out, in)."""
        return self.layer(path).matrix().detach()

    def fitted(self, changes: Changes) -> Changes:
        """Return changes with the kinds and windows that the model's layers have.

        Raises:
            BaseMismatch: a name or a shape differs.
        """
        layers = {path: self.layer(path) for path in changes.pairs}
        for path, layer in layers.items():
            native.check_shape(path, layer, changes.shape(path))
        for key, tensor in changes.whole.items():
            self._check_whole(key, tensor)
        described = {path: native.form_of(layer) for path, layer in layers.items()}
        return replace(
            changes,
            kinds={path: form.get("kind", "linear") for path, form in described.items()},
            windows={path: tuple(form["window"]) for path, form in described.items() if "window" in form},
            base=changes.base or self._name(),
        )

    def _check_whole(self, key: str, tensor: Tensor) -> None:
        own = dict(self._model.named_parameters(remove_duplicate=False)) | dict(self._model.named_buffers())
        if key not in own:
            raise BaseMismatch(f"the file holds {key}, which the model has not")
        if own[key].shape != tensor.shape:
            shapes = tuple(own[key].shape), tuple(tensor.shape)
            raise BaseMismatch(f"{key} has the shape {shapes[0]} here and {shapes[1]} in the file")

    def _name(self) -> str:
        return str(getattr(getattr(self._model, "config", None), "_name_or_path", "") or "")


def is_flattened(name: str) -> bool:
    """Say whether a name has underscores in the place of dots."""
    return "." not in name and FLAT.match(name) is not None


def _dotted(name: str) -> Iterator[str]:
    yield name
    component = _COMPONENTS.match(name)
    if component:
        yield name[component.end() :]


def _flattened(name: str) -> Iterator[str]:
    found = FLAT.match(name)
    if "." in name or not found:
        return
    rest = name[found.end() :]
    yield rest
    for part in _PARTS.get(found[1] or "", ()):
        yield f"{part}_{rest}"
