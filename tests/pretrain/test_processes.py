"""Two processes, as torchrun starts them."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rankfold.pretrain import PretrainConfig, load_pretrained, pretrain

PROCESSES = 2


TORCHRUN = "torch.distributed.run --standalone --nproc_per_node 2"
ACCELERATE = (
    "accelerate.commands.accelerate_cli launch --num_processes 2 --num_machines 1 --mixed_precision no"
    " --dynamo_backend no --use_fsdp --fsdp_version 2"
)


def _run(config: PretrainConfig, words: str, launcher: str = TORCHRUN) -> tuple[dict[str, Any], str]:
    """Pretrain as `config` says with half its batch in each of two processes."""
    flags = (
        f"{config.model} --data {config.data[0]} --held-out {config.held_out} --vocab {config.vocab}"
        f" --length 16 --batch-size {config.batch_size // PROCESSES} --steps {config.steps} --lr {config.lr}"
        f" --device cpu --save-steps 2 --eval-steps 2 --out {config.out} --json {words}"
    )
    command = [sys.executable, "-m", *launcher.split(), "-m", "rankfold", "pretrain", *shlex.split(flags)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def _close(first: Path, second: Path) -> None:
    one, two = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=2e-3, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flag"), [(TORCHRUN, "--fsdp"), (ACCELERATE, "")], ids=["torchrun", "accelerate"]
)
def test_shards_in_two_processes_learn_what_one_process_does_and_the_first_speaks_alone(
    launcher: str, flag: str, small: PretrainConfig, tmp_path: Path
) -> None:
    config = replace(small, optimizer="galore", set={"optimizer.refresh": 2}, lr=1e-3)
    alone = pretrain(replace(config, out=str(tmp_path / "alone")), progress=False)
    result, said = _run(config, f"{flag} --optimizer galore --set optimizer.refresh=2", launcher)
    assert config.out is not None
    _close(alone.out, Path(config.out))
    assert result["after"]["loss"] == pytest.approx(alone.after.loss, abs=1e-4)
    assert said.count("numbers train") == 1
    held, whole = result["memory"]["measured"], alone.measured
    assert whole.optimizer is not None
    assert held["weights"] < 0.55 * (whole.weights or 0)
    assert held["optimizer"] < 0.6 * whole.optimizer
    assert load_pretrained(config.out)


@pytest.mark.slow
@pytest.mark.parametrize("words", ["--fsdp --optimizer fira", "--fsdp --structure sltrain --rank 4", ""])
def test_two_processes_resume_to_the_weights_of_two_that_never_stopped(
    words: str, small: PretrainConfig, tmp_path: Path
) -> None:
    _run(replace(small, out=str(tmp_path / "through")), words)
    _run(small, words)
    assert small.out is not None
    shutil.rmtree(Path(small.out) / "checkpoints" / "checkpoint-4")
    (Path(small.out) / "model.safetensors").unlink()
    _, said = _run(small, f"{words} --resume")
    assert "resuming from checkpoint-2" in said
    one, two = (load_file(Path(out) / "model.safetensors") for out in (tmp_path / "through", small.out))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one.keys() == two.keys()


@pytest.mark.slow
def test_dynamics_are_refused_on_shards(small: PretrainConfig) -> None:
    with pytest.raises(AssertionError, match="dynamics and dynamic ranks do not act on sharded weights"):
        _run(small, "--fsdp --structure lora/relora --rank 2")
