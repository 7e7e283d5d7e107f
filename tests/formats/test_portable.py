"""The portable form and its rule, one test for every row of what servers read differently."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from formats.small import adapted, agree, edit_config, in_peft, sharp
from layers.models import logits, perturb
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible
from rankfold.formats import peft as form
from rankfold.formats.files import read_json
from rankfold.formats.portable import check

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("portable") / "good"
    rf.export(adapted("llama", rank=3, alpha=5), folder, "portable")
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "adapter"))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(folder / form.TENSORS)
    change(tensors)
    save_file(tensors, folder / form.TENSORS)
    return folder


def complains(folder: Path, *sentences: str) -> None:
    """Assert that the rule says these things and nothing else."""
    said = check(folder)
    assert len(said) == len(sentences), said
    for sentence in sentences:
        assert any(sentence in each for each in said), said


def test_an_exported_folder_passes(good: Path) -> None:
    assert check(good) == []


# The rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["IA3", "VERA", "LOHA", None])
def test_methods_other_than_lora(folder: Path, kind: str | None) -> None:
    complains(edit_config(folder, peft_type=kind), f"peft_type is {kind!r}")


def test_alpha_that_is_not_the_rank(folder: Path) -> None:
    complains(edit_config(folder, lora_alpha=16), "lora_alpha is 16 and r is 3: fold the scale into B")


def test_rank_patterns(folder: Path) -> None:
    complains(edit_config(folder, rank_pattern={"q_proj": 2}), "rank_pattern is {'q_proj': 2}")


def test_ranks_that_differ_from_weight_to_weight(folder: Path) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[f"{PREFIX}.lora_A.weight"] = tensors[f"{PREFIX}.lora_A.weight"][:2].contiguous()
        tensors[f"{PREFIX}.lora_B.weight"] = tensors[f"{PREFIX}.lora_B.weight"][:, :2].contiguous()

    complains(change_tensors(folder, shrink), "q_proj has rank 2 in A and 2 in B, not r = 3")


def test_alpha_patterns(folder: Path) -> None:
    complains(edit_config(folder, alpha_pattern={"q_proj": 2}), "alpha_pattern is {'q_proj': 2}")


def test_rank_stabilised_scaling(folder: Path) -> None:
    complains(edit_config(folder, use_rslora=True), "use_rslora is True")


@pytest.mark.parametrize("alpha", [None, "3", True, float("1e308") * 10, 10**400])
def test_no_alpha_known(folder: Path, alpha: Any) -> None:
    edit_config(folder, lora_alpha=alpha)
    file = folder / form.CONFIG
    file.write_text(file.read_text().replace("Infinity", "1e999"))
    complains(folder, "lora_alpha is missing: servers refuse the adapter or assume a scale")


def test_dora_by_flag_and_by_tensor(folder: Path) -> None:
    complains(edit_config(folder, use_dora=True), "use_dora is True")
    edit_config(folder, use_dora=False)
    change_tensors(folder, lambda t: t.update({f"{PREFIX}.lora_magnitude_vector": torch.ones(16)}))
    complains(folder, "lora_magnitude_vector is no A or B of a linear layer")


def test_modules_trained_whole(folder: Path) -> None:
    edit_config(folder, modules_to_save=["lm_head"])
    change_tensors(folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(40, 16)}))
    complains(folder, "modules_to_save is ['lm_head']", "lm_head.weight is no A or B")


def test_biases(folder: Path) -> None:
    complains(edit_config(folder, bias="all"), "bias is 'all'")
    complains(edit_config(folder, bias="none", lora_bias=True), "lora_bias is True")
    edit_config(folder, lora_bias=False)
    change_tensors(folder, lambda t: t.update({f"{PREFIX}.lora_B.bias": torch.ones(16)}))
    complains(folder, "lora_B.bias is no A or B")


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica"])
def test_starts_that_move_the_base(folder: Path, start: str) -> None:
    complains(edit_config(folder, init_lora_weights=start), f"init_lora_weights is {start!r}")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 1], [0, 1]]),
        ("use_qalora", True),
        ("use_bdlora", {"x": 1}),
        ("arrow_config", {}),
        ("kasa_config", {}),
        ("velora_config", {}),
        ("monteclora_config", {}),
        ("megatron_config", {}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("ensure_weight_tying", True),
    ],
)
def test_features_that_servers_ignore_or_refuse(folder: Path, field: str, value: Any) -> None:
    complains(edit_config(folder, **{field: value}), f"{field} is {value!r}")


def test_token_deltas(folder: Path) -> None:
    edit_config(folder, trainable_token_indices=[1])
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    change_tensors(folder, lambda t: t.update({name: torch.ones(1, 16)}))
    complains(folder, "trainable_token_indices is [1]", "trainable_tokens_delta is no A or B")


def test_lora_of_embeddings(folder: Path) -> None:
    edit_config(folder, target_modules=[*read_json(folder / form.CONFIG)["target_modules"], "embed_tokens"])
    path = "base_model.model.model.embed_tokens"
    change_tensors(folder, lambda t: t.update({f"{path}.lora_embedding_A": torch.ones(3, 40)}))
    complains(folder, "lora_embedding_A is no A or B of a linear layer")


def test_copies_of_base_weights_and_nested_layers(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({f"{PREFIX}.base_layer.weight": torch.ones(16, 16)}))
    change_tensors(folder, lambda t: t.update({f"{PREFIX}.base_layer.lora_A.weight": torch.ones(3, 16)}))
    complains(folder, "base_layer.weight is no A or B", "base_layer.lora_A.weight is no A or B")


@pytest.mark.parametrize("targets", [r".*q_proj", "all-linear", None, [], [1]])
def test_targets_that_are_no_list_of_names(folder: Path, targets: Any) -> None:
    edit_config(folder, target_modules=targets)
    assert "servers want a list of names, not a pattern" in check(folder)[0]


def test_targets_that_are_dotted_or_lack_a_weight(folder: Path) -> None:
    names = read_json(folder / form.CONFIG)["target_modules"]
    edit_config(folder, target_modules=[*names, "self_attn.q_proj"])
    complains(folder, "dotted paths; servers compare last names")
    edit_config(folder, target_modules=[name for name in names if name != "q_proj"])
    complains(folder, "layers.0.self_attn.q_proj is not among", "layers.1.self_attn.q_proj is not among")


def test_convolutions(folder: Path) -> None:
    edit_config(folder, target_modules=[*read_json(folder / form.CONFIG)["target_modules"], "conv"])
    change_tensors(
        folder, lambda t: t.update({"base_model.model.conv.lora_A.weight": torch.ones(3, 4, 3, 3)})
    )
    complains(folder, "conv.lora_A.weight has shape (3, 4, 3, 3); servers read linear layers only")


def test_added_tokens(folder: Path) -> None:
    (folder / "added_tokens.json").write_text('{"<new>": 40}')
    complains(folder, "added_tokens.json is beside the adapter")


@pytest.mark.parametrize("rank", [0, -1, 513, 2.5, "3", None, True])
def test_ranks_above_the_limits_or_impossible(folder: Path, rank: Any) -> None:
    edit_config(folder, r=rank, lora_alpha=rank)
    assert f"r is {rank!r}; servers take 1 to 512" in check(folder)


def test_half_a_pair(folder: Path) -> None:
    complains(change_tensors(folder, lambda t: t.pop(f"{PREFIX}.lora_B.weight")), "lacks lora_B")


def test_a_name_without_the_prefix(folder: Path) -> None:
    change_tensors(folder, lambda t: t.update({"transformer.q_proj.lora_A.weight": torch.ones(3, 16)}))
    complains(folder, "transformer.q_proj.lora_A.weight is no A or B")


def test_numbers_that_are_not_finite(folder: Path) -> None:
    change_tensors(folder, lambda t: t[f"{PREFIX}.lora_A.weight"].fill_(float("nan")))
    complains(folder, "holds numbers that are not finite")


def test_files_that_are_missing_truncated_or_pickled(folder: Path) -> None:
    data = (folder / form.TENSORS).read_bytes()
    (folder / form.TENSORS).write_bytes(data[:100])
    complains(folder, "is truncated or no safetensors file")
    (folder / form.TENSORS).rename(folder / "adapter_model.bin")
    complains(folder, "adapter_model.bin is pickled, could run code and is not read")
    (folder / form.CONFIG).write_text("{")
    complains(folder, "is not valid JSON")
    complains(folder / "nowhere", "there is no file")


def test_an_empty_adapter(folder: Path) -> None:
    complains(change_tensors(folder, dict.clear), "there is no adapted layer")


def test_adapters_as_peft_writes_them_are_told_apart(tmp_path: Path) -> None:
    for name, passes, config in (
        ("plain", True, peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])),
        ("scaled", False, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])),
        ("stabilised", False, peft.LoraConfig(r=4, lora_alpha=4, use_rslora=True, target_modules=["q_proj"])),
        ("dora", False, peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["q_proj"])),
    ):
        peft.get_peft_model(sharp("llama"), config).save_pretrained(tmp_path / name)
        assert (check(tmp_path / name) == []) is passes, name


# Exports ----------------------------------------------------------------------------------------------

METHODS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("lora", {"rank": 3, "alpha": 5}, {}),
    ("lora", {"rank": 3, "alpha": 5, "rank_stabilised": True}, {}),
    ("lora", {"rank": 12, "targets": "all-linear"}, {}),
    ("lora/pissa", {"rank": 3}, {}),
    ("lora/olora", {"rank": 3}, {}),
    ("vera", {"rank": 6}, {}),
    ("lora-xs", {"rank": 3}, {}),
    ("svfit", {"rank": 3}, {}),
    ("uni-lora", {"rank": 3}, {}),
    ("flora-tucker", {"rank": 3}, {}),
    ("gralora", {"rank": 4}, {}),
    ("hra", {"rank": 4}, {}),
    ("abba", {"rank": 2}, {}),
    ("dora", {"rank": 3}, {"rank": 16}),
    ("hira", {"rank": 3}, {"rank": 16}),
    ("diablo", {"blocks": 4}, {"rank": 16}),
]


@pytest.mark.parametrize(("method", "options", "cut"), METHODS, ids=str)
def test_every_portable_export_passes_the_rule_and_reads_as_the_model(
    method: str, options: dict[str, Any], cut: dict[str, Any], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted("llama", method, **options)
    rf.export(model, tmp_path / "out", "portable", **cut)
    assert check(tmp_path / "out") == []
    wanted = logits(model, "llama")
    agree(logits(in_peft(tmp_path / "out", sharp("llama")), "llama"), wanted)
    agree(logits(rf.load(sharp("llama"), tmp_path / "out"), "llama"), wanted)
    config, tensors = read_json(tmp_path / "out" / form.CONFIG), load_file(tmp_path / "out" / form.TENSORS)
    assert config["r"] == config["lora_alpha"]
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {config["r"]}


def test_the_two_factors_alone_say_the_change(good: Path) -> None:
    model, tensors = adapted("llama", rank=3, alpha=5), load_file(good / form.TENSORS)
    layer = model.model.layers[0].self_attn.q_proj
    change = layer.expression.dense() - layer.weight
    product = tensors[f"{PREFIX}.lora_B.weight"] @ tensors[f"{PREFIX}.lora_A.weight"]
    torch.testing.assert_close(product, change, rtol=1e-4, atol=1e-6)


def test_what_the_portable_form_cannot_hold_is_refused(tmp_path: Path) -> None:
    embedding = adapted("llama", rank=3, targets=["embed_tokens"])
    with pytest.raises(Incompatible, match=r"model\.embed_tokens: servers read LoRA of linear layers only"):
        rf.export(embedding, tmp_path / "out", "portable")
    with pytest.raises(Incompatible, match="fan_in_fan_out unset, which transformers' Conv1D layers need"):
        rf.export(adapted("gpt2", rank=3), tmp_path / "out", "portable")
    convolution = rf.adapt(nn.Sequential(nn.Conv2d(3, 4, 2)), "lora", rank=2, targets="0")
    with pytest.raises(Incompatible, match="servers read LoRA of linear layers only"):
        rf.export(convolution, tmp_path / "out", "portable")
    assert list(tmp_path.iterdir()) == []


def test_modules_trained_whole_are_dropped_only_when_asked_and_reported(tmp_path: Path) -> None:
    model = adapted("bert", rank=3)
    with pytest.raises(Incompatible, match=r"classifier\.bias, which was trained whole; pass drop_whole"):
        rf.export(model, tmp_path / "out", "portable")
    report = rf.export(model, tmp_path / "out", "portable", drop_whole=True)
    assert report.dropped == ["classifier.bias", "classifier.weight"]
    assert "left out: classifier.bias, classifier.weight" in str(report)
    assert check(tmp_path / "out") == []


def test_a_rank_above_what_servers_take_is_refused_or_cut(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = rf.adapt(nn.Sequential(nn.Linear(600, 600)), "lora", rank=520)
    perturb(model)
    with pytest.raises(Incompatible, match="rank 520 is above 512"):
        rf.export(model, tmp_path / "out", "portable")
    rf.export(model, tmp_path / "out", "portable", rank=512)
    assert check(tmp_path / "out") == []
