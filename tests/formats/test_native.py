"""The native form: what is saved is what is loaded, and only what is needed is saved."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from battery import Point, adapted_blocks, points, trainable
from formats.small import POINTS, contents, output, saved
from hosts import blocks
from safetensors.torch import load_file
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption, NotAdapted
from rankfold.formats import native
from rankfold.formats.files import read_json
from rankfold.layers import require

TRAINED_WHOLE = ("lm_head",)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_loading_restores_every_tensor_bit_for_bit(point: Point, tmp_path: Path) -> None:
    model = adapted_blocks(point, train=TRAINED_WHOLE)
    rf.save(model, tmp_path / "first")
    loaded = rf.load(point.blocks(), tmp_path / "first")
    wanted = native.tensors_of(require(model), "default")
    found = native.tensors_of(require(loaded), "default")
    assert list(found) == list(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert list(trainable(loaded)) == list(trainable(model))
    assert torch.equal(output(loaded), output(model))
    rf.save(loaded, tmp_path / "second")
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_file_holds_the_adapter_and_nothing_of_the_base(point: Point, tmp_path: Path) -> None:
    model = adapted_blocks(point)
    held = {tensor.numpy().tobytes() for tensor in point.blocks().state_dict().values()}
    tensors = load_file(rf.save(model, tmp_path / "adapter") / native.TENSORS)
    assert not any(tensor.numpy().tobytes() in held for tensor in tensors.values())
    known = {"shared", *(name for name, _ in model.named_modules())}
    assert all(key.rpartition(":")[0] in known for key in tensors)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_loading_decomposes_and_draws_nothing(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_blocks(point)
    rf.save(model, tmp_path / "adapter")
    fresh = point.blocks()

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a decomposition while loading")

    with monkeypatch.context() as patched:
        for name in ("svd", "svdvals", "eigh", "eig", "qr"):
            if not point.on_activations or name != "qr":  # its rotation is the orthonormal part of its frame
                patched.setattr(torch.linalg, name, refuse)
        patched.setattr(torch, "svd_lowrank", refuse)
        state = torch.random.get_rng_state()
        rf.load(fresh, tmp_path / "adapter")
        assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(output(fresh), output(model))


_SCRIPT = """
import sys, torch
import rankfold as rf
from battery import adapted_blocks, points
torch.manual_seed(int(sys.argv[2]))
for method in ("uni-lora", "dora", "lora-xs"):
    rf.save(adapted_blocks(points(method)[0], train=("lm_head",)), f"{sys.argv[1]}/{method}")
