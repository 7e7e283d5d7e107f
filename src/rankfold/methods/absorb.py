"""Making the memories of locas permanent."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import Incompatible
from ..layers import GatedBlock, StructuredLayer, gated_block, remove, require
from ..layers.feedforward import WIDTHS
from .structures.locas import Memory


@torch.no_grad()
def absorb(model: nn.Module, name: str | None = None) -> nn.Module:
    """Make a memory permanent: its hidden units become hidden units of the blocks, the adapter is gone.

    Args:
        model: a model adapted by locas; changed in place and returned, the same function up to rounding.
        name: of the adapter; None takes the only or the active one.

    Raises:
        NotAdapted: the model holds no such adapter.
        Incompatible: it is no memory or not in use, another adapter holds a projection, or the model's
            configuration, which has one width for all blocks, could not say how wide they are.
    """
    adaptation = require(model)
    adapter = adaptation.adapter(name)
    memories = {path: branch for path, (branch, _) in adapter.branches.items() if isinstance(branch, Memory)}
    if not memories:
        raise Incompatible(f"the adapter {adapter.name!r} has no memories of locas that could be absorbed")
    if adapter.name not in adaptation.active:
        raise Incompatible(
            f"the adapter {adapter.name!r} is not in use, and absorbing it would change what the model "
            "computes; call rankfold.use(model, name) first, and absorb outside of rankfold.disabled"
        )
    blocks = {path: _own_block(model, path) for path in memories}
    configs = _configs(model, {path: len(memory.gate) for path, memory in memories.items()})
    adaptation.base_values.update({k: v.clone() for k, v in adaptation.whole(adapter.name).items()})
    remove(model, adapter.name)
    for path, memory in memories.items():
        down = memory.scale * memory.down
        blocks[path].widen([(memory.gate, memory.gate_bias), (memory.up, memory.up_bias), (down, None)])
    for config, key, width in configs:
        setattr(config, key, width)
    return model


def _own_block(model: nn.Module, path: str) -> GatedBlock:
    """Return a block whose projections are its own and nobody else's."""
    block = gated_block(model.get_submodule(path))
    assert block is not None
    for part in block.names:
        layer = getattr(block.module, part)
        if isinstance(layer, StructuredLayer) and layer.adapters:
            raise Incompatible(f"{path}.{part} holds another adapter; fold or remove it first")
        readers = [m for m in model.modules() if any(p is layer.weight for p in m._parameters.values())]
        if len(readers) > 1:
            raise Incompatible(
                f"{path}.{part} shares its tensor with another layer and cannot be widened alone"
            )
    return block


def _configs(model: nn.Module, added: dict[str, int]) -> list[tuple[object, str, int]]:
    """Return what a model's configurations say of wider blocks: (configuration, name, value).

    Args:
        model: the model.
        added: how many hidden units every widened block gets, by path.

    Raises:
        Incompatible: a configuration could not say it, so the model could not be saved and loaded.
    """
    found: dict[int, tuple[object, str, int]] = {}
    for path, module in model.named_modules():
        block = gated_block(module)
        config = getattr(module, "config", getattr(model, "config", None))
        if block is None or config is None:
            continue
        name = next((name for name in WIDTHS if hasattr(config, name)), None)
        if name is None and not hasattr(config, "save_pretrained"):
            continue
        width = block.width + added.get(path, 0)
        if name is None or not isinstance(getattr(config, name), int):
            raise Incompatible(
                f"{path}: its configuration has no one width of all blocks that could be raised"
            )
        if found.setdefault(id(config), (config, name, width))[2] != width:
            raise Incompatible(
                f"{path} would have {width} hidden units and other blocks {found[id(config)][2]}, and "
                f"the configuration's {name} is one number for all; absorb memories of all blocks, as wide"
            )
    return list(found.values())
