"""What other tools wrote is read as the change that their own models make, exactly, and nothing is run."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import Point, adapted_blocks, disturbed
from formats.adapters import image, lycoris, mixed, peft_folder, written
from formats.small import POINTS, output, saved
from hosts import KINDS, Host, blocks, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold import Changes
from rankfold.errors import BaseMismatch, FormatError, Incompatible, MissingPath, NotDense
from rankfold.formats.files import write_json
from rankfold.layers import require


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_changes(model: nn.Module, changes: Changes) -> nn.Module:
    """Add changes to a model's own weights."""
    with torch.no_grad():
        for path in changes.paths:
            weight = model.get_submodule(path).weight
            weight += changes.dense(path).reshape(weight.shape)
        for key, value in changes.whole.items():
            model.get_parameter(key).copy_(value)
    return model


def is_same(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


# Rankfold's own folders -------------------------------------------------------------------------------


def true_changes(model: nn.Module) -> dict[str, Tensor]:
    adaptation = require(model)
    return {
        path: (expression.dense().double() - adaptation.layers[path].matrix().double()).detach()
        for path, expression in adaptation.expressions(adaptation.adapter().name).items()
    }


def read_if_any(folder: Path, base: nn.Module) -> Changes | None:
    """Read an adapter, beside its base only where that is said to be needed; None if it changes no weight."""
    with contextlib.suppress(NotDense):
        try:
            return rf.read_changes(folder)
        except Incompatible as error:
            if "pass model=" not in str(error):
                raise
        return rf.read_changes(folder, base)
    return None


ONE_EACH = {point.structure.name: point for point in POINTS}


@pytest.mark.parametrize("point", ONE_EACH.values(), ids=str)
def test_every_structure_is_read_without_its_base_or_says_that_it_needs_it(
    point: Point, tmp_path: Path
) -> None:
    model = adapted_blocks(point)
    folder = rf.save(model, tmp_path / "adapter")
    changes = read_if_any(folder, point.blocks())
    if changes is None:
        return
    for path, change in true_changes(model).items():
        torch.testing.assert_close(changes.dense(path).double(), change, rtol=1e-4, atol=2e-6)
        assert changes.rank(path) <= min(changes.shape(path))


BASE_FREE = ("lora", "loha", "lokr", "vera", "gralora", "uni-lora", "abba", "lora-xs", "svfit", "randlora")
BASE_BOUND = ("dora", "hra", "hira", "oft", "boft", "bone", "lorma")


@pytest.mark.parametrize("method", BASE_FREE)
def test_a_change_of_its_own_needs_no_base(method: str, tmp_path: Path) -> None:
    assert rf.read_changes(saved(tmp_path / "adapter", method)).source == f"rankfold {method}"


@pytest.mark.parametrize("method", BASE_BOUND)
def test_a_change_of_the_base_weight_says_so(method: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", method)
    with pytest.raises(
        Incompatible, match=r"blocks.0.attention: the change depends on the base weight; pass model="
    ):
        rf.read_changes(folder)
    rf.read_changes(folder, blocks())


@pytest.mark.parametrize("method", ["reft", "adaptertune", "mixture"])
def test_what_is_no_change_of_a_weight_is_refused(method: str, tmp_path: Path) -> None:
    with pytest.raises(NotDense):
        rf.read_changes(saved(tmp_path / "adapter", method))


def test_reading_beside_a_model_leaves_it_alone_and_checks_that_it_is_the_base(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "dora")
    model = blocks()
    before = [(name, id(module)) for name, module in model.named_modules()]
    rf.read_changes(folder, model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    for parameter in model.parameters():
        parameter.data.neg_()
    with pytest.raises(BaseMismatch, match="made for another base"):
        rf.read_changes(folder, model)


@pytest.mark.parametrize("host", KINDS, ids=lambda host: host.name)
def test_kinds_and_windows_come_from_the_record(host: Host, tmp_path: Path) -> None:
    model = disturbed(rf.adapt(host.model(), "lora", targets=[host.path], rank=2))
    folder = rf.save(model, tmp_path / "adapter")
    changes = rf.read_changes(folder)
    beside = rf.read_changes(folder, host.model())
    assert (changes.kinds, changes.windows) == (beside.kinds, beside.windows)
    torch.testing.assert_close(changes.dense(host.path), true_changes(model)[host.path])
    expected = {"attention": "attention projection"}.get(host.kind, host.kind)
    assert changes.kinds[host.path] == ("grouped convolution" if "grouped" in host.name else expected)
    weight = getattr(host.model().layer, "weight", None)
    assert changes.windows.get(host.path, ()) == (tuple(weight.shape[2:]) if weight is not None else ())
    if changes.kinds[host.path] in ("linear", "embedding", "convolution"):
        back = rf.load(host.model(), changes.save(tmp_path / "peft"))
        torch.testing.assert_close(back(host.input()), model(host.input()))
    else:
        with pytest.raises(Incompatible, match="no agreed names"):
            changes.save(tmp_path / "peft")


def test_modules_trained_whole_come_along(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "lora", train=("lm_head",))
    changes = rf.read_changes(folder)
    assert sorted(changes.whole) == ["lm_head.bias", "lm_head.weight"]
    is_same(with_changes(blocks(), changes)(token_ids()), output(rf.load(blocks(), folder)))


def test_ranks_that_training_moved_are_read(tmp_path: Path) -> None:
    model = rf.adapt(blocks(), "lora", rank=4)
    rf.squeeze(disturbed(model), 2)
    changes = rf.read_changes(rf.save(model, tmp_path / "adapter"))
    assert {changes.rank(path) for path in changes.paths} == {2}
    for path, change in true_changes(model).items():
        torch.testing.assert_close(changes.dense(path).double(), change, rtol=1e-4, atol=1e-6)


# LyCORIS ----------------------------------------------------------------------------------------------

LYCORIS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {}),
    ("lora", {"use_tucker": True}),
    ("lora", {"rs_lora": True}),
    ("loha", {}),
    ("loha", {"use_tucker": True}),
    ("lokr", {}),
    ("lokr", {"decompose_both": True, "use_tucker": True}),
    ("lokr", {"full_matrix": True}),
    ("lokr", {"factor": 2}),
    ("lora", {"dora_wd": True}),
    ("lora", {"dora_wd": True, "wd_on_output": False}),
    ("loha", {"dora_wd": True}),
    ("lokr", {"dora_wd": True}),
]


@pytest.mark.parametrize(("algorithm", "options"), LYCORIS, ids=str)
def test_a_lycoris_file_is_the_change_that_lycoris_makes(
    algorithm: str, options: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "adapter.safetensors"
    wanted = lycoris(file, algorithm, **options)
    changes = rf.read_changes(file, mixed())
    assert changes.source == "LyCORIS"
    assert not changes.flattened
    assert changes.paths == ("conv", "last", "mid.in_layer", "mid.out", "point")
    assert (changes.kinds["conv"], changes.windows["conv"]) == ("convolution", (3, 3))
    is_same(with_changes(mixed(), changes)(image()), wanted)
    is_same(rf.load(mixed(), file)(image()), wanted)
    assert float((mixed()(image()) - wanted).detach().abs().max()) > 0.005


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
def test_without_a_model_names_stay_flattened(algorithm: str, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    lycoris(file, algorithm)
    changes, beside = rf.read_changes(file), rf.read_changes(file, mixed())
    assert changes.flattened
    assert changes.paths[2:4] == ("lycoris_mid_in_layer", "lycoris_mid_out")
    for flat, path in zip(changes.paths, beside.paths, strict=True):
        assert torch.equal(changes.dense(flat), beside.dense(path))
    with pytest.raises(Incompatible, match="lycoris_conv is a flattened name"):
        changes.save(tmp_path / "out")


def test_a_hadamard_product_is_exact_at_the_product_of_both_ranks(tmp_path: Path) -> None:
    leaves = {name: normal(12, 2, seed=i) for i, name in enumerate(("hada_w1_a", "hada_w2_a"))}
    leaves |= {name: normal(2, 20, seed=5 + i) for i, name in enumerate(("hada_w1_b", "hada_w2_b"))}
    file = written(tmp_path / "a.safetensors", {f"lycoris_x.{key}": value for key, value in leaves.items()})
    changes = rf.read_changes(file)
    assert changes.rank("lycoris_x") == 4
    product = (leaves["hada_w1_a"] @ leaves["hada_w1_b"]) * (leaves["hada_w2_a"] @ leaves["hada_w2_b"])
    is_same(changes.dense("lycoris_x"), product)
    assert int(torch.linalg.matrix_rank(product)) == 4


def test_a_whole_change_is_kept_as_it_is(tmp_path: Path) -> None:
    wide, kernel = normal(3, 5), normal(6, 2, 3, 3)
    file = written(tmp_path / "a.safetensors", {"lycoris_a.diff": wide, "lycoris_b.diff": kernel})
    changes = rf.read_changes(file)
    assert (changes.rank("lycoris_a"), changes.rank("lycoris_b")) == (3, 6)
    assert torch.equal(changes.dense("lycoris_a"), wide)
    assert torch.equal(changes.dense("lycoris_b"), kernel.flatten(1))
    assert changes.windows == {"lycoris_b": (3, 3)}


def test_a_magnitude_needs_the_base(tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    lycoris(file, "lora", dora_wd=True)
    with pytest.raises(Incompatible, match=r"lycoris_conv is a DoRA, .* pass model="):
        rf.read_changes(file)


# kohya and diffusers ----------------------------------------------------------------------------------


class Pipeline(nn.Module):
    """Components as diffusers names them."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = nn.ModuleDict({"to_q": nn.Linear(6, 8), "to_out": nn.ModuleList([nn.Linear(8, 6)])})
        self.text_encoder = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
        self.text_encoder_2 = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})


PAIR = normal(8, 2), normal(2, 6, seed=1)
SMALL = normal(4, 3, seed=2), normal(3, 4, seed=3)


def lora(name: str, pair: tuple[Tensor, Tensor], up: str, down: str, **more: Tensor) -> dict[str, Tensor]:
    """Return the tensors of one weight under a tool's names."""
    extra = {f"{name}.{key}": value for key, value in more.items()}
    return {f"{name}.{up}.weight": pair[0], f"{name}.{down}.weight": pair[1], **extra}


KOHYA = ("lora_up", "lora_down")
DIFFUSERS = ("lora_B", "lora_A")


def test_a_kohya_file_is_read_with_its_alphas_and_its_components(tmp_path: Path) -> None:
    tensors = lora("lora_unet_to_q", PAIR, *KOHYA, alpha=torch.tensor(1.0))
    tensors |= lora("lora_te_q_proj", SMALL, *KOHYA, alpha=torch.tensor(6, dtype=torch.int64))
    tensors |= lora("lora_te2_q_proj", SMALL, *KOHYA)
    file = written(
        tmp_path / "a.safetensors",
        {key: value.bfloat16() if value.dim() else value for key, value in tensors.items()},
    )
    changes = rf.read_changes(file)
    assert (changes.source, changes.flattened) == ("kohya", True)
    assert set(changes.paths) == {"lora_unet_to_q", "lora_te_q_proj", "lora_te2_q_proj"}
    exact = [tensor.bfloat16().float() for tensor in (*PAIR, *SMALL)]
    assert torch.equal(changes.dense("lora_unet_to_q"), exact[0] * 0.5 @ exact[1])
    is_same(changes.dense("lora_te_q_proj"), 2 * exact[2] @ exact[3])
    is_same(changes.dense("lora_te2_q_proj"), exact[2] @ exact[3])
    beside = rf.read_changes(file, Pipeline())
    assert set(beside.paths) == {"unet.to_q", "text_encoder.q_proj", "text_encoder_2.q_proj"}
    assert not beside.flattened


def test_a_diffusers_file_is_read_with_the_scales_of_its_header(tmp_path: Path) -> None:
    tensors = lora("unet.to_q", PAIR, *DIFFUSERS) | lora("unet.to_out.0", (PAIR[1].T, PAIR[0].T), *DIFFUSERS)
    tensors |= lora("text_encoder.q_proj", SMALL, *DIFFUSERS)
    header = {
        "unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"to_out.0": 1},
        "text_encoder.r": 3, "text_encoder.lora_alpha": 6, "text_encoder.use_rslora": True,
    }  # fmt: skip
    file = written(
        tmp_path / "pytorch_lora_weights.safetensors", tensors, {"lora_adapter_metadata": json.dumps(header)}
    )
    for model in (None, Pipeline()):
        changes = rf.read_changes(tmp_path, model)
        assert (changes.source, changes.flattened) == ("diffusers", False)
        is_same(changes.dense("unet.to_q"), 2 * PAIR[0] @ PAIR[1])
        is_same(changes.dense("unet.to_out.0"), 0.5 * PAIR[1].T @ PAIR[0].T)
        is_same(changes.dense("text_encoder.q_proj"), 6 / math.sqrt(3) * SMALL[0] @ SMALL[1])
    unet = nn.ModuleDict({"to_q": nn.Linear(6, 8)})
    alone = written(tmp_path / "alone.safetensors", lora("unet.to_q", PAIR, *DIFFUSERS))
    assert rf.read_changes(alone, unet).paths == ("to_q",)
    assert torch.equal(
        rf.read_changes(file).dense("unet.to_q"), rf.read_changes(tmp_path / file.name).dense("unet.to_q")
    )


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("unet.mid.attn1.processor.to_q_lora.{}.weight", "unet.mid.attn1.to_q"),
        ("unet.mid.attn1.processor.to_out_lora.{}.weight", "unet.mid.attn1.to_out.0"),
        ("text_encoder.layers.0.self_attn.to_v_lora.{}.weight", "text_encoder.layers.0.self_attn.v_proj"),
        ("text_encoder.layers.0.q_proj.lora_linear_layer.{}.weight", "text_encoder.layers.0.q_proj"),
        ("unet.mid.attn1.to_k.lora.{}.weight", "unet.mid.attn1.to_k"),
    ],
)
def test_the_names_of_older_files_are_known(key: str, path: str, tmp_path: Path) -> None:
    tensors = {key.format("up"): PAIR[0], key.format("down"): PAIR[1]}
    changes = rf.read_changes(written(tmp_path / "a.safetensors", tensors))
    assert torch.equal(changes.dense(path), PAIR[0] @ PAIR[1])


def test_a_diffusers_magnitude_is_read_beside_the_base(tmp_path: Path) -> None:
    model, magnitude = Pipeline(), normal(8).abs()
    tensors = lora("unet.to_q", PAIR, *DIFFUSERS, lora_magnitude_vector=magnitude)
    file = written(tmp_path / "a.safetensors", tensors)
    weight = model.unet["to_q"].weight.detach()
    direction = weight + PAIR[0] @ PAIR[1]
    wanted = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True) - weight
    is_same(rf.read_changes(file, model).dense("unet.to_q"), wanted)


# peft -------------------------------------------------------------------------------------------------


class Parts(nn.Module):
    """What peft's methods adapt: linear layers of two shapes, convolutions, an embedding, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)
        self.conv, self.line = nn.Conv2d(1, 6, (3, 3), padding=1), nn.Conv1d(6, 4, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.second(torch.tanh(self.first(self.embed(ids))))
        kernel = self.line(self.conv(hidden[:, None]).mean(2))
        return self.head(hidden).mean((1, 2)) + kernel.mean((1, 2))  # type: ignore[no-any-return]


def parts() -> Parts:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Parts().eval()


IDS = torch.tensor([[0, 1, 2, 8], [3, 3, 5, 7]])
LINEAR, KERNELS = ["first", "second"], ["conv", "line"]
PEFT: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "lora": (lambda p: p.LoraConfig(r=3, lora_alpha=5, target_modules=[*LINEAR, *KERNELS, "embed"]), False),
    "rslora": (lambda p: p.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=LINEAR), False),
    "patterns": (
        lambda p: p.LoraConfig(
            r=2, target_modules=LINEAR, rank_pattern={"second": 4}, alpha_pattern={"first": 3}
        ),
        False,
    ),
    "saved modules": (lambda p: p.LoraConfig(r=2, target_modules=LINEAR, modules_to_save=["head"]), False),
    "dora": (lambda p: p.LoraConfig(r=2, use_dora=True, target_modules=[*LINEAR, "conv", "embed"]), True),
    "vera": (lambda p: p.VeraConfig(r=3, target_modules=LINEAR), True),
    "loha": (lambda p: p.LoHaConfig(r=2, alpha=3, target_modules=LINEAR), False),
    "loha patterns": (
        lambda p: p.LoHaConfig(
            r=2, alpha=3, target_modules=LINEAR, rank_pattern={"second": 3}, alpha_pattern={"first": 5}
        ),
        False,
    ),
    "loha kernels": (lambda p: p.LoHaConfig(r=2, alpha=3, target_modules=KERNELS), True),
    "loha tucker": (
        lambda p: p.LoHaConfig(r=2, alpha=3, target_modules=KERNELS, use_effective_conv2d=True), True,
    ),
    "lokr": (lambda p: p.LoKrConfig(r=1, alpha=3, target_modules=LINEAR), False),
    "lokr both": (lambda p: p.LoKrConfig(r=1, alpha=3, target_modules=LINEAR, decompose_both=True), False),
    "lokr full": (lambda p: p.LoKrConfig(r=8, alpha=3, target_modules=LINEAR), False),
    "lokr kernels": (lambda p: p.LoKrConfig(r=1, alpha=3, target_modules=KERNELS), True),
    "lokr tucker": (
        lambda p: p.LoKrConfig(r=1, alpha=3, target_modules=KERNELS, use_effective_conv2d=True), True,
    ),
    "adalora": (
        lambda p: p.AdaLoraConfig(init_r=3, lora_alpha=5, total_step=9, target_modules=LINEAR), False,
    ),
    "gralora": (lambda p: p.GraloraConfig(r=4, alpha=6, gralora_k=2, target_modules=LINEAR), False),
    "gralora hybrid": (
        lambda p: p.GraloraConfig(r=4, alpha=6, gralora_k=2, hybrid_r=2, target_modules=LINEAR), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PEFT)
def test_a_peft_folder_is_the_change_that_peft_makes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft

    # peft hands torch a strided kernel, which some versions of `kron` refuse.
    kron, plain = torch.kron, torch.contiguous_format
    monkeypatch.setattr(torch, "kron", lambda *pair: kron(*(f.clone(memory_format=plain) for f in pair)))
    configuration, needs_model = PEFT[kind]
    wanted = peft_folder(tmp_path / "adapter", parts(), configuration(peft))(IDS)
    changes = rf.read_changes(tmp_path / "adapter", parts() if needs_model else None)
    is_same(with_changes(parts(), changes)(IDS), wanted)
    assert float((parts()(IDS) - wanted).detach().abs().max()) > 1e-4
    assert all(changes.rank(path) <= max(4, min(changes.shape(path))) for path in changes.paths)
    is_same(rf.load(parts(), tmp_path / "adapter")(IDS), wanted)
    if not changes.whole:
        again = changes.save(tmp_path / "plain")
        is_same(rf.load(parts(), again)(IDS), wanted)


def test_peft_folders_tell_kinds_windows_and_what_was_saved_whole(tmp_path: Path) -> None:
    import peft

    peft_folder(tmp_path / "a", parts(), PEFT["lora"][0](peft))
    changes = rf.read_changes(tmp_path / "a" / "adapter_model.safetensors")
    assert (changes.kinds["embed"], changes.kinds["conv"]) == ("embedding", "convolution")
    assert changes.windows == {"conv": (3, 3), "line": (3,)}
    assert changes.shape("embed") == (9, 8)
    peft_folder(tmp_path / "b", parts(), PEFT["saved modules"][0](peft))
    assert sorted(rf.read_changes(tmp_path / "b").whole) == ["head.bias", "head.weight"]


@pytest.mark.parametrize(("kind", "sentence"), [("dora", "pass model="), ("vera", "does not tell how wide")])
def test_a_peft_folder_that_means_nothing_alone_says_so(kind: str, sentence: str, tmp_path: Path) -> None:
    import peft

    peft_folder(tmp_path / "adapter", parts(), PEFT[kind][0](peft))
    with pytest.raises(Incompatible, match=sentence):
        rf.read_changes(tmp_path / "adapter")


def test_weights_that_adalora_left_without_rank_do_not_change(tmp_path: Path) -> None:
    import peft

    peft_folder(tmp_path, parts(), PEFT["adalora"][0](peft))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for side, cut in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        key = f"base_model.model.first.{side}"
        tensors[key] = tensors[key].narrow(cut, 0, 0)
    written(file, tensors)
    changes = rf.read_changes(tmp_path)
    assert float(changes.dense("first").abs().max()) == 0
    assert float(changes.dense("second").abs().max()) > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "OFT"}, "adapter of type 'OFT'"),
        ({"bias": "all"}, "uses bias='all', which would be lost"),
        ({"something_new": 3}, "uses something_new=3, which would be lost"),
        ({"alpha": "much"}, "has alpha='much', which is no number"),
        ({"alpha_pattern": {"(": 1}}, "no regular expression"),
        ({"r": 0}, "the impossible rank 0"),
    ],
)
def test_peft_configurations_that_mean_something_else_are_refused(
    change: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    import peft

    peft_folder(tmp_path, parts(), PEFT["loha"][0](peft))
    file = tmp_path / "adapter_config.json"
    write_json(file, json.loads(file.read_text()) | change)
    with pytest.raises((Incompatible, FormatError), match=sentence):
        rf.read_changes(tmp_path)


# GGUF -------------------------------------------------------------------------------------------------


def gguf_file(file: Path, tensors: dict[str, Any], alpha: float | None = 8.0, kind: str = "lora") -> Path:
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, kind)
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (values, quantisation) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("alpha", [8.0, 0.0])
def test_a_gguf_lora_is_read_under_llama_cpps_names(alpha: float, tmp_path: Path) -> None:
    import gguf

    up, down = normal(6, 4), normal(4, 32, seed=1)
    embedding = normal(11, 4, seed=2), normal(5, 4, seed=3)  # (vocabulary, r) and (dimension, r)
    packed = gguf.quantize(down.numpy(), gguf.GGMLQuantizationType.Q8_0)
    tensors = {
        "blk.0.attn_q.weight.lora_a": (packed, gguf.GGMLQuantizationType.Q8_0),
        "blk.0.attn_q.weight.lora_b": (up.half().numpy(), None),
        "token_embd.weight.lora_a": (embedding[0].numpy(), None),
        "token_embd.weight.lora_b": (embedding[1].numpy(), None),
    }
    changes = rf.read_changes(gguf_file(tmp_path / "a.gguf", tensors, alpha))
    assert changes.source == "GGUF"
    assert changes.kinds == {"blk.0.attn_q": "linear", "token_embd": "embedding"}
    scale = alpha / 4 or 1.0
    unpacked = torch.from_numpy(gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
    is_same(changes.dense("blk.0.attn_q"), scale * up.half().float() @ unpacked)
    is_same(changes.dense("token_embd"), scale * embedding[0] @ embedding[1].T)
    with pytest.raises(Incompatible, match=r"blk\.0\.attn_q is a GGUF name, which only its model can undo"):
        changes.save(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_a_bare_file_of_peft_loses_the_prefix_of_its_names(tmp_path: Path) -> None:
    name = "base_model.model.body.last"
    file = written(tmp_path / "a.safetensors", lora(name, PAIR, *DIFFUSERS))
    assert rf.read_changes(file).paths == ("body.last",)


def test_a_gguf_lora_is_loaded_into_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    import transformers as hf

    from rankfold.formats import gguf

    config = hf.LlamaConfig(
        vocab_size=20, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    layer = "model.layers.0"
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "mlp.down_proj": (32, 24)}
    pairs = {
        f"{layer}.{name}": (normal(out, 2, seed=out), normal(2, columns, seed=columns))
        for name, (out, columns) in shapes.items()
    }
    gguf.write(tmp_path / "adapter.gguf", model, pairs)
    changes = rf.read_changes(tmp_path, model)
    assert set(changes.paths) == set(pairs)
    for path, (up, down) in pairs.items():
        is_same(changes.dense(path), up @ down)
    alone = rf.read_changes(tmp_path)
    assert set(alone.paths) == {"blk.0.attn_q", "blk.0.attn_k", "blk.0.ffn_down"}
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        wanted = with_changes(copy.deepcopy(model), changes)(ids).logits
        is_same(rf.load(model, tmp_path)(ids).logits, wanted)


# What is not known ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "error", "sentence"),
    [
        ({"model.layers.0.weight": normal(2, 2)}, FormatError, "holds model.layers.0.weight, which is"),
        ({"a": normal(2, 2)}, FormatError, "holds a, which is of no form"),
        ({"a.oft_blocks": normal(2, 2, 2)}, Incompatible, "a.oft_blocks belongs to OFT"),
        ({"a.diff_b": normal(2)}, Incompatible, "a change of a bias"),
        ({"a.lora_up.weight": normal(2, 2)}, FormatError, "a has up and lacks the rest"),
        ({"a.alpha": torch.tensor(1.0)}, FormatError, "a has alpha and lacks the rest"),
        (lora("a", PAIR, *KOHYA, diff=PAIR[0]), FormatError, "has diff beside tensors of another form"),
        (lora("a", (PAIR[0], SMALL[1]), *KOHYA), FormatError, "a has factors .* which do not multiply"),
        (lora("a", (PAIR[0].long(), PAIR[1]), *KOHYA), FormatError, "a holds numbers of type torch.int64"),
        (lora("a", PAIR, *KOHYA, alpha=normal(2)), FormatError, "an alpha that is no number"),
        (lora("a", PAIR, *KOHYA, alpha=torch.tensor(math.inf)), FormatError, "a.alpha holds NaN or infinite"),
        (lora("a", (PAIR[0] / 0, PAIR[1]), *KOHYA), FormatError, "a.lora_up.weight holds NaN or infinite"),
        (lora("a", PAIR, *KOHYA) | lora("a", PAIR, *DIFFUSERS), FormatError, "a has two tensors for its"),
        ({"a.diff": normal(3)}, FormatError, "is no matrix"),
        (
            {"a.lokr_w1": normal(1, 3000), "a.lokr_w2": torch.zeros(3000, 1000)},
            FormatError, "entries, which no layer has",
        ),
    ],
)  # fmt: skip
def test_files_of_no_known_form_are_refused_in_one_sentence(
    tensors: dict[str, Tensor], error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", tensors)
    with pytest.raises(error, match=sentence) as caught:
        rf.read_changes(file)
    assert "\n" not in str(caught.value)


def test_a_pickled_file_is_not_opened(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    file = tmp_path / "pytorch_lora_weights.bin"
    torch.save({"a.lora_up.weight": Evil()}, file)
    with pytest.raises(FormatError, match="a pickled one could run code and is not read"):
        rf.read_changes(file)
    with pytest.raises(FormatError, match="a pickled one could run code and is not read"):
        rf.load(blocks(), file)
    with pytest.raises(MissingPath, match="nor a file of changes"):
        rf.read_changes(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_what_is_not_there_or_not_clear_is_named(tmp_path: Path) -> None:
    written(tmp_path / "adapter_model.safetensors", lora("x", PAIR, *KOHYA))
    with pytest.raises(MissingPath, match=r"there is no file .*adapter_config.json"):
        rf.read_changes(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingPath, match="there is no file or folder"):
        rf.read_changes(tmp_path / "absent")
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", lora("x", PAIR, *KOHYA))
    with pytest.raises(FormatError, match=r"holds a.safetensors and b.safetensors; name one of them"):
        rf.read_changes(tmp_path)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lora_unet_absent", "lora_unet_absent matches no layer of the model"),
        ("unet.absent", "unet.absent matches no layer of the model"),
        ("unet.to_out.0", "unet.to_out.0 is 6x8 here and 8x6 in the adapter's base"),
    ],
)
def test_the_first_name_that_does_not_fit_the_model_is_named(
    name: str, sentence: str, tmp_path: Path
) -> None:
    model = Pipeline()
    before = {key: id(module) for key, module in model.named_modules()}
    file = written(tmp_path / "a.safetensors", lora(name, PAIR, *KOHYA))
    for read in (lambda: rf.read_changes(file, model), lambda: rf.load(model, file)):
        with pytest.raises(BaseMismatch, match=sentence):
            read()
    assert {key: id(module) for key, module in model.named_modules()} == before


def test_a_flattened_name_of_two_layers_is_refused(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(6, 8), "a": nn.ModuleDict({"b": nn.Linear(6, 8)})})
    file = written(tmp_path / "a.safetensors", lora("lora_unet_a_b", PAIR, *KOHYA))
    with pytest.raises(Incompatible, match=r"lora_unet_a_b may mean a_b or a\.b"):
        rf.read_changes(file, model)
    both = lora("lora_unet_to_q", PAIR, *KOHYA) | lora("unet.to_q", PAIR, *DIFFUSERS)
    with pytest.raises(FormatError, match=r"mean the same layer, unet.to_q"):
        rf.read_changes(written(tmp_path / "b.safetensors", both), Pipeline())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"alpha": None}, "no adapter.lora.alpha"),
        ({"kind": "other"}, "something else than a LoRA"),
        ({"alpha": math.nan}, "no adapter.lora.alpha"),
    ],
)
def test_gguf_files_of_something_else_are_refused(
    arguments: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    tensors = {f"blk.0.attn_q.weight.lora_{side}": (normal(4, 4).numpy(), None) for side in "ab"}
    with pytest.raises(FormatError, match=sentence):
        rf.read_changes(gguf_file(tmp_path / "a.gguf", tensors, **arguments))
    with pytest.raises(FormatError, match=r"lacks a factor of blk.0.attn_q"):
        rf.read_changes(gguf_file(tmp_path / "b.gguf", dict(list(tensors.items())[:1])))
    with pytest.raises(FormatError, match=r"holds blk.0.norm.weight"):
        rf.read_changes(gguf_file(tmp_path / "c.gguf", {"blk.0.norm.weight": (normal(4).numpy(), None)}))
