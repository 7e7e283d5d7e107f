"""Merging folders of models, beside mergekit: time, and memory over the largest tensor.

python benchmarks/merge.py [--rules linear,ties] [--rounds 3] [--json FILE] [--quick]
"""

import argparse
import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from _measure import MEGA, Step, paired_ratios, peak_megabytes, print_header
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import rankfold as rf

FULL = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 10_000}
QUICK = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 500}
SETTINGS: dict[str, dict[str, Any]] = {"linear": {}, "ties": {"density": 0.2}}


def write_models(root: Path, quick: bool, dtype: torch.dtype) -> list[Path]:
    """Write a base and two models near it, in shards."""
    size = QUICK if quick else FULL
    config = LlamaConfig(**size, num_attention_heads=4, max_position_embeddings=128)
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).to(dtype)
    folders = [root / name for name in ("base", "one", "two")]
    for folder in folders:
        base.save_pretrained(folder, max_shard_size="1MB" if quick else "50MB")
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    return folders


def copying(folder: Path, out: Path) -> Step:
    """Return the step of reading and writing one model, shard by shard."""

    def copy() -> None:
        shutil.rmtree(out, ignore_errors=True)  # here and below: files are new, not written over
        out.mkdir()
        for shard in folder.glob("*.safetensors"):
            save_file(load_file(shard), out / shard.name, metadata={"format": "pt"})

    return copy


def ours(rule: str, folders: list[Path], out: Path) -> Step:
    base, *models = folders

    def merge() -> None:
        shutil.rmtree(out, ignore_errors=True)
        given = None if rule == "linear" else base
        rf.merge(models, rule, base=given, out=out, progress=False, **SETTINGS[rule])

    return merge


def theirs(rule: str, folders: list[Path], out: Path) -> Step:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    base, *models = map(str, folders)
    entries: list[dict[str, Any]] = [
        {"model": model, "parameters": {"weight": 1.0, **SETTINGS[rule]}} for model in models
    ]
    settings: dict[str, Any] = {"merge_method": rule, "models": entries, "dtype": "float32"}
    if rule != "linear":
        settings.update(base_model=base, models=[{"model": base}, *entries])

    def merge() -> None:
        shutil.rmtree(out, ignore_errors=True)
        config = MergeConfiguration.model_validate(settings)
        run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))

    return merge


def largest_megabytes(folder: Path) -> float:
    """Return the size of the largest tensor in float32, in which rules compute."""
    largest = 0
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as opened:
            sizes = [torch.Size(opened.get_slice(name).get_shape()).numel() for name in opened.offset_keys()]
        largest = max(largest, *sizes)
    return 4 * largest / MEGA


def measure(rule: str, folders: list[Path], room: Path, rounds: int) -> dict[str, float | None]:
    steps = {
        "rankfold": ours(rule, folders, room / "ours"),
        "mergekit": theirs(rule, folders, room / "theirs"),
    }
    found: dict[str, float | None] = dict(
        paired_ratios(copying(folders[0], room / "copy"), steps, rounds)  # of processor time
    )
    rows: dict[str, float | None] = {f"{rule}: {name} / copying one model": found[name] for name in steps}
    rows[f"{rule}: rankfold / mergekit"] = (found["rankfold"] or 0.0) / (found["mergekit"] or 1.0)
    largest = largest_megabytes(folders[0])
    for name, step in steps.items():
        peak = peak_megabytes(step)
        rows[f"{rule}: peak memory, {name} / largest tensor"] = None if peak is None else peak / largest
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rules", default="linear,ties")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        room = Path(temporary)
        folders = write_models(room, arguments.quick, torch.float32)
        size = sum(shard.stat().st_size for shard in folders[0].glob("*.safetensors")) / MEGA
        print_header(
            "Merging two models of one base",
            f"{size:.0f} MB each in float32, largest tensor {largest_megabytes(folders[0]):.0f} MB",
        )
        rows: dict[str, float | None] = {}
        for rule in arguments.rules.split(","):
            rows |= measure(rule, folders, room, 1 if arguments.quick else arguments.rounds)
    for name, value in rows.items():
        print(f"  {name:<50} {'unknown' if value is None else f'{value:.2f}'}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
