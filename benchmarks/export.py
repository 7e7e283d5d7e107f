"""Turning other methods into LoRA: the error on held-out inputs, over that of peft's `convert_to_lora`.

python benchmarks/export.py [--rank 8] [--texts 192] [--json FILE] [--quick]

MiniLM's encoder is adapted by LoHa, LoKr, VeRA, GraLoRA and DoRA, with random values. Each adapter is
written in peft's form of the method, loaded by peft and converted by it, and converted by `rankfold.export`
with texts as data. For both, the error of every layer is `||(D - X) C^(1/2)||_F / ||D C^(1/2)||_F` for the
change D, what was made of it X, and the Gram matrix C of the layer's inputs on other texts. The ratio is ours
over peft's, so below 1 is better; the exit status is 1 if ours is higher on a layer by more than 1e-6.
"""

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _measure import print_header
from _minilm import Batch, MiniLM
from safetensors.torch import load_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.layers import require
from rankfold.methods.export import input_grams

SLACK = 1e-6
METHODS: dict[str, dict[str, Any]] = {
    "loha": {"rank": 8},
    "lokr": {"rank": 8},
    "vera": {"rank": 64},
    "gralora": {"rank": 32, "k": 4},
    "dora": {"rank": 16},
}
Changes = dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    method: str
    layers: int
    ours: float
    theirs: float
    smallest_ratio: float
    median_ratio: float
    largest_ratio: float
    worse: list[str]


def adapted(lm: MiniLM, method: str, options: dict[str, Any]) -> nn.Module:
    """Return the encoder with an adapter whose values are random."""
    model = rf.adapt(lm.fresh(), method, targets=lm.linears, seed=0, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path in lm.linears:
            for parameter in require(model).expressions("default")[path].parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def true_changes(model: nn.Module) -> Changes:
    adaptation = require(model)
    expressions = adaptation.expressions("default")
    return {p: (e.dense().double() - adaptation.layers[p].matrix()).detach() for p, e in expressions.items()}


def by_us(model: nn.Module, folder: Path, rank: int, data: list[Batch]) -> Changes:
    rf.export(model, folder, rank=rank, data=data, progress=False)
    return products(load_file(folder / "adapter_model.safetensors"))


def by_peft(lm: MiniLM, model: nn.Module, folder: Path, rank: int) -> Changes:
    import peft

    rf.export(model, folder)  # exactly, as peft stores the method
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(lm.fresh(), str(folder))  # type: ignore[arg-type]
        _, tensors = peft.convert_to_lora(loaded, rank)
    return products(tensors)


def products(tensors: dict[str, Tensor]) -> Changes:
    """Return the changes of a LoRA whose alpha is its rank."""
    plain = {key.removeprefix("base_model.model."): value.double() for key, value in tensors.items()}
    paths = [key.removesuffix(".lora_A.weight") for key in plain if key.endswith(".lora_A.weight")]
    return {path: plain[f"{path}.lora_B.weight"] @ plain[f"{path}.lora_A.weight"] for path in paths}


def error(change: Tensor, near: Tensor, gram: Tensor) -> float:
    parts = [float((part @ gram * part).sum()) for part in (change - near, change)]
    return (max(parts[0], 0.0) / parts[1]) ** 0.5


def measure(lm: MiniLM, method: str, rank: int, seen: list[Batch], other: list[Batch]) -> Row:
    model = adapted(lm, method, METHODS[method])
    with tempfile.TemporaryDirectory() as place:
        ours = by_us(model, Path(place) / "ours", rank, seen)
        theirs = by_peft(lm, model, Path(place) / "peft", rank)
    changes, grams = true_changes(model), input_grams(model, other, progress=False)
    pairs = {
        path: tuple(error(change, found[path], grams[path].double()) for found in (ours, theirs))
        for path, change in changes.items()
    }
    ratios = [mine / peers for mine, peers in pairs.values()]
    return Row(
        method,
        len(pairs),
        statistics.median(mine for mine, _ in pairs.values()),
        statistics.median(peers for _, peers in pairs.values()),
        min(ratios),
        statistics.median(ratios),
        max(ratios),
        [path for path, (mine, peers) in pairs.items() if mine > peers + SLACK],
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--texts", type=int, default=192, help="of calibration, and as many held out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    lm = MiniLM(1 if given.quick else None)
    texts = 32 if given.quick else given.texts
    batches = lm.batches(2 * texts // 8, 8, 32 if given.quick else 64)
    seen, other = batches[: len(batches) // 2], batches[len(batches) // 2 :]
    print_header(
        f"Conversion to LoRA of rank {given.rank}, {texts} texts seen and {texts} held out",
        "median error of a layer's outputs on held-out texts; ours over peft's: best, median, worst layer",
    )
    print(
        f"  {'method':<9}{'layers':>7}{'ours':>9}{'peft':>9}{'best':>9}{'median':>9}{'worst':>9}  higher on"
    )
    rows = []
    for method in METHODS:
        row = measure(lm, method, given.rank, seen, other)
        numbers = (row.ours, row.theirs, row.smallest_ratio, row.median_ratio, row.largest_ratio)
        shown = "".join(f"{number:9.4f}" for number in numbers)
        print(f"  {method:<9}{row.layers:>7}{shown}  {len(row.worse)} layers", flush=True)
        rows.append(row)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2), encoding="utf-8")
    return 1 if any(row.worse for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
