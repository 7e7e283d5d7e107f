"""Reads portable exports with the loaders of servers, on a CPU: `make check-engines`.

A tiny random Llama is adapted by several methods and exported in the portable form. vLLM's own loader reads
every folder; SGLang's reads its configuration; for llama.cpp the folder is written as a GGUF adapter, whose
names, shapes, order and scale are read back by its rule. Every reader must find the change that the
expression makes, and must refuse DoRA in peft's full form, or find another change in it, to show that it
looks. Where llama-cpp-python is installed, it also runs the model with every adapter, and its logits must be
those of the expressions. One line for every server; the exit status is 1 if one of them reads another change
or cannot be asked.
"""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold as rf
from rankfold.formats import gguf as gguf_form
from rankfold.formats.files import read_json
from rankfold.formats.portable import check
from rankfold.layers import require

LAYERS, HEADS, KEY_HEADS, LARGEST_RANK, CLOSE = 2, 4, 2, 64, 1e-5
BYTES = 256  # tokens of a vocabulary that llama.cpp accepts, after the three special ones
METHODS = {
    "lora": {"alpha": 6, "rank": 4},
    "lora/pissa": {"rank": 4},
    "vera": {"rank": 12},
    "hra": {"rank": 4},
    "gralora": {"rank": 4},
}
Changes = Mapping[str, Tensor]


class Disagrees(Exception):
    """A server reads something else than what was written."""


def expect(true: bool, sentence: str) -> None:
    if not true:
        raise Disagrees(sentence)


def same_changes(found: Changes, wanted: Changes) -> None:
    """Compare the changes that a reader finds with those of the expressions, weight by weight."""
    expect(set(found) == set(wanted), f"other weights: {sorted(set(found) ^ set(wanted))[:3]}")
    for path, change in wanted.items():
        error = float((found[path] - change).abs().max() / change.abs().max())
        expect(error <= CLOSE, f"{path} is off by {error:.1e}")


# The adapters -----------------------------------------------------------------------------------------


