import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training import tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
)

import rankfold as rf
from rankfold.errors import (
    BaseMismatch,
    FormatError,
    InvalidOption,
    OutputExists,
    RankfoldError,
    UnknownMethod,
)
from rankfold.training.adapter import export_adapter, fold_adapter, load_adapted
from rankfold.training.config import RunConfig, read_config
from rankfold.training.metrics import evaluate
from rankfold.training.prepare import prepare
from rankfold.training.run import plan_run, recipe, run


@pytest.fixture
def causal(llama: str, notes: str, tmp_path: Path) -> RunConfig:
    return RunConfig(
        llama,
        notes,
        str(tmp_path / "out"),
        rank=2,
        lr=1e-2,
        steps=8,
        batch_size=4,
        max_length=16,
        save_steps=2,
        device="cpu",
    )


@pytest.fixture
def classify(bert: str, reviews: str, tmp_path: Path) -> RunConfig:
    return RunConfig(bert, reviews, str(tmp_path / "out"), rank=2, lr=1e-2, steps=60, device="cpu")


def _weights(folder: str | None) -> dict[str, torch.Tensor]:
    assert folder is not None
    return load_file(Path(folder) / "rankfold.safetensors")


def _losses(folder: str | None) -> list[float]:
    """Return the training losses that a run of three steps recorded."""
    assert folder is not None
    state = json.loads((Path(folder) / "checkpoints" / "checkpoint-3" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"]]


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_language_model_improves_and_the_result_says_by_how_much(causal: RunConfig) -> None:
    result = run(causal, progress=False)
    assert result.after.loss < result.before.loss
    assert result.after.perplexity is not None
    assert result.steps == 8
    assert 0 < result.trainable < result.total
    assert result.peak_memory > 2**20
    written = json.loads((result.out / "result.json").read_text())
    assert written == result.to_dict()
    assert written["after"]["loss"] == result.after.loss


def test_the_next_command_of_what_cannot_be_folded_loads_it(causal: RunConfig) -> None:
    result = run(replace(causal, method="reft", steps=1), progress=False)
    program, *words = shlex.split(result.next_command)
    assert program == "python"
    command = [sys.executable, *(word for word in words if word != "-i")]
    subprocess.run(command, check=True, capture_output=True)
    assert shlex.split(run(causal, overwrite=True, progress=False).next_command)[:2] == ["rankfold", "fold"]


def test_a_classifier_learns_its_reviews(classify: RunConfig) -> None:
    result = run(classify, progress=False)
    assert result.after.accuracy == 1.0
    assert result.before.accuracy is not None
    assert result.before.accuracy < 1.0


def test_the_metric_before_is_that_of_the_bare_base(causal: RunConfig, tmp_path: Path) -> None:
    plain = run(causal, progress=False)
    moved = run(replace(causal, out=str(tmp_path / "other"), method="lora/olora"), progress=False)
    assert plain.before == moved.before


def test_the_written_settings_repeat_the_run(causal: RunConfig, tmp_path: Path) -> None:
    run(causal, progress=False)
    assert causal.out is not None
    again = replace(RunConfig(**read_config(Path(causal.out) / "config.yaml")), out=str(tmp_path / "again"))
    run(again, progress=False)
    assert _same(_weights(causal.out), _weights(again.out))


def test_another_seed_gives_another_adapter(causal: RunConfig, tmp_path: Path) -> None:
    other = replace(causal, seed=1, out=str(tmp_path / "other"))
    run(causal, progress=False)
    run(other, progress=False)
    assert not _same(_weights(causal.out), _weights(other.out))


class _Stop(TrainerCallback):
    """Ends the process's part of a run as an exception in the middle of a step would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        if state.global_step == self.step:  # type: ignore[attr-defined]
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["lora", "vera", "lora/pissa"])
@pytest.mark.parametrize("stop", [1, 5])
def test_an_interrupted_run_resumes_to_the_weights_of_one_that_never_stopped(
    method: str, stop: int, causal: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal = replace(causal, method=method)
    through = replace(causal, out=str(tmp_path / "through"))
    run(through, progress=False)
    with monkeypatch.context() as patch:
        original = Trainer.__init__

        def interrupted(self: Trainer, *args: object, **kwargs: object) -> None:
            original(self, *args, **kwargs)
            self.add_callback(_Stop(stop))

        patch.setattr(Trainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(causal, progress=False)
    assert causal.out is not None
    assert not (Path(causal.out) / "rankfold.json").exists()
    said: list[str] = []
    result = run(causal, resume=True, progress=False, notify=said.append)
    assert any("checkpoint-4" in line for line in said) is (stop == 5)
    assert result.steps == 8
    assert _same(_weights(through.out), _weights(causal.out))


def test_a_classifier_with_dropout_resumes_to_the_same_weights(
    classify: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classify = replace(classify, steps=6, save_steps=2, accumulate=2)
    through = replace(classify, out=str(tmp_path / "through"))
    run(through, progress=False)
    with monkeypatch.context() as patch:
        original = Trainer.__init__

        def interrupted(self: Trainer, *args: object, **kwargs: object) -> None:
            original(self, *args, **kwargs)
            self.add_callback(_Stop(3))

        patch.setattr(Trainer, "__init__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(classify, progress=False)
    run(classify, resume=True, progress=False)
    assert _same(_weights(through.out), _weights(classify.out))


@pytest.mark.parametrize("steps", [7, 8], ids=["within an epoch", "at its end"])
def test_a_finished_run_that_is_resumed_stays_as_it_is(steps: int, causal: RunConfig) -> None:
    causal = replace(causal, steps=steps)
    run(causal, progress=False)
    before = _weights(causal.out)
    run(causal, resume=True, progress=False)
    assert _same(before, _weights(causal.out))


def test_a_killed_process_resumes_to_the_weights_of_one_that_never_stopped(
    causal: RunConfig, tmp_path: Path
) -> None:
    causal = replace(causal, steps=60, save_steps=5)
    assert causal.out is not None
    through = replace(causal, out=str(tmp_path / "through"))
    run(through, progress=False)
    words = (
        f"adapt {causal.model} --data {causal.data} --out {causal.out} --rank 2 --lr 1e-2 --steps 60"
        " --batch-size 4 --max-length 16 --save-steps 5 --device cpu"
    )
    command = [sys.executable, "-m", "rankfold", *shlex.split(words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    checkpoint = Path(causal.out) / "checkpoints" / "checkpoint-10" / "trainer_state.json"
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (Path(causal.out) / "rankfold.json").exists()
    resumed = subprocess.run([*command, "--resume"], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from checkpoint-" in resumed.stderr
    assert _same(_weights(through.out), _weights(causal.out))


@pytest.mark.slow
def test_two_processes_train_one_adapter_and_the_first_speaks_alone(
    classify: RunConfig, tmp_path: Path
) -> None:
    words = (
        f"adapt {classify.model} --data {classify.data} --out {classify.out} --rank 2 --lr 1e-2 --steps 60"
        " --batch-size 4 --device cpu --json"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "rankfold", *shlex.split(words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["steps"], result["after"]["accuracy"]) == (60, 1.0)
    assert done.stderr.count("examples from") == 1


def test_a_checkpoint_holds_the_adapter_and_not_the_base(causal: RunConfig) -> None:
    run(causal, progress=False)
    assert causal.out is not None
    [checkpoint, *_] = sorted((Path(causal.out) / "checkpoints").glob("checkpoint-*"))
    base = (Path(causal.model) / "model.safetensors").stat().st_size
    saved = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert 0 < saved < base / 2


def test_a_folder_with_something_in_it_is_refused_before_anything_is_read(causal: RunConfig) -> None:
    assert causal.out is not None
    Path(causal.out).mkdir()
    (Path(causal.out) / "thesis.tex").write_text("x")
    with pytest.raises(OutputExists):
        run(replace(causal, model="/missing/model"), progress=False)


def test_an_overwritten_run_is_the_new_one(causal: RunConfig) -> None:
    run(causal, progress=False)
    run(replace(causal, rank=1, steps=2), overwrite=True, progress=False)
    assert causal.out is not None
    assert read_config(Path(causal.out) / "config.yaml")["rank"] == 1
    assert all(1 in tensor.shape for tensor in _weights(causal.out).values())


def test_nothing_is_written_when_the_method_cannot_be_applied(causal: RunConfig) -> None:
    for wrong in ({"targets": ("nowhere",)}, {"rank": 0}, {"rank": 999}, {"method": "lroa"}):
        with pytest.raises(RankfoldError):
            run(replace(causal, **wrong), progress=False)  # type: ignore[arg-type]
        assert causal.out is not None
        assert not Path(causal.out).exists()


def test_a_plan_counts_what_the_run_trains_and_writes_nothing(
    causal: RunConfig, classify: RunConfig, tmp_path: Path
) -> None:
    for config in (causal, replace(classify, out=str(tmp_path / "second"))):
        plan = plan_run(replace(config, steps=2))
        assert config.out is not None
        assert not Path(config.out).exists()
        result = run(replace(config, steps=2), progress=False)
        assert plan.to_dict()["trainable"] == result.trainable
        assert plan.steps == result.steps
        assert plan.memory.total > plan.memory.weights


def test_epochs_are_planned_as_they_are_run(causal: RunConfig) -> None:
    config = replace(causal, steps=None, epochs=1.5, batch_size=3, accumulate=2)
    assert plan_run(config).steps == run(config, progress=False).steps


@pytest.mark.parametrize("task", ["causal", "classify"])
def test_passes_that_share_a_step_give_the_loss_and_the_weights_of_one_large_batch(
    task: str, llama: str, reviews: str, tmp_path: Path
) -> None:
    at_once = RunConfig(
        llama, reviews, str(tmp_path / "1"), task=task, rank=2, steps=3, lr=1e-2, device="cpu"
    )
    shared = replace(at_once, out=str(tmp_path / "2"), batch_size=2, accumulate=4)
    run(at_once, progress=False)
    run(shared, progress=False)
    first, second = _weights(at_once.out), _weights(shared.out)
    assert all(torch.allclose(first[key], second[key], atol=1e-4) for key in first)
    assert _losses(shared.out) == pytest.approx(_losses(at_once.out), rel=1e-4)


def test_half_precision_trains_in_float32_beside_a_half_precision_base(classify: RunConfig) -> None:
    result = run(replace(classify, dtype="bfloat16"), progress=False)
    assert {tensor.dtype for tensor in _weights(classify.out).values()} == {torch.float32}
    assert result.after.loss < result.before.loss


def test_options_reach_the_method_and_unknown_ones_are_refused(causal: RunConfig) -> None:
    assert recipe("lora/pissa", {"structure.alpha": 4}).structure == ("lora", {"alpha": 4})
    for options, sentence in (
        ({"shape.alpha": 1}, "'shape' in 'shape.alpha' is no axis"),
        ({"ranks.budget": 1}, "ranks.budget needs a method on that axis"),
    ):
        with pytest.raises(InvalidOption, match=sentence):
            recipe("lora", options)
    with pytest.raises(RankfoldError, match="alhpa"):
        run(replace(causal, set={"structure.alhpa": 1}), progress=False)
    with pytest.raises(UnknownMethod, match="lora"):
        recipe("lroa", {})


def _logits(model: torch.nn.Module, tokenizer: AutoTokenizer) -> torch.Tensor:
    inputs = tokenizer(["a good film", "the dog sleeps"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def test_an_adapter_loads_with_its_runs_task_and_classes(classify: RunConfig) -> None:
    result = run(classify, progress=False)
    name, base = load_adapted(str(result.out))
    assert name == classify.model
    assert base.model.config.id2label == {0: "bad", 1: "good"}
    prepared = prepare(classify)
    assert evaluate(base.model, prepared.scored, prepared.collate, batch_size=8) == result.after


def test_a_folded_adapter_is_a_stock_checkpoint_with_the_same_output(
    causal: RunConfig, classify: RunConfig, tmp_path: Path
) -> None:
    for config, auto in ((causal, AutoModelForCausalLM), (classify, AutoModelForSequenceClassification)):
        out = tmp_path / f"folded-{auto.__name__}"
        result = run(replace(config, out=str(tmp_path / auto.__name__)), progress=False)
        fold_adapter(str(result.out), out)
        _, adapted = load_adapted(str(result.out))
        stock, info = auto.from_pretrained(out, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        expected = _logits(adapted.model, adapted.tokenizer)
        assert torch.allclose(_logits(stock, AutoTokenizer.from_pretrained(out)), expected, atol=1e-5)
        assert not torch.allclose(expected, expected[:1].expand_as(expected))


def test_an_exported_adapter_loads_in_peft_with_the_same_output(causal: RunConfig, tmp_path: Path) -> None:
    from peft import PeftModel

    result = run(causal, progress=False)
    report = export_adapter(str(result.out), tmp_path / "peft")
    assert len(report.rows) == plan_run(causal).to_dict()["modules"].__len__()
    _, adapted = load_adapted(str(result.out))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(causal.model), tmp_path / "peft")
    expected = _logits(adapted.model, adapted.tokenizer)
    assert torch.allclose(_logits(peft, adapted.tokenizer), expected, atol=1e-5)


def test_a_tampered_adapter_or_another_base_is_refused(causal: RunConfig, tmp_path: Path) -> None:
    result = run(causal, progress=False)
    other = tiny.save_llama(tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(other)
    model.lm_head.weight.data += 1
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data += 1
    model.save_pretrained(other)
    with pytest.raises(BaseMismatch):
        load_adapted(str(result.out), model=other)
    weights = result.out / "rankfold.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(FormatError):
        load_adapted(str(result.out))


def test_an_adapter_made_in_python_is_folded_onto_the_named_base(llama: str, tmp_path: Path) -> None:
    model = rf.adapt(AutoModelForCausalLM.from_pretrained(llama), "lora", rank=2)
    rf.save(model, tmp_path / "adapter")
    assert fold_adapter(str(tmp_path / "adapter"), tmp_path / "folded", model=llama) == llama
    assert (tmp_path / "folded" / "model.safetensors").exists()
