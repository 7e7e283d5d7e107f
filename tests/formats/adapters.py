"""Adapters that other tools have made, for the tests that read them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn


class Mixed(nn.Module):
    """Convolutions of one and two dimensions, one of them in groups, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.point = nn.Conv2d(8, 6, 1)
        self.mid = nn.ModuleDict({"in_layer": nn.Linear(6, 12), "out": nn.Linear(12, 8, bias=False)})
        self.last = nn.Conv1d(8, 6, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.point(torch.tanh(self.conv(x))).mean((2, 3))
        hidden = self.mid["out"](torch.tanh(self.mid["in_layer"](hidden)))
        return self.last(hidden[:, :, None].expand(-1, -1, 5))  # type: ignore[no-any-return]


def mixed() -> Mixed:
    """Return the model, with the same values every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed().eval()


def image() -> Tensor:
    """Return an input of the model."""
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def shuffled(parameters: Mapping[str, nn.Parameter]) -> None:
    """Give parameters numbers away from every start; magnitudes stay positive."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(parameters.items()):
        noise = 0.4 * torch.randn(parameter.shape, generator=generator)
        magnitude = "dora_scale" in name or "magnitude" in name
        parameter.data = (parameter.data + noise).abs() + 0.2 if magnitude else noise


def lycoris(file: Path, algorithm: str, **options: Any) -> Tensor:
    """Adapt the model by LyCORIS, write the file, and return what its own model gives for the image."""
    from lycoris import LycorisNetwork, create_lycoris

    model = mixed()
    LycorisNetwork.apply_preset({"target_name": [".*"], "enable_conv": True})
    network = create_lycoris(
        model, 1.0, linear_dim=2, linear_alpha=3.0, conv_dim=2, conv_alpha=1.0, algo=algorithm, **options
    ).eval()
    network.apply_to()
    shuffled(dict(network.named_parameters()))
    network.save_weights(str(file), None, {})
    with torch.no_grad():
        return model(image())  # type: ignore[no-any-return]


def peft_folder(folder: Path, model: nn.Module, configuration: Any) -> nn.Module:
    """Adapt a copy of a model by peft, write the folder, and return the adapted copy."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(copy.deepcopy(model), configuration).eval()
        shuffled({name: p for name, p in adapted.named_parameters() if p.requires_grad})
        adapted.save_pretrained(str(folder))
    return adapted


def written(file: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> Path:
    """Write tensors with a header."""
    own = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    save_file(own, str(file), dict(header or {}))
    return file