def base() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BYTES + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def adapted(method: str, **options: object) -> nn.Module:
    """Return an adapted model, moved away from its start."""
    model = rf.adapt(base(), method, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn(parameter.shape)
    return model


@torch.no_grad()
def changes(model: nn.Module) -> Changes:
    adaptation = require(model)
    expressions = adaptation.expressions("default")
    return {path: e.dense() - adaptation.layers[path].matrix() for path, e in expressions.items()}


def export_all(place: Path) -> Iterator[tuple[Path, Changes]]:
    """Write every adapter, and check it by the rule that Rankfold states for all servers."""
    for method, options in METHODS.items():
        model, folder = adapted(method, **options), place / method.replace("/", "-")
        rf.export(model, folder, "portable")
        expect(check(folder) == [], f"{method}: {check(folder)}")
        yield folder, changes(model)


# The servers ------------------------------------------------------------------------------------------

# What vLLM's modules for LoRA import beside what they read files with: layers of its models, which need a GPU
# build.
_LAYERS_OF_VLLM = (
    "vllm.lora.layers", "vllm.model_executor", "vllm.model_executor.custom_op", "vllm.model_executor.layers",
    "vllm.model_executor.layers.fused_moe", "vllm.model_executor.layers.linear",
    "vllm.model_executor.layers.vocab_parallel_embedding", "vllm.model_executor.models",
    "vllm.model_executor.models.utils", "vllm.model_executor.utils", "vllm.transformers_utils.repo_utils",
)  # fmt: skip


class Vllm:
    """Reads configuration and tensors as `vllm serve --enable-lora` does."""

    name = f"vllm {version('vllm')}"

    def __init__(self, place: Path) -> None:
        from vllm.config.lora import LoRAConfig
        from vllm.lora.peft_helper import PEFTHelper

        sys.modules.update({name: MagicMock() for name in _LAYERS_OF_VLLM if name not in sys.modules})
        from vllm.lora import lora_model

        lora_model.PIN_MEMORY = False  # there is no accelerator to pin it for
        self._limits = LoRAConfig(max_lora_rank=LARGEST_RANK, max_loras=1)
        self._helper, self._model = PEFTHelper, lora_model.LoRAModel

    def read(self, folder: Path) -> Changes:
        helper = self._helper.from_local_dir(str(folder), max_position_embeddings=2048)
        helper.validate_legal(self._limits)
        targets = set(helper.target_modules)
        model = self._model.from_local_checkpoint(str(folder), targets, helper, device="cpu")
        for path, layer in model.loras.items():
            sizes = {layer.rank, helper.r, layer.lora_a.shape[0], layer.lora_b.shape[1]}
            expect(len(sizes) == 1, f"{path}: the ranks differ: {sizes}")
        return {path: layer.scaling * layer.lora_b @ layer.lora_a for path, layer in model.loras.items()}


class Sglang:
    """Reads the configuration by SGLang's class, and takes every tensor at its one global scale."""

    name = f"sglang {version('sglang')}"

    def __init__(self, place: Path) -> None:
        from sglang.srt.lora.lora_config import LoRAConfig

        self._config = LoRAConfig

    def read(self, folder: Path) -> Changes:
        config = self._config(str(folder))
        expect(config.hf_config["peft_type"].lower() == "lora", "the type is not LORA")
        expect(not config.use_dora and not config.lora_added_tokens_size, "uses DoRA or adds tokens")
        expect(isinstance(config.target_modules, list), "the targets are no list")
        pairs = tensor_pairs(load_file(folder / "adapter_model.safetensors"))
        ends = {path.rpartition(".")[2] for path in pairs}
        expect(ends <= set(config.target_modules), "a weight is not among the targets")
        expect(all(a.shape[0] == config.r for a, _ in pairs.values()), "a rank is not r")
        return {path: config.lora_alpha / config.r * b @ a for path, (a, b) in pairs.items()}


class LlamaCpp:
    """Writes a GGUF adapter under llama.cpp's names, and reads names, shapes and scale back by its rule."""

    name = f"llama.cpp (gguf {version('gguf')})"

    def __init__(self, place: Path) -> None:
        import gguf

        self._gguf, self._place = gguf, place

    def read(self, folder: Path) -> Changes:
        pairs = tensor_pairs(load_file(folder / "adapter_model.safetensors"))
        config = read_json(folder / "adapter_config.json")
        expect(config["lora_alpha"] == config["r"], "the scale is not folded in")
        file, model = self._place / f"{folder.name}.gguf", base()
        gguf_form.write(file, model, {path: (b, a) for path, (a, b) in pairs.items()})
        return self._read(file, {name: path for path, name in gguf_form.check(model, pairs).items()})

    def _read(self, file: Path, paths: Mapping[str, str]) -> Changes:
        reader = self._gguf.GGUFReader(file)
        alpha = float(reader.get_field(self._gguf.Keys.Adapter.LORA_ALPHA).contents())
        tensors = {t.name: torch.from_numpy(t.data.copy()) for t in reader.tensors}
        found = {}
        for name, path in paths.items():
            a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
            expect(a.shape[0] == b.shape[1], f"{name}: the ranks differ")
            found[path] = alpha / b.shape[1] * self._in_order(name, b) @ a
        return found

    def _in_order(self, name: str, rows: Tensor) -> Tensor:
        """Undo the order in which llama.cpp has the rows of queries and keys: neighbours become halves."""
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(name.split(".")[-2])
        if heads is None:
            return rows
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tensor_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B by module path; any other tensor is one that a server refuses or skips."""
    prefix, ends = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
    for name in tensors:
        expect(name.startswith(prefix) and name.endswith(ends), f"{name} is no A or B of a linear layer")
    paths = dict.fromkeys(
        name.removeprefix(prefix).removesuffix(ends[0]) for name in tensors if ends[0] in name
    )
    return {path: (tensors[prefix + path + ends[0]], tensors[prefix + path + ends[1]]) for path in paths}


# The check --------------------------------------------------------------------------------------------


def notices(read: Callable[[Path], Changes], place: Path) -> None:
    """Assert that a reader tells peft's full form of DoRA from the portable form."""
    dora = adapted("dora", rank=4)
    rf.export(dora, place / "dora", "peft")
    try:
        same_changes(read(place / "dora"), changes(dora))
    except Exception:  # each server has errors of its own
        return
    raise Disagrees("reads DoRA as if it were plain LoRA")


def ask(server: Callable[[Path], Vllm | Sglang | LlamaCpp], place: Path) -> str:
    """Let one server read everything; return what it did."""
    reader, weights = server(place), 0
    for folder, wanted in export_all(place):
        same_changes(reader.read(folder), wanted)
        weights += len(wanted)
    notices(reader.read, place)
    return f"{len(METHODS)} adapters, {weights} weights read as written"


# Running ----------------------------------------------------------------------------------------------


def write_base(file: Path) -> None:
    """Write the base model as llama.cpp reads it, with a vocabulary of bytes."""
    import gguf

    model = base()
    config, writer = model.config, gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.TokenType
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(BYTES))])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * BYTES])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, value in model.state_dict().items():
        there = table.get_name(name, try_suffixes=(".weight",))
        heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(there.split(".")[-2])
        rows = value if heads is None else value[gguf_form.rotary_order(len(value), heads)]
        writer.add_tensor(there, rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def run_llama_cpp(place: Path) -> str:
    """Let llama.cpp run the base with every adapter, and compare the logits."""
    try:
        import llama_cpp
    except ImportError:
        return "not installed, nothing was run"
    tokens, largest = [1, 40, 7, 200, 100, 3, 90], 0.0
    write_base(place / "base.gguf")
    for method, options in METHODS.items():
        model, file = adapted(method, **options), place / f"{method.replace('/', '-')}.gguf"
        rf.export(model, file, "gguf")
        engine = llama_cpp.Llama(
            str(place / "base.gguf"), lora_path=str(file), n_ctx=64, logits_all=True, verbose=False
        )
        engine.eval(tokens)
        found = torch.tensor(engine.scores[: len(tokens)])
        wanted, plain = (m(torch.tensor([tokens])).logits[0] for m in (model, base()))
        expect(float((wanted - plain).abs().max()) > 0.1, f"{method}: the adapter changes nothing")
        largest = max(largest, float((found - wanted).abs().max() / wanted.abs().max()))
        expect(largest < 1e-2, f"{method}: the logits are off by {largest:.1e}")  # its attention is in half
    return f"{len(METHODS)} adapters run, logits off by {largest:.0e} at most"


def main() -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        try:
            print(f"llama-cpp-python: {run_llama_cpp(Path(place))}", flush=True)
        except Exception as error:
            failed += 1
            print(f"llama-cpp-python: FAILED, {type(error).__name__}: {error}", flush=True)
    for server in (Vllm, Sglang, LlamaCpp):
        with tempfile.TemporaryDirectory() as place:
            try:
                print(f"{server.name}: {ask(server, Path(place))}", flush=True)
            except Exception as error:  # each server has errors of its own
                failed += 1
                print(f"{server.name}: FAILED, {type(error).__name__}: {error}", flush=True)
                if not isinstance(error, Disagrees):
                    traceback.print_exc()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
