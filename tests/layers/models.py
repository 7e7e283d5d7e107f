"""Tiny random models of real classes, and what the tests of this folder ask of any of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

import rankfold as rf

VOCABULARY, WIDTH, BLOCKS = 40, 16, 2


def llama(**options: Any) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=BLOCKS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def gpt2(**options: Any) -> nn.Module:
    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=BLOCKS, n_head=2, n_positions=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, **dropped, **options,
    )  # fmt: skip
    return hf.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=BLOCKS,
        num_attention_heads=2, max_position_embeddings=64, num_labels=3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return hf.BertForSequenceClassification(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=24, num_layers=BLOCKS, num_heads=2,
        dropout_rate=0.0, decoder_start_token_id=0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    config = hf.BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=BLOCKS, decoder_layers=BLOCKS,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        max_position_embeddings=64, dropout=0.0, num_labels=3,
    )  # fmt: skip
    return hf.BartForSequenceClassification(config)


def opt() -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_dim=24, num_hidden_layers=BLOCKS, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH, dropout=0.0,
    )  # fmt: skip
    return hf.OPTForCausalLM(config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=BLOCKS, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=3,
    )  # fmt: skip
    return hf.ViTForImageClassification(config)


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(
        vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=24, n_layers=BLOCKS, n_heads=2, num_labels=3,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0,
    )  # fmt: skip
    return hf.DistilBertForSequenceClassification(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama, "gpt2": gpt2, "bert": bert, "t5": t5, "bart": bart, "opt": opt, "vit": vit,
    "distilbert": distilbert,
}  # fmt: skip


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model with the same values every time, in evaluation."""
    torch.manual_seed(seed)
    return build().eval()


def made(name: str) -> nn.Module:
    return seeded(MODELS[name])


def inputs(name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=generator)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if name == "bart":
        ids[:, -1] = 2  # its classifier reads the end token
    return {"input_ids": ids, "decoder_input_ids": ids} if name == "t5" else {"input_ids": ids}


def logits(model: nn.Module, name: str) -> Tensor:
    result: Tensor = model(**inputs(name)).logits
    return result


def perturb(model: nn.Module, size: float = 0.1, seed: int = 7) -> None:
    """Move everything that trains, so that no change is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def adapted(model: nn.Module, method: str = "lora", **options: Any) -> nn.Module:
    """Adapt a model and move its adapter away from zero."""
    rf.adapt(model, method, **{"rank": 2, **options})
    perturb(model)
    return model


class Memory:
    """What a model was: modules, tensors, values, flags and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        self.places = {name: tensor.data_ptr() for name, tensor in self.tensors.items()}
        self.values = {name: _plain(tensor).clone() for name, tensor in self.tensors.items()}
        self.flags = {name: tensor.requires_grad for name, tensor in self.tensors.items()}
        self.hooks = {name: _hooks(module) for name, module in self.modules.items()}
        self.attributes = {name: set(module.__dict__) for name, module in self.modules.items()}

    def check(self, model: nn.Module) -> None:
        """Assert that the model is the same, bit for bit and object for object."""
        now = Memory(model)
        assert list(now.modules) == list(self.modules)
        assert all(now.modules[name] is module for name, module in self.modules.items())
        assert list(now.tensors) == list(self.tensors)
        assert all(now.tensors[name] is tensor for name, tensor in self.tensors.items())
        assert now.places == self.places
        assert all(torch.equal(now.values[name], value) for name, value in self.values.items())
        assert now.flags == self.flags
        assert now.hooks == self.hooks
        assert now.attributes == self.attributes


def _plain(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, of a torchao one those that it stores."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return tensor.detach() if flatten is None else _plain(getattr(tensor, flatten()[0][0]))


def _hooks(module: nn.Module) -> list[int]:
    return [
        len(hooks) for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
