"""Folders of models, as they lie on a disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


class Writer:
    """Writes models into folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __call__(
        self,
        name: str,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any] | None = None,
        shards: int = 1,
    ) -> Path:
        path = self.root / name
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config or {}))
        if shards == 1:
            save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
            return path
        names, places = list(tensors), {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
            save_file({key: tensors[key] for key in part}, path / file, metadata={"format": "pt"})
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        return path

    def llama(self, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
        """Write a small Llama of transformers."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        small = {
            "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "max_position_embeddings": 16,
        }  # fmt: skip
        model = LlamaForCausalLM(LlamaConfig(**{**small, **config})).to(dtype)
        model.save_pretrained(self.root / name)
        return self.root / name
