"""Compression: time per method over plain exact decompositions, and what the randomised solver gives.

python benchmarks/compress.py [--rounds 3] [--quick]

First: a Llama (hidden 512, 2 layers, 14 linears), keep 0.5, calibrated on 4 x 256 tokens; CPU time of every
method over that of `svd` with exact decompositions, statistics included. Then: the 7 linears of a layer of
hidden 2048 and intermediate 5504, whose weights have singular values that fall as 1 / sqrt(i), with the exact
and with the randomised solver: times, the error of the outputs, and the perplexity of a model of that layer.
"""

import argparse
import copy
from collections.abc import Mapping
from typing import Any

import torch
from _llama import SMALL, Size, build
from _measure import cpu_seconds, paired_ratios, print_header
from torch import Tensor, nn

import rankfold as rf

LARGE = Size(hidden=2048, intermediate=5504, layers=1, heads=16, vocabulary=256, batch=8, length=256)
QUICK = Size(hidden=64, intermediate=96, layers=1, heads=4, vocabulary=64, batch=2, length=64)
METHODS: Mapping[str, Mapping[str, Any]] = {
    "svd, randomised": {"method": "svd", "solver": "randomised"},
    "svd, shares by error": {"method": "svd", "share": "error"},
    "welore": {"method": "welore"},
    "fwsvd": {"method": "fwsvd"},
    "asvd": {"method": "asvd"},
    "svd-llm": {"method": "svd-llm"},
    "svd-llm, randomised": {"method": "svd-llm", "solver": "randomised"},
    "svd-llm, sequential": {"method": "svd-llm", "calibration": "sequential"},
    "lord": {"method": "lord"},
}


def batches(size: Size, count: int = 1) -> list[dict[str, Tensor]]:
    """Return random tokens, one sequence at a time, with labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(size.vocabulary, (count * size.batch, size.length), generator=generator)
    return [{"input_ids": row[None], "labels": row[None]} for row in rows]


def compressed(
    model: nn.Module, data: list[dict[str, Tensor]], keep: float, method: str, **options: Any
) -> nn.Module:
    """Return a compressed copy."""
    twin = copy.deepcopy(model)
    given = {} if method in ("svd", "welore") else {"data": data, "few_tokens": "allow"}
    return rf.compress(twin, method, keep=keep, progress=False, **given, **options)


def methods(size: Size, rounds: int) -> None:
    """Print the times of the methods over that of plain exact decompositions."""
    model, data = build(size), batches(size)
    steps = {
        name: lambda options=options: compressed(model, data, 0.5, **options)  # type: ignore[misc]
        for name, options in METHODS.items()
    }
    floor = cpu_seconds(lambda: compressed(model, data, 0.5, "svd"))
    print(f"plain exact decompositions: {floor:.2f} s\n\n| method | time / svd |\n| --- | --- |")
    for name, ratio in paired_ratios(lambda: compressed(model, data, 0.5, "svd"), steps, rounds).items():
        print(f"| {name} | {ratio:.2f} |")


@torch.no_grad()
def spectra(model: nn.Module) -> None:
    """Let singular values fall as 1 / sqrt(i), as those of trained weights do at first."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features > 256:
            columns = torch.arange(1.0, module.in_features + 1).rsqrt()
            order = torch.randperm(module.in_features, generator=torch.Generator().manual_seed(1))
            module.weight.mul_(columns[order] * 8)


@torch.no_grad()
def perplexity(model: nn.Module, data: list[dict[str, Tensor]]) -> float:
    """Return that of random tokens."""
    return float(torch.stack([model(**batch).loss for batch in data]).mean().exp())


def measured(
    model: nn.Module, data: list[dict[str, Tensor]], keep: float, **options: Any
) -> tuple[float, ...]:
    """Return seconds, mean error and perplexity of a compressed copy."""
    reports: list[Any] = []
    found: list[nn.Module] = []

    def step() -> None:
        found.append(compressed(model, data, keep, report=reports.append, **options))

    seconds, rows = cpu_seconds(step), reports[0].rows
    return seconds, sum(row.error for row in rows) / len(rows), perplexity(found[0], data)


def solvers(size: Size) -> None:
    """Print times, errors and perplexities of the two solvers."""
    model, data = build(size), batches(size)
    spectra(model)
    print("\n| method | keep | exact, s | randomised, s | exact / randomised | errors | perplexities |")
    print(f"| --- |{' --- |' * 6}\n| as it was | 1 | | | | | {perplexity(model, data):.2f} |")
    for method in ("svd", "svd-llm"):
        for keep in (0.5, 0.1):
            exact, fast = (
                measured(model, data, keep, method=method, solver=solver)
                for solver in ("exact", "randomised")
            )
            cells = [f"{exact[0]:.1f}", f"{fast[0]:.1f}", f"{exact[0] / fast[0]:.1f}"]
            cells += [f"{exact[1]:.4f}, {fast[1]:.4f}", f"{exact[2]:.2f}, {fast[2]:.2f}"]
            print(f"| {method} | {keep:g} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small layers, to see that it runs")
    arguments = parser.parse_args()
    print_header("Compression", "CPU seconds; ratios are medians of pairs")
    methods(QUICK if arguments.quick else SMALL, 1 if arguments.quick else arguments.rounds)
    solvers(QUICK if arguments.quick else LARGE)


if __name__ == "__main__":
    main()
