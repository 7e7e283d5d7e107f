import errno
import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainerCallback

from rankfold.errors import InvalidOption, InvalidRank, OutputExists, RankfoldError
from rankfold.pretrain import PretrainConfig, load_pretrained, plan_pretraining, pretrain
from rankfold.pretrain.prepare import prepare
from rankfold.pretrain.tokens import train_tokenizer
from rankfold.pretrain.trainer import Diverged, arguments_of
from rankfold.training.config import read_config
from rankfold.training.data import DataError
from rankfold.training.whole import NotWritten

Act = Callable[[Any], None]


def _weights(out: str | None) -> dict[str, torch.Tensor]:
    assert out is not None
    return load_file(Path(out) / "model.safetensors")


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def _checkpoints(out: str | None) -> list[str]:
    assert out is not None
    return sorted(path.name for path in (Path(out) / "checkpoints").iterdir())


@pytest.fixture
def acting(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Act], None]:
    """Return what lets something happen at the end of a step of every Trainer that is made from now on."""

    def let(step: int, act: Act) -> None:
        class Acting(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.global_step == step:
                    act(kwargs)

        original = Trainer.__init__

        def made(self: Trainer, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.add_callback(Acting())

        monkeypatch.setattr(Trainer, "__init__", made)

    return let


def _interrupt(_: Any) -> None:
    raise KeyboardInterrupt


def test_a_model_learns_and_loads_again_with_its_tokenizer(small: PretrainConfig, text: str) -> None:
    said: list[str] = []
    result = pretrain(replace(small, steps=20), progress=False, notify=said.append)
    assert result.before is not None
    assert result.before.perplexity == pytest.approx(270, rel=0.1)  # at random: the vocabulary
    assert result.after.loss < result.before.loss - 0.3
    assert "0.1M: 81,456 parameters, vocabulary 270" in said[0]
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(result.out),
        AutoTokenizer.from_pretrained(result.out),
    )
    assert sum(p.numel() for p in model.parameters()) == result.plan.parameters
    ids = tokenizer("the river carries", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    assert type(load_pretrained(result.out)[0]) is type(model)
    assert json.loads((result.out / "result.json").read_text()) == result.to_dict()


def test_the_held_out_loss_is_that_of_the_model_that_is_left(small: PretrainConfig) -> None:
    result = pretrain(small, progress=False)
    model, tokenizer = load_pretrained(result.out)
    held_out = prepare(replace(small, tokenizer=str(result.out), vocab=None)).scored()
    ids = torch.stack([held_out[i] for i in range(len(held_out))]).long()
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert result.after.loss == pytest.approx(float(loss), abs=1e-5)
    assert result.after.count == ids[:, 1:].numel()
    assert len(tokenizer) == 270


def test_the_curves_are_written_and_drawn(small: PretrainConfig) -> None:
    result = pretrain(small, progress=False)
    curves = json.loads((result.out / "metrics.json").read_text())
    assert [point["step"] for point in curves["held_out"]] == [0, 2, 4]
    assert [point["step"] for point in curves["train"]] == [1, 2, 3, 4]
    assert curves["train"][-1]["tokens"] == 4 * 4 * 16
    assert curves["held_out"][-1]["loss"] == result.after.loss
    assert (result.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_climbs_and_falls_along_a_cosine_to_its_floor(small: PretrainConfig) -> None:
    result = pretrain(replace(small, steps=10, warmup=0.2, floor=0.5, eval_steps=10), progress=False)
    rates = [p["lr"] for p in json.loads((result.out / "metrics.json").read_text())["train"]]
    cosine = [0.5 + 0.25 * (1 + torch.cos(torch.tensor(torch.pi * t / 8)).item()) for t in range(8)]
    assert rates == pytest.approx([0.0, 0.005, *(0.01 * share for share in cosine)])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "galore", "set": {"optimizer.refresh": 2}},
        {"optimizer": "galore", "clip": 0.0, "step_in_backward": True},
        {"structure": "sltrain", "rank": 4},
        {"structure": "lora/relora", "rank": 4, "set": {"dynamics.interval": 2, "dynamics.warmup": 1}},
        pytest.param({"dtype": "bfloat16", "optimizer": "frugal"}, marks=pytest.mark.slow),
    ],
    ids=["adamw", "galore", "steps in backward", "sltrain", "relora", "bfloat16"],
)
def test_an_interrupted_run_resumes_to_the_weights_of_one_that_never_stopped(
    options: dict[str, Any],
    small: PretrainConfig,
    tmp_path: Path,
    acting: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(small, eval_steps=4, **options)
    through = pretrain(replace(config, out=str(tmp_path / "through")), progress=False)
    with monkeypatch.context():
        acting(3, _interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, progress=False)
    assert _checkpoints(config.out) == ["checkpoint-2"]
    monkeypatch.undo()
    resumed = pretrain(config, resume=True, progress=False)
    assert _same(_weights(str(through.out)), _weights(config.out))
    assert resumed.after == through.after
    assert resumed.trained_tokens == through.trained_tokens / 2


def test_the_written_settings_repeat_the_run(small: PretrainConfig, tmp_path: Path) -> None:
    first = pretrain(replace(small, set={"optimizer.weight_decay": 0.1}), progress=False)
    stored = read_config(first.out / "config.yaml", PretrainConfig)
    second = pretrain(PretrainConfig(**{**stored, "out": str(tmp_path / "again")}), progress=False)
    assert _same(_weights(small.out), _weights(str(second.out)))
    third = pretrain(replace(small, out=str(tmp_path / "other"), seed=1), progress=False)
    assert not _same(_weights(small.out), _weights(str(third.out)))


def test_a_disk_that_is_full_leaves_the_last_checkpoint_whole(
    small: PretrainConfig, tmp_path: Path, acting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    through = pretrain(replace(small, out=str(tmp_path / "through")), progress=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(_: Any) -> None:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (100_000, before[1])
        )  # bytes of a file: writes begin to fail

    acting(3, fill)
    try:
        with pytest.raises(NotWritten, match=r"step 4 could not be written: .*that of step 2 is whole"):
            pretrain(small, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    monkeypatch.undo()
    assert _checkpoints(small.out) == ["checkpoint-2"]
    pretrain(small, resume=True, progress=False)
    assert _same(_weights(str(through.out)), _weights(small.out))


def test_a_disk_without_room_is_named_whatever_the_writing_library_says(
    small: PretrainConfig, acting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        def save(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("unexpected pos 333632 vs 333524")

        monkeypatch.setattr("torch.save", save)
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))

    acting(3, fail)
    with pytest.raises(NotWritten, match=r"step 4 .* the disk of .* is full; that of step 2"):
        pretrain(small, progress=False)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_whose_files_are_not_all_written_is_not_there(
    file: str, small: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import TrainerState

    def torn(state: Any, path: Any) -> None:
        if Path(path).name == file:
            Path(path).write_bytes(b'{"half"')
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", torn)
    if file.endswith("json"):
        monkeypatch.setattr(TrainerState, "save_to_json", lambda self, path: torn(self, path))
    with pytest.raises(NotWritten, match=r"step 2 could not be written: .*No space left"):
        pretrain(small, progress=False)
    assert _checkpoints(small.out) == []


def test_a_structure_that_cannot_be_folded_is_left_in_its_own_form_and_loads(
    small: PretrainConfig, acting: Any
) -> None:
    kept: dict[str, Any] = {}
    ids = torch.arange(8)[None]

    def remember(kwargs: Any) -> None:
        model = kwargs["model"].eval()
        with torch.no_grad():
            kept["logits"] = model(input_ids=ids).logits
        model.train()

    acting(4, remember)
    result = pretrain(replace(small, structure="reft", rank=2), progress=False)
    assert result.reason is not None
    assert "load_pretrained" in result.loads_with
    model, tokenizer = load_pretrained(result.out)
    torch.testing.assert_close(model(input_ids=ids).logits, kept["logits"])
    assert len(tokenizer) == 270
    assert result.plan.modules > 0


def test_everything_beside_a_structure_trains(small: PretrainConfig, tmp_path: Path) -> None:
    result = pretrain(replace(small, structure="lora", rank=2), progress=False)
    assert result.reason is None
    after = _weights(small.out)
    again = pretrain(replace(small, lr=1e-12, out=str(tmp_path / "start")), progress=False)
    before = _weights(str(again.out))
    assert after.keys() == before.keys()
    assert all(not torch.equal(after[name], before[name]) for name in after)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mixed"])
def test_what_was_predicted_is_measured(dtype: str, small: PretrainConfig) -> None:
    config = replace(small, dtype=dtype, optimizer="galore", steps=2, batch_size=8, length=32, lr=1e-3)
    result = pretrain(config, progress=False)
    predicted, measured = result.plan.memory, result.measured
    assert (measured.weights, measured.gradients, measured.optimizer) == (
        predicted.weights,
        predicted.gradients,
        predicted.optimizer,
    )
    assert measured.activations is not None
    assert predicted.activations is not None
    assert 0.5 < predicted.activations / measured.activations < 2
    assert result.peak_memory > measured.weights
    stored = {tensor.dtype for tensor in _weights(config.out).values()}
    assert stored == {torch.bfloat16 if dtype == "bfloat16" else torch.float32}


def test_a_plan_makes_no_weights_and_writes_nothing(
    small: PretrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_pretraining(replace(small, model="7B", optimizer="galore"))
    assert plan.parameters == 6_738_415_616 - 2 * (32_000 - 270) * 4096
    assert plan.memory.total is not None
    assert plan.memory.total > 2 * 4 * plan.parameters
    assert small.out is not None
    assert not Path(small.out).exists()
    assert plan.tokens == 4 * 4 * 16


def test_steps_follow_from_the_passes_over_the_text(small: PretrainConfig) -> None:
    whole = plan_pretraining(replace(small, steps=None, epochs=2, accumulate=3))
    batches = whole.text["tokens"] // 16 // 4
    assert whole.steps == 2 * -(-batches // 3)
    with pytest.raises(DataError, match="fewer than a batch of 4000"):
        plan_pretraining(replace(small, batch_size=4000))


def test_any_configuration_of_transformers_is_trained(small: PretrainConfig, tmp_path: Path) -> None:
    LlamaConfig(
        vocab_size=999, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "tied")  # fmt: skip
    for name in ("tied", "tied/config.json"):
        result = pretrain(replace(small, model=str(tmp_path / name), steps=2), overwrite=True, progress=False)
        model: Any = load_pretrained(result.out)[0]
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert model.config.vocab_size == 270
    with pytest.raises(InvalidOption, match="length is 33; the model holds at most 32"):
        plan_pretraining(replace(small, model=str(tmp_path / "tied"), length=33))


def test_a_loss_that_is_no_number_ends_the_run_with_a_sentence_on_a_line_of_its_own(
    small: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Diverged, match=r"not finite at step \d+: lower --lr"):
        pretrain(replace(small, lr=1e30, clip=0.0, steps=8, warmup=0.0))
    shown = capsys.readouterr().err
    assert "pretraining" in shown
    assert shown.endswith("\n")


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"set": {"structure.alpha": 1}}, InvalidOption, "needs a structure"),
        ({"rank": 4}, InvalidOption, "rank is the structure's"),
        ({"optimizer": "galore", "set": {"optimizer.rank": 99}}, InvalidRank, "at rank 99"),
        ({"structure": "lora", "rank": 99}, InvalidRank, "99"),
        ({"structure": "kind"}, RankfoldError, "kind reads classes"),
        ({"tokenizer": "somewhere"}, InvalidOption, "vocab is of a tokenizer that is trained"),
        ({"vocab": 60_000}, DataError, "supports a vocabulary of"),
        ({"fsdp": True}, InvalidOption, "torchrun"),
        ({"model": "2M"}, InvalidOption, "there is no size 2M"),
        ({"optimizer": "galroe"}, RankfoldError, "galore"),
        ({"data": ("/none.txt",)}, RankfoldError, "no file with text"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    options: dict[str, Any], error: type[Exception], sentence: str, small: PretrainConfig
) -> None:
    with pytest.raises(error, match=sentence):
        pretrain(replace(small, **options), progress=False)
    assert small.out is not None
    assert not Path(small.out).exists()


def test_a_resumed_run_keeps_its_settings_and_its_text(small: PretrainConfig, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"line {number} of some text" for number in range(400)))
    config = replace(small, data=(str(file),), steps=2, vocab=None, length=8, tokenizer=_tokenizer(small))
    pretrain(config, progress=False)
    with pytest.raises(OutputExists, match="not empty"):
        pretrain(config, progress=False)
    with pytest.raises(InvalidOption, match=r"optimizer was 'adamw' .* and is 'fira' now"):
        pretrain(replace(config, optimizer="fira"), resume=True, progress=False)
    before, measured = _weights(config.out), Path(str(config.out), "result.json").read_text()
    pretrain(config, resume=True, progress=False)
    assert _same(before, _weights(config.out))
    assert json.loads(Path(str(config.out), "result.json").read_text()) == json.loads(measured)
    file.write_text(file.read_text() + "\nanother line, and another one, and one more of them")
    with pytest.raises(InvalidOption, match="not the one that the run in"):
        pretrain(config, resume=True, progress=False)


def _tokenizer(small: PretrainConfig) -> str:
    folder = f"{small.out}-tokenizer"
    train_tokenizer([str(number) * 9 for number in range(99)], 260).save_pretrained(folder)
    return folder


def test_compiling_is_asked_of_the_trainer(small: PretrainConfig) -> None:
    assert arguments_of(replace(small, compile=True), Path("x")).torch_compile
    assert not arguments_of(small, Path("x")).torch_compile


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(small: PretrainConfig, tmp_path: Path) -> None:
    plain = pretrain(small, progress=False)
    compiled = pretrain(replace(small, compile=True, out=str(tmp_path / "compiled")), progress=False)
    assert compiled.after.loss == pytest.approx(plain.after.loss, abs=1e-4)
    assert isinstance(load_pretrained(compiled.out)[0], type(load_pretrained(plain.out)[0]))


# Less memory ------------------------------------------------------------------------------------------


def test_steps_in_backward_and_recomputed_blocks_change_no_weight(
    small: PretrainConfig, tmp_path: Path
) -> None:
    base = replace(small, optimizer="galore", clip=0.0, set={"optimizer.rank": 4})
    wanted = pretrain(base, progress=False)
    early = replace(base, out=str(tmp_path / "early"), step_in_backward=True)
    result = pretrain(early, progress=False)
    assert _same(_weights(early.out), _weights(base.out))
    largest = max(4 * tensor.numel() for tensor in _weights(base.out).values())
    assert result.measured.gradients == result.plan.memory.gradients == largest
    assert wanted.measured.gradients == wanted.plan.memory.gradients > largest  # type: ignore[operator]
    again = replace(base, out=str(tmp_path / "again"), checkpointing=True)
    lean = pretrain(again, progress=False)
    assert _same(_weights(again.out), _weights(base.out))
    assert lean.plan.memory.activations < wanted.plan.memory.activations  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": 0.0}, "not adamw"),
        ({"optimizer": "galore"}, "clip 0"),
        ({"optimizer": "galore", "clip": 0.0, "structure": "low-rank/self-guided"}, "dynamics act on all"),
    ],
)
def test_steps_in_backward_are_refused_where_they_have_no_meaning(
    small: PretrainConfig, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RankfoldError, match=words):
        pretrain(replace(small, step_in_backward=True, **changes), progress=False)
