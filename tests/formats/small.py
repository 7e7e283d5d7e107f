"""What the tests of this folder share: points of the catalogue on small models, folders to spoil."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from battery import adapted_blocks, inputs_at_hand, points
from hosts import blocks, token_ids
from layers.models import made, perturb
from torch import Tensor, nn

import rankfold as rf
from rankfold.formats import native
from rankfold.formats.files import read_json, write_json

POINTS = [point for method in rf.methods("structure") for point in points(method.name)]


def saved(folder: Path, method: str = "lora", **options: Any) -> Path:
    """Adapt the model of blocks, move the adapter away from its start, and save it."""
    return rf.save(adapted_blocks(points(method)[0], **options), folder)


def output(model: nn.Module) -> Tensor:
    """Return the model's output for fixed ids."""
    with torch.no_grad(), inputs_at_hand():
        return model(token_ids())  # type: ignore[no-any-return]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], *, signed: bool = True) -> Path:
    """Change the record of an adapter folder, with a hash that fits the change or with the old one."""
    record = read_json(folder / native.RECORD)
    change(record)
    if signed:
        record["sha256"] = native.record_digest(record)
    write_json(folder / native.RECORD, record)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change the configuration of a peft folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


class Untouched:
    """A base model, and the assertion that nothing in it has changed."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = blocks() if model is None else model
        self.before = self._state()

    def _state(self) -> dict[str, Any]:
        model = self.model
        return {
            "values": {key: value.clone() for key, value in model.state_dict().items()},
            "modules": [(name, id(module)) for name, module in model.named_modules()],
            "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
            "attributes": [sorted(module.__dict__) for module in model.modules()],
            "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        }

    def check(self) -> None:
        """Assert that the model is bit for bit what it was."""
        now = self._state()
        values, known = now.pop("values"), self.before["values"]
        assert list(values) == list(known)
        assert all(torch.equal(values[key], known[key]) for key in known)
        assert now == {key: self.before[key] for key in now}


# Models of transformers, and peft ---------------------------------------------------------------------

CLOSE, MOVED = 1e-5, 1e-3


def sharp(name: str) -> nn.Module:
    """Return a model whose logits show a change of any weight."""
    model = made(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4
    return model


def adapted(name: str, /, method: str = "lora", **options: Any) -> nn.Module:
    """Return an adapted model, moved well away from its start, in evaluation."""
    model = rf.adapt(sharp(name), method, **options)
    perturb(model, 0.2)
    return model.eval()


def in_peft(folder: Path, model: nn.Module) -> nn.Module:
    """Load a folder by peft; a missing or unexpected tensor is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected) .*keys.*")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def agree(actual: Tensor, wanted: Tensor) -> None:
    difference = float((actual - wanted).detach().abs().max())
    assert difference <= CLOSE * max(1.0, float(wanted.abs().max())), f"off by {difference:.1e}"
