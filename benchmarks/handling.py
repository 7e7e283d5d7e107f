"""Importing, wrapping, loading and generating, beside peft.

python benchmarks/handling.py [--parts import,wrap,load,generate] [--rounds 5] [--json FILE] [--quick]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from _llama import LINEARS, QUICK, Size, build, copy_of, ours
from _measure import Step, cpu_seconds, paired_ratios, print_header
from _peers import peft_model
from torch import nn

import rankfold as rf

Ratios = dict[str, float]
_IMPORT = "import time; import torch; t = time.process_time(); import {}; print(t, time.process_time())"


def import_times(rounds: int, quick: bool) -> Ratios:
    """CPU time until `import NAME` is done over that until `import torch` is done, in one fresh process."""
    found = {}
    for name in ("rankfold", "peft"):
        ratios = []
        for _ in range(rounds):
            done = subprocess.run(
                [sys.executable, "-c", _IMPORT.format(name)], capture_output=True, text=True, check=True
            )
            torch_alone, both = map(float, done.stdout.split())
            ratios.append(both / torch_alone)
        found[f"import {name} / import torch"] = statistics.median(ratios)
    return found


def stack(quick: bool) -> nn.Module:
    count, width = (8, 16) if quick else (200, 256)
    return nn.Sequential(*(nn.Linear(width, width) for _ in range(count)))


def wrapping(rounds: int, quick: bool) -> Ratios:
    """Wrapping linear layers with LoRA over copying the model that holds them."""
    import peft

    base = stack(quick)
    count = len(base)  # type: ignore[arg-type]
    names = [str(i) for i in range(count)]
    steps: dict[str, Step] = {
        f"wrap {count} layers, rankfold / copy": lambda: rf.adapt(copy_of(base), "lora", rank=8),
        f"wrap {count} layers, peft / copy": lambda: peft.get_peft_model(
            copy_of(base),  # type: ignore[arg-type]
            peft.LoraConfig(r=8, target_modules=names),
        ),
    }
    return paired_ratios(lambda: copy_of(base), steps, rounds)


def loading(rounds: int, quick: bool) -> Ratios:
    """Loading an adapter that started from singular vectors over loading a LoRA of the same shape."""
    import peft

    base = build(QUICK if quick else Size(layers=2))
    found: Ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        for library, write, read in (
            ("rankfold", _write_ours, lambda path: rf.load(copy_of(base), path)),
            ("peft", _write_theirs, lambda path: peft.PeftModel.from_pretrained(copy_of(base), path)),  # type: ignore[arg-type]
        ):
            paths = {init: str(Path(folder) / library / init) for init in ("plain", "pissa")}
            making = {init: cpu_seconds(lambda: write(base, init, path)) for init, path in paths.items()}  # noqa: B023
            ratio = _ratio(lambda: read(paths["plain"]), lambda: read(paths["pissa"]), rounds)  # noqa: B023
            found[f"load pissa / load lora, {library}"] = ratio
            found[f"make and save pissa / lora, {library}"] = making["pissa"] / making["plain"]
    return found


def _ratio(floor: Step, step: Step, rounds: int) -> float:
    return paired_ratios(floor, {"": step}, rounds)[""]


def _write_ours(base: nn.Module, init: str, path: str) -> None:
    rf.save(rf.adapt(copy_of(base), "lora/pissa" if init == "pissa" else "lora", rank=16), path)


def _write_theirs(base: nn.Module, init: str, path: str) -> None:
    import peft

    start = "pissa" if init == "pissa" else True
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=list(LINEARS), init_lora_weights=start)  # type: ignore[arg-type]
    peft.get_peft_model(copy_of(base), config).save_pretrained(path)  # type: ignore[arg-type]


def generating(rounds: int, quick: bool) -> Ratios:
    """Tokens one by one without gradients, over the bare model's."""
    size = QUICK if quick else Size()
    base, tokens = build(size), 4 if quick else 24
    steps: dict[str, Step] = {}
    for method in ("lora", "dora"):
        for library, make in (("rankfold", ours), ("peft", peft_model)):
            steps[f"generate, {method}, {library} / base"] = _generation(make(base, method, 16, {}), tokens)
    return paired_ratios(_generation(copy_of(base), tokens), steps, 3 * rounds)


def _generation(model: nn.Module, tokens: int) -> Step:
    model.eval()

    @torch.no_grad()
    def step() -> None:
        ids, cache = torch.arange(8)[None], None
        for _ in range(tokens):
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache, ids = output.past_key_values, output.logits[:, -1:].argmax(-1)

    return step


PARTS: dict[str, Callable[[int, bool], Ratios]] = {
    "import": import_times,
    "wrap": wrapping,
    "load": loading,
    "generate": generating,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the ratios here too")
    parser.add_argument("--quick", action="store_true", help="tiny models, once, to see that all runs")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; choose from {', '.join(PARTS)}")
    rounds = 1 if arguments.quick else arguments.rounds
    print_header(
        "What is done with an adapter around training, as ratios of process CPU time",
        f"Medians of {rounds} interleaved pairs, thrice as many for generating.",
        f"generate: {Size()}, one row, one token a call with a key-value cache; all linear layers, rank 16.",
        "load: the same model with 2 layers. wrap: 256 x 256 layers; copying shares the stored weights.",
    )
    found: Ratios = {}
    for part in arguments.parts.split(","):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.update(ratios := PARTS[part](rounds, arguments.quick))
        for name, ratio in ratios.items():
            print(f"{name:45}{ratio:8.2f}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
