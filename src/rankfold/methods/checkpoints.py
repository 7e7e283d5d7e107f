"""The checkpoints that training loops write of an adapted model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InvalidOption, OutputExists
from ..formats import native
from ..layers import Adaptation, adaptation_of, require, warn_never_attached
from ..version import __version__
from . import registry
from .recipe import Recipe


def describe(adaptation: Adaptation, name: str) -> dict[str, Any]:
    """Return everything but the tensors that a file needs to rebuild an adapter."""
    adapter = adaptation.adapter(name)
    warn_never_attached(adapter)
    recipe = Recipe.from_dict(adapter.record["recipe"])
    method = registry.structure_named(adapter.record["recipe"]["structure"][0])
    layers = native.anchors(adaptation.root, adapter.paths, adaptation.layers)
    tied = _tied(adaptation, adapter.paths)
    return {
        **adapter.record,
        **({"tied": tied} if tied else {}),
        "ranks": _ranks_now(adaptation, name),
        "name": name,
        "point": recipe.text(),
        "method": {
            k: v for k, v in method.to_dict().items() if k in ("name", "title", "year", "arxiv", "formula")
        },
        "base": native.base_of(adaptation.root, layers),
        "versions": {"rankfold": __version__, "torch": torch.__version__.split("+")[0]},
    }


def _tied(adaptation: Adaptation, paths: Iterable[str]) -> dict[str, str]:
    """Return the module that shares an adapted weight and changes with it, by the weight's path."""
    lent = {id(layer.lender): path for path, layer in adaptation.layers.items() if layer.lender is not None}
    return {
        path: lent[id(adaptation.layers[path])]
        for path in paths
        if path in adaptation.layers and id(adaptation.layers[path]) in lent
    }


def _ranks_now(adaptation: Adaptation, name: str) -> dict[str, int | None]:
    """Return the recorded ranks, and for a single product of two factors the one that training left it."""
    ranks: dict[str, int | None] = dict(adaptation.adapter(name).record["ranks"])
    if "ranks" in adaptation.adapter(name).record["recipe"]:
        for path, expression in adaptation.expressions(name).items():
            products = [pair.up.shape[-1] for pair in expression.pairs()]
            if len(products) == 1:
                ranks[path] = products[0]
    return ranks


class Checkpoints:
    """What `save_pretrained` and `load_state_dict` do on an adapted model.

    A checkpoint of an adapted model is the adapter: it can be loaded with `rankfold.load`, trainers resume
        from
    it, and it can never be taken for a whole model with weights missing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = (model,)

    @classmethod
    def take_over(cls, model: nn.Module) -> None:
        """Let the model's own saving and loading go through here until its last adapter is removed."""
        if "save_pretrained" in model.__dict__ or not hasattr(model, "save_pretrained"):
            return
        checkpoints = cls(model)
        model.__dict__["save_pretrained"] = checkpoints.save_pretrained
        model.__dict__["load_state_dict"] = checkpoints.load_state_dict

    def save_pretrained(
        self, save_directory: str | Path, *, is_main_process: bool = True, **ignored: Any
    ) -> None:
        """Write the active adapter into a folder, beside what is there.

        Raises:
            InvalidOption: no adapter is active or several are, or `push_to_hub` is asked for.
            OutputExists: there is a file, or the folder holds the `config.json` of a whole model, with which
                the adapter's tensors would be taken for that model's.
        """
        adaptation = require(self._model[0])
        if len(adaptation.active) != 1:
            names = list(adaptation.active)
            raise InvalidOption(
                f"save_pretrained writes one active adapter and {names} are active; use rankfold.save(model, "
                "path, name), or rankfold.fold(model) first for a whole checkpoint"
            )
        if ignored.get("push_to_hub"):
            raise InvalidOption(
                "save_pretrained of an adapted model does not upload; use rankfold.save(..., push_to_hub=...)"
            )
        if is_main_process:
            folder, name = Path(save_directory), adaptation.active[0]
            _refuse_whole_model(folder)
            folder.mkdir(parents=True, exist_ok=True)
            record, tensors = describe(adaptation, name), native.tensors_of(adaptation, name)
            native.write_into(folder, record, tensors, native.CHECKPOINT_TENSORS)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load an adapter's own tensors, or any other state as the model's class does."""
        model = self._model[0]
        if not state_dict or not all(":" in key for key in state_dict):
            return type(model).load_state_dict(model, state_dict, strict=strict, assign=assign)
        adaptation = adaptation_of(model)
        assert adaptation is not None
        native.fill(adaptation, adaptation.adapter().name, state_dict)
        return nn.modules.module._IncompatibleKeys([], [])


def _refuse_whole_model(folder: Path) -> None:
    if folder.is_file():
        raise OutputExists(f"{folder} is a file, not a folder")
    if (folder / "config.json").exists():
        raise OutputExists(
            f"{folder} holds the config.json of a whole model, and an adapter beside it would be taken for "
            "that model's weights; choose another folder, or rankfold.fold(model) for a whole checkpoint"
        )
