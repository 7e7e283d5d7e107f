"""The model that is measured, rankfold's and peft's adapters on it, and one training step."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import rankfold as rf

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Size:
    """Dimensions of the model and of a batch."""

    hidden: int = 512
    intermediate: int = 1376
    layers: int = 8
    heads: int = 8
    vocabulary: int = 8192
    batch: int = 4
    length: int = 256

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def __str__(self) -> str:
        return (
            f"Llama, hidden {self.hidden}, {self.layers} layers, intermediate {self.intermediate}, "
            f"vocabulary {self.vocabulary}, {self.batch} x {self.length} tokens, float32"
        )


SMALL = Size(layers=2, vocabulary=2048)
QUICK = Size(hidden=64, intermediate=96, layers=2, heads=4, vocabulary=128, batch=2, length=16)


def build(size: Size) -> nn.Module:
    """Return a frozen model with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=4 * size.length,
    )
    model: nn.Module = LlamaForCausalLM(config)
    return model.requires_grad_(False)


def copy_of(model: nn.Module) -> nn.Module:
    """Return a copy that shares the stored weights, which no adapter changes."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def batch_of(size: Size) -> tuple[Tensor, Tensor]:
    """Return embedded inputs that ask for a gradient, and labels."""
    generator = torch.Generator().manual_seed(0)
    embedded = torch.randn(size.batch, size.length, size.hidden, generator=generator).requires_grad_()
    return embedded, torch.randint(size.vocabulary, (size.batch, size.length), generator=generator)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss: Tensor = model(inputs_embeds=batch[0], labels=batch[1], use_cache=False).loss
    return loss


def training_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return a function that runs forward and backward once."""

    def step() -> None:
        loss_of(model, batch).backward()
        for parameter in (*model.parameters(), batch[0]):
            parameter.grad = None

    return step


def ours(model: nn.Module, method: str, rank: int | None, options: dict[str, Any]) -> nn.Module:
    """Adapt a copy with rankfold."""
    return rf.adapt(copy_of(model), rf.Recipe((method, options)), rank=rank).train()
