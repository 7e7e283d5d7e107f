"""Steps, refreshes and state of projected optimizers, beside AdamW and galore-torch.

python benchmarks/optimizers.py [--cases galore2,fira] [--rounds 7] [--json FILE] [--quick]

25.3 million parameters in the 56 matrices of a Llama-shaped model (hidden 512, 8 layers), rank 64. The floor
of a projected step is its two products, down and up, and fused AdamW on the small matrices. Gradients have
spectra that fall as 1 / k, so that a basis has something to find; a refresh meets gradients of which half is
new, and what its basis keeps of them is held against the exact one.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _measure import MEGA, Step, cpu_seconds, paired_ratios, print_header
from torch import Tensor, nn

import rankfold as rf

HIDDEN, INNER, LAYERS, RANK = 512, 1376, 8, 64
NEVER = 10**9
COLUMNS = ("optimizer", "step / floor", "step / fused AdamW", "refresh, CPU s", "state MB", "energy / exact")


def matrices(layers: int, hidden: int, inner: int) -> list[nn.Parameter]:
    """Return the weights of the linear layers of a Llama-shaped model."""
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(0.02 * torch.randn(*s, generator=generator)) for _ in range(layers) for s in shapes]


def falling(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return a matrix whose singular values fall about as 1 / k."""
    short = min(shape)
    left, right = (torch.randn(size, short, generator=generator) / size**0.5 for size in shape)
    return (left / torch.arange(1.0, short + 1)) @ right.T


Maker = Callable[[list[nn.Parameter], int], torch.optim.Optimizer]


def cases() -> dict[str, Maker]:
    """Return what is measured, by name: made from weights and the steps between two refreshes."""
    found: dict[str, Maker] = {
        "AdamW foreach": lambda p, gap: torch.optim.AdamW(p, lr=1e-4, foreach=True),
        "AdamW fused": lambda p, gap: torch.optim.AdamW(p, lr=1e-4, fused=True),
        "galore": lambda p, gap: rf.optim.galore(p, 1e-4, rank=RANK, refresh=gap),
        "galore2": lambda p, gap: rf.optim.galore2(p, 1e-4, rank=RANK, refresh=gap),
        "fira": lambda p, gap: rf.optim.fira(p, 1e-4, rank=RANK, refresh=gap, projector="randomized"),
        "frugal": lambda p, gap: rf.optim.frugal(p, 1e-4, density=RANK / HIDDEN, refresh=gap),
        "dct-projection": lambda p, gap: rf.optim.dct_projection(p, 1e-4, rank=RANK, refresh=gap),
        "dct-projection every step": lambda p, gap: rf.optim.dct_projection(p, 1e-4, rank=RANK),
        "sara-sampling": lambda p, gap: rf.optim.sara_sampling(p, 1e-4, rank=RANK, refresh=gap),
        "online-subspace-descent": lambda p, gap: rf.optim.online_subspace_descent(p, 1e-4, rank=RANK),
    }
    if find_spec("galore_torch") is not None:
        from galore_torch import GaLoreAdamW

        def peer(parameters: list[nn.Parameter], gap: int) -> torch.optim.Optimizer:
            group = {
                "params": parameters,
                "rank": RANK,
                "update_proj_gap": gap,
                "scale": 0.25,
                "proj_type": "std",
            }
            return GaLoreAdamW([group], lr=1e-4, no_deprecation_warning=True)  # type: ignore[no-any-return]

        found["galore-torch"] = peer
    return found


def floor_step(parameters: list[nn.Parameter]) -> Step:
    """Return a step of the two products and fused AdamW on the small matrices."""
    small = [nn.Parameter(torch.zeros(RANK, max(p.shape))) for p in parameters]
    bases = [torch.linalg.qr(torch.randn(min(p.shape), RANK)).Q for p in parameters]
    adam = torch.optim.AdamW(small, lr=1e-4, fused=True)

    @torch.no_grad()
    def step() -> None:
        for parameter, low, basis in zip(parameters, small, bases, strict=True):
            assert parameter.grad is not None
            wide = parameter.shape[0] < parameter.shape[1]
            low.grad = basis.T @ (parameter.grad if wide else parameter.grad.T)
        adam.step()
        for parameter, low, basis in zip(parameters, small, bases, strict=True):
            wide = parameter.shape[0] < parameter.shape[1]
            parameter.addmm_(*((basis, low) if wide else (low.T, basis.T)), alpha=-1e-4)

    return step


def state_megabytes(optimizer: torch.optim.Optimizer) -> float:
    """Return what an optimizer keeps, in megabytes; memory that several tensors share counts once."""
    found: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif hasattr(value, "__dict__"):
            for inner in vars(value).values():
                count(inner)

    for state in optimizer.state.values():
        for value in state.values():
            count(value)
    return sum(found.values()) / MEGA


@torch.no_grad()
def energy(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> float | None:
    """Return the energy of the gradients that the bases keep over that of the exact ones."""
    if not isinstance(optimizer, rf.optim.ProjectedOptimizer):
        return None
    kept, exact = 0.0, 0.0
    for parameter in parameters:
        assert parameter.grad is not None
        state = {
            k.removeprefix("basis."): v
            for k, v in optimizer.state[parameter].items()
            if k.startswith("basis.")
        }
        gradient = parameter.grad if parameter.shape[0] < parameter.shape[1] else parameter.grad.T
        basis = torch.linalg.qr(optimizer.projector.matrix(state, gradient)).Q
        kept += float((basis.T @ gradient).square().sum())
        exact += float(torch.linalg.svdvals(gradient)[:RANK].square().sum())
    return kept / exact


def give(parameters: list[nn.Parameter], gradients: list[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", help="some of the names, with commas between them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="one layer, two rounds")
    given = parser.parse_args()
    known = cases()
    wanted = given.cases.split(",") if given.cases else list(known)
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"no case is called {', '.join(unknown)}; there are {', '.join(known)}")
    layers, rounds = (1, 2) if given.quick else (LAYERS, given.rounds)
    parameters = matrices(layers, HIDDEN, INNER)
    generator = torch.Generator().manual_seed(1)
    first_gradients = [falling(parameter.shape, generator) for parameter in parameters]
    drifted = [known + falling(known.shape, generator) for known in first_gradients]
    numbers = sum(p.numel() for p in parameters) / MEGA
    print_header(
        "Projected optimizers", f"{numbers:.1f} million parameters in {len(parameters)} matrices, rank {RANK}"
    )
    print(" | ".join(COLUMNS))
    give(parameters, first_gradients)
    rows, floor = [], floor_step(parameters)
    fused = paired_ratios(floor, {"fused": known["AdamW fused"](parameters, NEVER).step}, rounds)["fused"]
    for name in wanted:
        give(parameters, first_gradients)
        optimizer = known[name](parameters, NEVER)
        first = cpu_seconds(optimizer.step)  # with a basis of its own
        plain = paired_ratios(floor, {name: optimizer.step}, rounds)[name]
        again = known[name](parameters, 1)
        again.step()
        give(parameters, drifted)
        refresh = None if "AdamW" in name else max(0.0, cpu_seconds(again.step) - cpu_seconds(optimizer.step))
        row = {
            "optimizer": name, "step_over_floor": plain, "step_over_fused": plain / fused, "first": first,
            "refresh": refresh, "state": state_megabytes(optimizer), "energy": energy(again, parameters),
        }  # fmt: skip
        rows.append(row)
        shown = [plain, plain / fused, refresh, row["state"], row["energy"]]
        print(" | ".join([name, *("-" if value is None else f"{value:.3g}" for value in shown)]))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
