"""Parity with peft: the same values copied in give the same outputs and the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from methods._layers import disturbed, leaves_of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankfold as rf

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative to the largest entry
DTYPES = list(TOLERANCES)
INVOCATION = (5, 6)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 6, bias=False))


def transposed() -> nn.Module:
    return nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(6, 20))


def looked_up() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 4))


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 6, 2, bias=False))


def oblong() -> nn.Module:
    # No dilation: peft's down kernel ignores that of the layer.
    return nn.Sequential(nn.Conv2d(4, 8, (3, 2), padding=(1, 0)))


def llama() -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(shape, generator=generator, dtype=torch.float64)


def prompt(generator: torch.Generator) -> Tensor:
    """Draw three rows of token ids: invoked early, invoked twice, and not at all."""
    ids = torch.randint(7, 19, (3, 9), generator=generator)
    for row, start in ((0, 2), (1, 1), (1, 6)):
        ids[row, start : start + 2] = torch.tensor(INVOCATION)
    return ids


@dataclass(frozen=True)
class Host:
    """A small model of which both libraries adapt the same layers.

    Attributes:
        make: builds the model.
        paths: endings of the names of the adapted layers, as both libraries take them.
        sample: draws an input.
    """

    make: Callable[[], nn.Module]
    paths: tuple[str, ...]
    sample: Callable[[torch.Generator], Tensor]

    def model(self, dtype: torch.dtype) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make().to(dtype).eval()

    def input(self, dtype: torch.dtype) -> Tensor:
        x = self.sample(torch.Generator().manual_seed(1))
        return x.to(dtype) if x.is_floating_point() else x


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HOSTS = {
    "perceptron": Host(perceptron, ("0", "2"), normal(3, 5, 12)),
    "transposed": Host(transposed, ("0", "2"), normal(3, 5, 12)),
    "embedding": Host(looked_up, ("0",), lambda g: torch.randint(11, (3, 5), generator=g)),
    "convolution": Host(convolutional, ("0", "2"), normal(2, 4, 7, 6)),
    "oblong": Host(oblong, ("0",), normal(2, 4, 7, 6)),
    "llama": Host(llama, _PROJECTIONS, prompt),
}

# Pairs (name of our leaf, their tensor, how ours is laid out as theirs), for one layer.
Layout = Callable[[nn.Module, Mapping[str, Tensor]], Iterable[tuple[str, Tensor, Callable[[Tensor], Tensor]]]]


def _as(shape: torch.Size) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(shape)


def lora_layout(layer: Any, leaves: Mapping[str, Tensor]) -> Iterable[tuple[str, Tensor, Any]]:
    """B (out, r) and A (r, in), kernels on a convolution, transposed and named apart on an embedding."""
    if "default" in layer.lora_embedding_A:
        yield "up", layer.lora_embedding_A["default"], Tensor.t
        yield "down", layer.lora_embedding_B["default"], Tensor.t
        pairs = []
    else:
        pairs = [("up", layer.lora_B["default"].weight), ("down", layer.lora_A["default"].weight)]
    if "magnitude" in leaves:
        pairs.append(("magnitude", layer.lora_magnitude_vector["default"].weight))
    for name, theirs in pairs:
        yield name, theirs, _as(theirs.shape)


@dataclass(frozen=True)
class Twins:
    """One model adapted by both libraries.

    Attributes:
        ours: adapted by rankfold, moved away from its start.
        theirs: the peft model, with the same values.
        pairs: ours, theirs and the layout, for every trained tensor.
        x: an input.
    """

    ours: nn.Module
    theirs: nn.Module
    pairs: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]
    x: Tensor


def layer_paths(host: Host, model: nn.Module) -> list[str]:
    """Return the names of the adapted layers."""
    return [name for name, _ in model.named_modules() if name.split(".")[-1] in host.paths]


def twins(
    host: Host,
    dtype: torch.dtype,
    method: str,
    config: Any,
    layout: Layout,
    *,
    shared: Callable[[nn.Module, nn.Module], Iterable[tuple[Tensor, Tensor]]] = lambda ours, theirs: (),
    prepare: Callable[[nn.Module, nn.Module], None] = lambda ours, theirs: None,
    **options: Any,
) -> Twins:
    """Adapt copies of a model by both libraries and give peft our values.

    Args:
        host: the model.
        dtype: of the model.
        method: of ours.
        config: of peft; its target modules are filled in.
        layout: how the tensors of a layer correspond.
        shared: pairs of tensors that belong to the whole model.
        prepare: called with both layers of every path once the values are alike.
        options: for `rf.adapt`.
    """
    from peft import get_peft_model

    base = host.model(dtype)
    config.target_modules = list(host.paths)
    theirs = get_peft_model(copy.deepcopy(base), config).to(dtype).eval()
    paths = layer_paths(host, base)
    ours = disturbed(rf.adapt(base, method, targets=paths, **options), 0.1)
    pairs: list[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]] = []
    for path in paths:
        own, other = leaves_of(ours, path), theirs.base_model.model.get_submodule(path)
        pairs += [(own[name], tensor, laid_out) for name, tensor, laid_out in layout(other, own)]
        prepare(ours.get_submodule(path), other)
    pairs += [(own, tensor, lambda value: value) for own, tensor in shared(ours, theirs)]
    for own, tensor, laid_out in pairs:
        tensor.data.copy_(laid_out(own.detach()))
    return Twins(ours, theirs, [p for p in pairs if p[0].requires_grad], host.input(dtype))


def assert_parity(pair: Twins) -> float:
    """Assert that outputs and gradients of all that trains are alike; return the largest difference."""
    trained = {p for p in pair.ours.parameters() if p.requires_grad}
    assert {own for own, _, _ in pair.pairs} == trained, "something that trains has no counterpart"
    outputs = [_output(model, pair.x) for model in (pair.ours, pair.theirs)]
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3)).to(outputs[0].dtype)
    for output in outputs:
        (output * weights).sum().backward()
    gradients = [(laid_out(own.grad), theirs.grad) for own, theirs, laid_out in pair.pairs]  # type: ignore[arg-type]
    tolerance = TOLERANCES[outputs[0].dtype]
    worst = 0.0
    for ours, theirs in [(outputs[0].detach(), outputs[1].detach()), *gradients]:
        assert theirs.abs().max() > 0, "their gradient is zero, so nothing is compared"
        worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    assert worst <= tolerance, f"off by {worst:.1e} of the largest entry"
    return worst


def _output(model: nn.Module, x: Tensor) -> Tensor:
    output: Any = model(x)
    result: Tensor = getattr(output, "logits", output)
    return result