"""


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    for place, hash_seed in (("one", "1"), ("two", "2")):
        environment = {
            **os.environ,
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]),
        }
        command = [sys.executable, "-c", _SCRIPT, str(tmp_path / place), hash_seed]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    for method in ("uni-lora", "dora", "lora-xs"):
        assert contents(tmp_path / "one" / method) == contents(tmp_path / "two" / method)


def test_the_record_says_what_was_done_and_to_which_base(tmp_path: Path) -> None:
    model = blocks()
    model.config._name_or_path, model.config._commit_hash = "somebody/blocks", "abc123"
    rf.adapt(model, "dora/pissa", rank=2, seed=7, train=TRAINED_WHOLE)
    record = read_json(rf.save(model, tmp_path / "adapter") / native.RECORD)
    assert record["format_version"] == 1
    assert record["point"] == "dora/pissa"
    assert record["seed"] == 7
    assert record["train"] == ["lm_head"]
    assert set(record["ranks"].values()) == {2}
    assert record["base"]["name"] == "somebody/blocks"
    assert record["base"]["revision"] == "abc123"
    assert record["versions"]["rankfold"] == rf.__version__
    assert record["method"]["arxiv"] == "2402.09353"


@pytest.mark.parametrize("seed", [np.int64(3), torch.tensor(3)])
def test_a_seed_of_numpy_or_torch_is_saved_as_a_plain_number(seed: int, tmp_path: Path) -> None:
    folder = rf.save(rf.adapt(blocks(), "lora", rank=2, seed=seed), tmp_path / "adapter")
    assert read_json(folder / native.RECORD)["seed"] == 3
    rf.load(blocks(), folder)


def test_a_name_with_the_ending_of_another_is_trained_whole_alone(tmp_path: Path) -> None:
    def nested() -> nn.Module:
        torch.manual_seed(0)
        inner = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
        return nn.ModuleDict({"inner": inner, "head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})

    model = rf.adapt(nested(), "lora", rank=2, targets="re:body", train=["re:head"])
    loaded = rf.load(nested(), rf.save(model, tmp_path / "adapter"))
    assert require(loaded).adapter().record["train"] == ["head"]
    assert require(loaded).adapter().paths == ["body"]


def test_one_of_several_adapters_is_saved_by_name(tmp_path: Path) -> None:
    model = adapted_blocks(points("lora")[0], name="one")
    first = output(model)
    rf.adapt(model, "vera", rank=3, name="two")
    rf.save(model, tmp_path / "one", "one")
    with pytest.raises(NotAdapted, match="no adapter 'three' in the model"):
        rf.save(model, tmp_path / "three", "three")
    assert not (tmp_path / "three").exists()
    assert torch.equal(output(rf.load(blocks(), tmp_path / "one")), first)


def test_an_adapter_that_is_not_active_keeps_its_whole_modules(tmp_path: Path) -> None:
    model = adapted_blocks(points("lora")[0], name="one", train=TRAINED_WHOLE)
    first = output(model)
    rf.adapt(model, "lora", rank=2, name="two", train=TRAINED_WHOLE)
    rf.save(model, tmp_path / "one", "one")
    assert torch.equal(output(rf.load(blocks(), tmp_path / "one")), first)


def test_loading_beside_another_adapter_needs_another_name(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    model = rf.load(blocks(), folder)
    with pytest.raises(InvalidOption, match="already holds an adapter 'default'"):
        rf.load(model, folder)
    rf.load(model, folder, name="second")
    assert require(model).active == ("second",)
    assert torch.equal(output(model), output(rf.load(blocks(), folder)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_loads_into_a_copy_of_its_base_in_half_precision(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "adapter", "dora")
    loaded = rf.load(blocks(dtype), folder)
    assert {p.dtype for p in trainable(loaded).values()} == {torch.float32}
    torch.testing.assert_close(
        output(loaded).float(), output(rf.load(blocks(), folder)), rtol=0.05, atol=0.05
    )


def test_factors_in_half_precision_keep_their_values(tmp_path: Path) -> None:
    model = adapted_blocks(points("lora")[0]).to(torch.bfloat16)
    loaded = rf.load(blocks(torch.bfloat16), rf.save(model, tmp_path / "adapter"))
    wanted, found = trainable(model), trainable(loaded)
    assert {p.dtype for p in wanted.values()} == {torch.bfloat16}
    assert all(torch.equal(found[key].to(torch.bfloat16), wanted[key]) for key in wanted)


def test_a_model_with_numbers_that_are_not_finite_is_saved_and_loaded(tmp_path: Path) -> None:
    def broken() -> nn.Module:
        model = blocks()
        model.blocks[0].up.weight.data[0, -1] = float("nan")
        model.blocks[1].up.weight.data[:] = float("inf")
        return model

    folder = rf.save(rf.adapt(broken(), "lora", rank=2), tmp_path / "adapter")
    assert json.loads((folder / native.RECORD).read_text(), parse_constant=pytest.fail)
    assert require(rf.load(broken(), folder)).active == ("default",)


def test_the_training_state_of_the_model_is_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    model = rf.load(blocks().train(), folder)
    assert all(module.training for module in model.modules())


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = adapted_blocks(points("dora")[0], train=TRAINED_WHOLE)
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    saved_output = output(model)
    rf.save(model, tmp_path / "adapter")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(output(model), saved_output)
