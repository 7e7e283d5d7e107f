"""Adapters go to peft and come from peft: the logits agree in both directions."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from formats.small import MOVED, Untouched, adapted, agree, edit_config, in_peft, sharp
from layers import models
from layers.models import logits, made, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import BaseMismatch, Incompatible, NotDense, RankfoldError
from rankfold.formats import peft as form
from rankfold.formats.files import read_json
from rankfold.layers import require


def both_agree(name: str, model: nn.Module, folder: Path, **options: Any) -> rf.Report:
    """Assert that peft and Rankfold read an export as the model is."""
    wanted = logits(model, name).detach()
    assert float((wanted - logits(sharp(name), name)).abs().max()) > MOVED
    report = rf.export(model, folder, **options)
    agree(logits(in_peft(folder, sharp(name)), name), wanted)
    agree(logits(rf.load(sharp(name), folder), name), wanted)
    assert torch.equal(logits(model, name), wanted)
    return report


# To peft ----------------------------------------------------------------------------------------------

EXACT: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"rank": 3}),
    ("lora", {"rank": 3, "alpha": 5}),
    ("lora", {"rank": 3, "alpha": 5, "rank_stabilised": True}),
    ("lora", {"rank": 3, "dropout": 0.3}),
    ("lora", {"rank": 16, "targets": "q_proj"}),
    ("lora", {"rank": 12, "targets": ["q_proj", "k_proj", "down_proj"], "alpha": 3}),
    ("dora", {"rank": 3, "alpha": 5}),
    ("dora", {"rank": 3, "dropout": 0.3}),
    ("dora/pissa", {"rank": 3}),
    ("vera", {"rank": 5}),
    ("vera", {"rank": 40}),
    ("lora/pissa", {"rank": 3, "alpha": 5}),
    ("lora/olora", {"rank": 3}),
    ("lora-xs", {"rank": 3}),
    ("svfit", {"rank": 3}),
    ("uni-lora", {"rank": 3}),
    ("uni-lora", {"rank": 20, "targets": "q_proj"}),
    ("flora-tucker", {"rank": 3}),
    ("gralora", {"rank": 4}),
    ("gralora", {"rank": 4, "hybrid_rank": 2}),
    ("hra", {"rank": 4}),
    ("abba", {"rank": 2}),
]


@pytest.mark.parametrize(("method", "options"), EXACT, ids=str)
def test_peft_loads_an_exact_change_with_the_same_logits(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    capped = {"rank": 8} if options["rank"] in (12,) else {}
    report = both_agree("llama", adapted("llama", method, **{**options, **capped}), tmp_path / "out")
    assert report.exact
    assert report.largest_error == 0


@pytest.mark.parametrize(("method", "options"), [*EXACT[:10:2], ("hra", {"rank": 4})], ids=str)
def test_peft_loads_weights_that_are_stored_transposed(
    method: str, options: dict[str, Any], tmp_path: Path
) -> None:
    options = {key: value for key, value in options.items() if key != "targets"}
    both_agree("gpt2", adapted("gpt2", method, **{**options, "rank": 4}), tmp_path / "out")
    assert read_json(tmp_path / "out" / form.CONFIG)["fan_in_fan_out"] is True


def test_plain_and_transposed_layers_go_into_one_adapter(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return models.gpt2(tie_word_embeddings=False, initializer_range=0.3).eval()

    for method in ("lora", "dora"):
        model = rf.adapt(base(), method, rank=3, targets=["c_attn", "lm_head"])
        perturb(model, 0.2)
        rf.export(model, tmp_path / method)
        agree(logits(in_peft(tmp_path / method, base()), "gpt2"), logits(model, "gpt2"))


def test_a_residual_start_becomes_rank_2r_against_the_original_base(tmp_path: Path) -> None:
    report = both_agree("llama", adapted("llama", "lora/pissa", rank=3), tmp_path / "out")
    assert {row["rank"] for row in report.rows} == {6}
    assert read_json(tmp_path / "out" / form.CONFIG)["init_lora_weights"] is True


def test_alpha_is_kept_for_plain_lora(tmp_path: Path) -> None:
    model = adapted("llama", rank=3, alpha=5)
    rf.export(model, tmp_path / "out")
    config, tensors = read_json(tmp_path / "out" / form.CONFIG), load_file(tmp_path / "out" / form.TENSORS)
    assert (config["r"], config["lora_alpha"]) == (3, 5)
    path = "model.layers.0.self_attn.q_proj"
    up = require(model).expressions("default")[path].leaf("up").tensor()
    assert torch.equal(tensors[f"base_model.model.{path}.lora_B.weight"], up)


def test_ranks_that_were_capped_become_patterns(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rank capped"):
        model = rf.adapt(sharp("llama"), "lora", rank=12, alpha=5, targets="all-linear")
    perturb(model, 0.2)
    both_agree("llama", model, tmp_path / "out")
    config = read_json(tmp_path / "out" / form.CONFIG)
    assert config["r"] == 12
    assert set(config["rank_pattern"].values()) == {8}
    assert all(key.startswith("^") for key in config["rank_pattern"])


def test_the_head_that_was_trained_whole_goes_with_it(tmp_path: Path) -> None:
    model = adapted("bert", "dora", rank=3)
    both_agree("bert", model, tmp_path / "out")
    config = read_json(tmp_path / "out" / form.CONFIG)
    assert config["modules_to_save"] == ["classifier"]
    assert config["task_type"] == "SEQ_CLS"


def test_modules_trained_whole_deep_inside_go_with_it(tmp_path: Path) -> None:
    both_agree(
        "llama",
        adapted("llama", rank=3, train=["model.layers.1.input_layernorm", "lm_head"]),
        tmp_path / "out",
    )


def test_a_path_that_is_the_end_of_another_is_adapted_alone(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.proj, self.inner = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["proj"](self.proj(x))  # type: ignore[no-any-return]

    model = rf.adapt(Twice(), "lora", rank=2, targets="re:proj")
    perturb(model)
    rf.export(model, tmp_path / "out")
    loaded = in_peft(tmp_path / "out", Twice())
    x = torch.randn(3, 6)
    agree(loaded(x), model(x))
    assert not hasattr(loaded.base_model.model.inner["proj"], "lora_A")


def embeddings() -> nn.Module:
    torch.manual_seed(0)
    return models.llama(initializer_range=0.3).eval()


@pytest.mark.parametrize("method", ["lora", "dora", "lora/pissa"])
def test_embeddings_go_to_peft(method: str, tmp_path: Path) -> None:
    model = rf.adapt(embeddings(), method, rank=3, alpha=5, targets=["embed_tokens", "q_proj"])
    perturb(model)
    rf.export(model, tmp_path / "out")
    agree(logits(in_peft(tmp_path / "out", embeddings()), "llama"), logits(model, "llama"))
    agree(logits(rf.load(embeddings(), tmp_path / "out"), "llama"), logits(model, "llama"))


class Convolutions(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Conv2d(3, 6, (3, 2), 2, 1)
        self.mix = nn.Conv2d(6, 6, 1, groups=groups, bias=False)
        self.line = nn.Conv1d(6, 4, 3)
        self.space = nn.Conv3d(1, 2, (2, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(self.mix(self.flat(x)).flatten(2))
        return self.space(y[:, None, :, :, None].repeat(1, 1, 1, 1, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["lora", "dora", "flora-tucker", "lora/pissa", "hra"])
def test_convolutions_go_to_peft_and_back(method: str, tmp_path: Path) -> None:
    model = rf.adapt(Convolutions(), method, rank=2, targets="convolutions")
    perturb(model, 0.3)
    x = torch.randn(2, 3, 8, 7)
    rf.export(model, tmp_path / "out")
    agree(in_peft(tmp_path / "out", Convolutions())(x), model(x))
    agree(rf.load(Convolutions(), tmp_path / "out")(x), model(x))


def test_a_grouped_convolution_is_another_map_in_peft_and_refused(tmp_path: Path) -> None:
    model = rf.adapt(Convolutions(groups=2), "lora", rank=2, targets="mix")
    with pytest.raises(Incompatible, match="mix: peft's LoRA of a grouped convolution is another map"):
        rf.export(model, tmp_path / "out")
    theirs = peft.get_peft_model(Convolutions(groups=2), peft.LoraConfig(target_modules=["mix"], r=2))
    theirs.save_pretrained(tmp_path / "theirs")
    base = Untouched(Convolutions(groups=2))
    with pytest.raises(RankfoldError, match="mix"):
        rf.load(base.model, tmp_path / "theirs")
    base.check()


def test_what_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    for method, sentence in (("reft", "acts on activations"), ("alora", "differs from token to token")):
        options = {"invocation": (1,)} if method == "alora" else {}
        with pytest.raises(NotDense, match=sentence):
            rf.export(adapted("llama", method, **options), tmp_path / "out")
    attention = rf.adapt(nn.Sequential(nn.MultiheadAttention(8, 2)), "lora", rank=2)
    with pytest.raises(Incompatible, match=r"no agreed names for projections of nn.MultiheadAttention"):
        rf.export(attention, tmp_path / "out")
    tied = rf.adapt(made("gpt2"), "lora", rank=2, targets="wte")
    with pytest.raises(Incompatible, match="lm_head shares its tensor with an adapted weight"):
        rf.export(tied, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_only_the_named_adapter_is_exported_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = adapted("llama", "lora", rank=3, name="one")
    first = logits(model, "llama")
    rf.adapt(model, "dora", rank=3, name="two")
    perturb(model, 0.2)
    second = logits(model, "llama")
    rf.use(model, ["one", "two"])
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    together = logits(model, "llama")
    for name, wanted in (("one", first), ("two", second)):
        rf.export(model, tmp_path / name, name=name)
        agree(logits(in_peft(tmp_path / name, sharp("llama")), "llama"), wanted)
        rf.export(model, tmp_path / f"{name}-dense", "dense", name=name)
    assert require(model).active == ("one", "two")
    assert torch.equal(logits(model, "llama"), together)
    assert not frozen.requires_grad


def test_an_adapter_in_training_is_exported_as_it_evaluates(tmp_path: Path) -> None:
    for method in ("lora", "dora"):
        model = adapted("llama", method, rank=3, dropout=0.5)
        rf.export(model, tmp_path / f"{method}-evaluating")
        rf.export(model.train(), tmp_path / f"{method}-training")
        assert model.training
        first, second = (
            load_file(tmp_path / f"{method}-{m}" / form.TENSORS) for m in ("evaluating", "training")
        )
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_half_precision_adapters_are_exported(tmp_path: Path) -> None:
    for method in ("lora/pissa", "dora", "hra"):
        model = adapted("llama", method, rank=4).to(torch.bfloat16)
        rf.export(model, tmp_path / method)
        wanted = logits(model, "llama").float()
        got = logits(in_peft(tmp_path / method, sharp("llama").to(torch.bfloat16)), "llama").float()
        torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
        rf.export(model, tmp_path / f"{method}-small", rank=1)


def test_peft_files_are_byte_stable(tmp_path: Path) -> None:
    for place in ("one", "two"):
        rf.export(adapted("llama", "dora", rank=3), tmp_path / place)
    for name in (form.CONFIG, form.TENSORS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


# From peft --------------------------------------------------------------------------------------------


def theirs(base: nn.Module, config: Any, seed: int = 3) -> nn.Module:
    """Return a model adapted by peft, moved away from its start."""
    model = peft.get_peft_model(base, config)
    perturb(model, 0.2, seed)
    return model.eval()


THEIRS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"),
    "names": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    "a regular expression": lambda: peft.LoraConfig(r=3, target_modules=r".*layers\.1\..*_proj"),
    "some layers": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1]),
    "rank-stabilised": lambda: peft.LoraConfig(
        r=4, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj"]
    ),
    "patterns": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "o_proj"],
        rank_pattern={"q_proj": 2, "^model.layers.0.self_attn.v_proj": 5},
        alpha_pattern={"layers.1.self_attn.q_proj": 7, ".*o_proj": 11},
    ),
    "patterns and rank-stabilised": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7},
    ),
    "alpha zero": lambda: peft.LoraConfig(
        r=3, lora_alpha=0, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 7}
    ),
    "a rank above the weight's": lambda: peft.LoraConfig(r=30, target_modules=["q_proj", "k_proj"]),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules="all-linear"),
    "dora with patterns": lambda: peft.LoraConfig(
        r=3, use_dora=True, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 7},
    ),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "o_proj", "up_proj", "down_proj"]),
    "modules trained whole": lambda: peft.LoraConfig(
        r=3, target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm"]
    ),
    "a drawn start": lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="gaussian"),
    "an orthogonal start": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"
    ),
    "embeddings": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=["embed_tokens", "q_proj"]),
    "dora of embeddings": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, use_dora=True, target_modules=["embed_tokens", "q_proj"]
    ),
    "the output head": lambda: peft.LoraConfig(r=3, target_modules=["lm_head", "q_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("case", THEIRS)
def test_an_adapter_of_peft_loads_with_the_same_logits_and_goes_back(case: str, tmp_path: Path) -> None:
    model = theirs(sharp("llama"), THEIRS[case]())
    wanted = logits(model, "llama").detach()
    assert float((wanted - logits(sharp("llama"), "llama")).abs().max()) > MOVED
    model.save_pretrained(tmp_path / "theirs")
    ours = rf.load(sharp("llama"), tmp_path / "theirs")
    agree(logits(ours, "llama"), wanted)
    rf.export(ours, tmp_path / "ours")
    agree(logits(in_peft(tmp_path / "ours", sharp("llama")), "llama"), wanted)
    agree(logits(rf.load(sharp("llama"), tmp_path / "ours"), "llama"), wanted)
    rf.save(ours, tmp_path / "native")
    assert torch.equal(logits(rf.load(sharp("llama"), tmp_path / "native"), "llama"), logits(ours, "llama"))


@pytest.mark.parametrize("kind", ["lora", "dora", "vera"])
def test_an_adapter_of_peft_for_transposed_weights_loads(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    config = (
        peft.VeraConfig(r=4, **options)
        if kind == "vera"
        else peft.LoraConfig(r=3, use_dora=kind == "dora", **options)
    )
    model = theirs(sharp("gpt2"), config)
    model.save_pretrained(tmp_path / "theirs")
    agree(logits(rf.load(sharp("gpt2"), tmp_path / "theirs"), "gpt2"), logits(model, "gpt2"))


def test_a_classifier_of_peft_loads_with_its_head(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, task_type="SEQ_CLS", target_modules=["query", "value"])
    model = theirs(sharp("bert"), config)
    model.save_pretrained(tmp_path / "theirs")
    ours = rf.load(sharp("bert"), tmp_path / "theirs")
    agree(logits(ours, "bert"), logits(model, "bert"))
    assert require(ours).adapter().record["train"] == ["classifier"]


@pytest.mark.parametrize("dora", [False, True])
def test_convolutions_of_peft_load(dora: bool, tmp_path: Path) -> None:
    targets = ["flat", "mix", "line", "space"]
    model = theirs(Convolutions(), peft.LoraConfig(r=2, target_modules=targets, use_dora=dora))
    model.save_pretrained(tmp_path / "theirs")
    x = torch.randn(2, 3, 8, 7)
    agree(rf.load(Convolutions(), tmp_path / "theirs")(x), model(x))


def test_a_converted_pissa_adapter_of_peft_loads_against_the_original_base(tmp_path: Path) -> None:
    base = sharp("llama")
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    perturb(model, 0.2)
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    agree(logits(rf.load(sharp("llama"), tmp_path / "out"), "llama"), logits(model.eval(), "llama"))


# What would be lost is refused ------------------------------------------------------------------------

LOSSY: dict[str, tuple[str, Callable[[], Any]]] = {
    "a bias beside B": ("lora_bias", lambda: peft.LoraConfig(target_modules=["q_proj"], lora_bias=True)),
    "all biases": ("bias", lambda: peft.LoraConfig(target_modules=["q_proj"], bias="all")),
    "invocation tokens": (
        "alora_invocation_tokens",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"], alora_invocation_tokens=[1], task_type="CAUSAL_LM"
        ),
    ),
    "token deltas": (
        "trainable_token_indices",
        lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    ),
    "replicated layers": (
        "layer_replication",
        lambda: peft.LoraConfig(target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]),
    ),
    "raw parameters": (
        "target_parameters",
        lambda: peft.LoraConfig(target_modules=[], target_parameters=["self_attn.q_proj.weight"]),
    ),
    "a pissa start": (
        "moves the base at every load",
        lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="pissa"),
    ),
    "an olora start": (
        "moves the base at every load",
        lambda: peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights="olora"),
    ),
    "another method": (
        "type 'IA3'", lambda: peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    ),
    "prompts": (
        "type 'PREFIX_TUNING'",
        lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOSSY)
def test_a_feature_that_would_be_lost_is_named(case: str, tmp_path: Path) -> None:
    sentence, config = LOSSY[case]
    peft.get_peft_model(sharp("llama"), config()).save_pretrained(tmp_path)
    base = Untouched(sharp("llama"))
    with pytest.raises(RankfoldError, match=sentence):
        rf.load(base.model, tmp_path)
    base.check()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], use_dora=True)
    theirs(sharp("llama"), config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def refused(folder: Path, error: type[Exception], sentence: str, name: str = "llama") -> None:
    base = Untouched(sharp(name))
    with pytest.raises(error, match=sentence):
        rf.load(base.model, folder)
    base.check()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"a_feature_of_tomorrow": {"x": 1}}, "a_feature_of_tomorrow"),
        ({"peft_type": None}, "of type None"),
        ({"peft_type": ["LORA"]}, "of type"),
        ({"use_dora": False}, "holds magnitude of"),
        ({"peft_type": "VERA"}, "shared pair|no part"),
        ({"lora_alpha": None}, "does not describe"),
        ({"lora_alpha": [1]}, "does not describe"),
        ({"lora_alpha": 10**400}, "does not describe"),
        ({"alpha_pattern": {"(": 2}}, "does not describe"),
        ({"alpha_pattern": [1]}, "does not describe"),
        ({"modules_to_save": 3}, "does not describe"),
    ],
    ids=str,
)
def test_a_changed_configuration_is_refused(folder: Path, change: dict[str, Any], sentence: str) -> None:
    refused(edit_config(folder, **change), RankfoldError, sentence)


def test_the_magnitude_of_dora_is_never_dropped(folder: Path) -> None:
    tensors = load_file(folder / form.TENSORS)
    short = {key: value for key, value in tensors.items() if "magnitude" not in key}
    save_file(short, folder / form.TENSORS)
    refused(folder, RankfoldError, "lacks magnitude of")
    key = next(key for key in tensors if "magnitude" in key)
    save_file({k: v for k, v in tensors.items() if k != key}, folder / form.TENSORS)
    refused(folder, RankfoldError, "lacks magnitude of")


@pytest.mark.parametrize("file", [form.CONFIG, form.TENSORS])
def test_a_truncated_or_missing_file_of_peft_is_refused(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[: len(data) // 2])
    refused(folder, RankfoldError, "not valid JSON|no safetensors file")
    (folder / file).unlink()
    refused(folder, RankfoldError, "there is no file|holds neither")


@pytest.mark.parametrize("spoil", ["drop", "add", "reshape", "flatten", "ranks"])
def test_tensors_that_do_not_belong_together_are_refused(folder: Path, spoil: str) -> None:
    tensors = load_file(folder / form.TENSORS)
    key = next(key for key in tensors if "lora_A" in key)
    if spoil == "drop":
        del tensors[key]
    elif spoil == "add":
        tensors["base_model.model.model.norm.weight"] = torch.ones(16)
    elif spoil == "reshape":
        tensors[key] = tensors[key].T.contiguous()
    elif spoil == "flatten":
        tensors[key] = torch.ones(())
    else:
        tensors[key] = tensors[key][:2].contiguous()
    save_file(tensors, folder / form.TENSORS)
    refused(folder, RankfoldError, "adapter")


def test_an_adapter_of_another_model_is_refused(folder: Path) -> None:
    refused(folder, BaseMismatch, "a model that has model.layers.0.self_attn.q_proj", "gpt2")
    tensors = load_file(folder / form.TENSORS)
    wider = {key: torch.cat([v, v], 1) if "lora_A" in key else v for key, v in tensors.items()}
    save_file(wider, folder / form.TENSORS)
    refused(folder, BaseMismatch, "is 16x16 here and 16x32 in the adapter's base")


def test_a_window_of_another_shape_is_refused(tmp_path: Path) -> None:
    theirs(Convolutions(), peft.LoraConfig(r=2, target_modules=["flat"])).save_pretrained(tmp_path)
    other = Convolutions()
    other.flat = nn.Conv2d(3, 6, (2, 3), 2, 1)
    base = Untouched(other)
    with pytest.raises(BaseMismatch, match="flat is adapted as convolution in the file"):
        rf.load(other, tmp_path)
    base.check()


def test_embeddings_whose_rows_were_trained_or_resized_are_refused(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens"])
    theirs(sharp("llama"), config).save_pretrained(tmp_path, save_embedding_layers=True)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    tensors = load_file(tmp_path / form.TENSORS)
    rf.load(sharp("llama"), tmp_path)
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / form.TENSORS)
    refused(tmp_path, BaseMismatch, "holds a copy of model.embed_tokens with other numbers")


def test_dora_of_an_embedding_scales_its_columns_in_both(tmp_path: Path) -> None:
    model = adapted("llama", "dora", rank=3, targets="embeddings")
    perturb(model, 0.5, seed=11)
    both_agree("llama", model, tmp_path)


def test_an_attention_module_adapted_by_peft_is_refused(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.MultiheadAttention(8, 2))

    peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path)
    untouched = Untouched(base())
    with pytest.raises(RankfoldError):
        rf.load(untouched.model, tmp_path)
    untouched.check()


def test_a_copy_of_an_adapted_model_exports_its_own_weights(tmp_path: Path) -> None:
    model = adapted("llama", "vera", rank=4)
    copied = copy.deepcopy(model)
    perturb(copied, 0.5, seed=11)
    both_agree("llama", copied, tmp_path / "copy")
    both_agree("llama", model, tmp_path / "original")
