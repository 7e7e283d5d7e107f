"""Squeezing by the factors' QR decompositions, over the decomposition of the dense product.

python benchmarks/squeeze.py [--size 4096] [--rank 64] [--target 8] [--rounds 5] [--json FILE] [--quick]

Plain: the best approximation of B A (size, rank) (rank, size), against B A and its SVD. Weighted: the one
under the Gram matrix of inputs, against the SVD of B A times the Gram matrix's root, root included. The dense
ways are timed once, ours by the median. Errors are relative to the change, in float64 from the factors.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _measure import cpu_seconds, print_header
from torch import Tensor

from rankfold.linalg import psd_root
from rankfold.methods.squeezing import terms_of

Factors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Row:
    name: str
    ours: float
    dense: float
    our_error: float
    dense_error: float

    @property
    def ratio(self) -> float:
        return self.dense / self.ours


def problem(size: int, rank: int) -> tuple[Factors, Tensor]:
    """Return factors whose product's singular values fall about as 1 / k, and inputs (n, size)."""
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(size, rank, generator=generator) / size**0.5 for _ in range(2))
    inputs = torch.randn(2 * rank, size, generator=generator) / torch.arange(1.0, size + 1).sqrt()
    return (up / torch.arange(1.0, rank + 1), down.T.contiguous()), inputs


def by_terms(factors: Factors, target: int, gram: Tensor | None) -> Factors:
    cut = terms_of(*factors, gram, target).at(target)
    return cut.up, cut.down


def by_the_product(factors: Factors, target: int, gram: Tensor | None) -> Factors:
    product = factors[0] @ factors[1]
    weighed = product if gram is None else product @ psd_root(gram)
    left = torch.linalg.svd(weighed, full_matrices=False)[0][:, :target]
    return left, left.T @ product


def error(factors: Factors, near: Factors, gram: Tensor | None) -> float:
    """Return ||(B A - X) C^(1/2)|| / ||B A C^(1/2)||, from the factors alone."""
    up, down = torch.cat([factors[0], -near[0]], 1).double(), torch.cat([factors[1], near[1]], 0).double()
    return norm(up, down, gram) / norm(factors[0].double(), factors[1].double(), gram)


def norm(up: Tensor, down: Tensor, gram: Tensor | None) -> float:
    triangle = torch.linalg.qr(up).R
    if gram is None:
        return float(torch.linalg.matrix_norm(triangle @ torch.linalg.qr(down.T).R.T))
    return float((triangle @ (down @ gram.double() @ down.T) @ triangle.T).trace()) ** 0.5


def measured(name: str, factors: Factors, target: int, gram: Tensor | None, rounds: int) -> Row:
    found: dict[str, Factors] = {}

    def run(way: Callable[[Factors, int, Tensor | None], Factors]) -> float:
        return cpu_seconds(lambda: found.update({way.__name__: way(factors, target, gram)}))

    run(by_terms)
    ours = statistics.median(run(by_terms) for _ in range(rounds))
    dense = run(by_the_product)
    errors = (error(factors, found[way.__name__], gram) for way in (by_terms, by_the_product))
    return Row(name, ours, dense, *errors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--target", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a matrix of 512 x 512")
    options = parser.parse_args()
    size = 512 if options.quick else options.size
    factors, inputs = problem(size, options.rank)
    gram = inputs.T @ inputs / len(inputs)
    print_header(
        f"Squeezing rank {options.rank} to {options.target} at {size} x {size}",
        "CPU seconds of the dense way over ours, and the relative error of either.",
    )
    rows = [
        measured("plain", factors, options.target, None, options.rounds),
        measured("weighted by inputs", factors, options.target, gram, options.rounds),
    ]
    print(f"{'':<20}{'ours, s':>10}{'dense, s':>10}{'dense / ours':>14}{'our error':>13}{'dense error':>13}")
    for row in rows:
        times = f"{row.ours:>10.3f}{row.dense:>10.2f}{row.ratio:>14.0f}"
        print(f"{row.name:<20}{times}{row.our_error:>13.8f}{row.dense_error:>13.8f}")
    if options.json:
        data = [{**asdict(row), "ratio": row.ratio} for row in rows]
        options.json.write_text(json.dumps(data, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
