"""HD-PiSSA: bands of singular triplets, whose steps are summed over processes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from methods._frames import holding
from methods._layers import adapted, base, change, leaves_of, normal, rank_of
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank

OUT, IN, RANK = 14, 12, 2
POINT = "lora/dynamics=hd-pissa"


def matrix() -> Tensor:
    return normal(OUT, IN)


def banded(band: int | None = None, bands: int | None = None, **options: Any) -> nn.Module:
    recipe = rf.Recipe("lora", ("hd-pissa", {"band": band, "bands": bands}), dynamics=("hd-pissa",))
    return adapted(recipe, holding(matrix()), rank=RANK, **options)


def batch(number: int, step: int = 0) -> tuple[Tensor, Tensor]:
    return normal(20, IN, seed=100 * step + number), normal(20, OUT, seed=1000 + 100 * step + number)


class Training:
    """One process's training."""

    def __init__(
        self, model: nn.Module, kind: Any = torch.optim.SGD, lr: float = 0.05, state: Any = None
    ) -> None:
        self.model = model
        self.optimizer = kind(rf.param_groups(model, lr=lr))
        if state is not None:
            self.optimizer.load_state_dict(state)
        self.handle = rf.attach(model, self.optimizer)

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        ((self.model(x) - y).square().sum() / len(x)).backward()
        self.optimizer.step()


# The bands ----------------------------------------------------------------------------------------------


def test_the_bands_are_the_weights_singular_triplets_one_after_another() -> None:
    values = torch.linalg.svdvals(matrix())
    for band in range(3):
        leaves = leaves_of(banded(band, 3, alpha=6))
        torch.testing.assert_close(leaves["up"].norm(dim=0) ** 2, values[2 * band : 2 * band + 2] / 3)
        torch.testing.assert_close(leaves["down"].norm(dim=1), leaves["up"].norm(dim=0))


def test_bands_are_orthogonal_and_sum_to_the_best_approximation() -> None:
    leaves = [leaves_of(banded(band, 3)) for band in range(3)]
    for one in range(3):
        for other in range(one):
            assert (leaves[one]["up"].T @ leaves[other]["up"]).abs().max() < 1e-12
            assert (leaves[one]["down"] @ leaves[other]["down"].T).abs().max() < 1e-12
    total = sum(each["up"] @ each["down"] for each in leaves)
    left, values, right = torch.linalg.svd(matrix(), full_matrices=False)
    torch.testing.assert_close(total, left[:, :6] * values[:6] @ right[:6])


def test_every_band_starts_at_the_base() -> None:
    for band in range(3):
        x = normal(5, IN)
        torch.testing.assert_close(banded(band)(x), holding(matrix())(x))


def test_without_other_processes_the_band_is_pissas() -> None:
    alone, pissa = (adapted(p, holding(matrix()), rank=RANK) for p in (POINT, "lora/pissa"))
    assert torch.equal(leaves_of(alone)["up"], leaves_of(pissa)["up"])
    assert torch.equal(leaves_of(alone)["down"], leaves_of(pissa)["down"])


def test_bands_that_the_weight_cannot_hold_are_refused() -> None:
    with pytest.raises(
        InvalidRank, match=r"0: hd-pissa needs 7 bands of rank 2, more than min\(out, in\) = 12"
    ):
        banded(0, 7)
    with pytest.raises(InvalidOption, match=r"hd-pissa: band must be in 0..2, not 3"):
        banded(3, 3)
    banded(5, 6)


def test_the_start_is_refused_without_the_dynamics() -> None:
    with pytest.raises(Incompatible, match="makes sense with the dynamics hd-pissa only"):
        adapted("lora/init=hd-pissa", rank=2)


# One process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [2, 6])
def test_a_step_moves_the_weight_by_the_steps_of_both_factors(alpha: float) -> None:
    model, scaling, rate = banded(1, 3, alpha=alpha), alpha / RANK, 0.05
    leaves = {name: leaves_of(model)[name].detach().clone() for name in ("up", "down")}
    x, y = batch(0)
    gradient = 2 * ((x @ matrix().T + model[0].bias - y).T @ x / len(x)).detach()
    Training(model).step(x, y)
    up = leaves["up"] - rate * scaling * gradient @ leaves["down"].T
    down = leaves["down"] - rate * scaling * leaves["up"].T @ gradient
    expected = scaling * (up @ down - leaves["up"] @ leaves["down"])
    torch.testing.assert_close(change(model), expected)
    assert rank_of(change(model)) == 2 * RANK


def test_after_every_step_the_factors_are_at_their_start_and_the_forward_is_that_of_the_weight() -> None:
    model = banded(alpha=6)
    training, start = Training(model, torch.optim.Adam), leaves_of(model)["up"].detach().clone()
    for step in range(4):
        training.step(*batch(0, step))
        leaves, x = leaves_of(model), normal(5, IN)
        assert torch.equal(leaves["up"], start)
        assert torch.equal(leaves["up"], leaves["up.start"])
        assert torch.equal(leaves["down"], leaves["down.start"])
        torch.testing.assert_close(model(x), x @ leaves["base"].T + model[0].bias)
    assert torch.equal(base(model), matrix())
    assert all(state["exp_avg"].norm() > 0 for state in training.optimizer.state.values())


def test_the_products_of_both_steps_let_the_rank_of_the_change_grow() -> None:
    model = banded()
    training, ranks = Training(model, torch.optim.Adam), []
    for step in range(4):
        training.step(*batch(0, step))
        ranks.append(rank_of(change(model)))
    assert ranks == [4, 6, 8, 10]


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("structure", ["lora", "dora"])
def test_factors_from_other_starts_train_the_weight_too(structure: str, init: str) -> None:
    model = adapted(f"{structure}/{init}/dynamics=hd-pissa", holding(matrix()), rank=RANK)
    training, x = Training(model, torch.optim.Adam, lr=1e-2), normal(5, IN)
    before = {name: leaves_of(model)[name].detach().clone() for name in ("up", "down")}
    torch.testing.assert_close(model(x), holding(matrix())(x))
    losses = []
    for _ in range(8):
        training.step(*batch(0))
        losses.append((model(batch(0)[0]) - batch(0)[1]).square().sum().item())
    assert losses == sorted(losses, reverse=True)
    for name, value in before.items():
        assert torch.equal(leaves_of(model)[name], value)


def test_weight_decay_on_the_factors_is_refused() -> None:
    model = banded()
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=0.1, weight_decay=0.01))
    with pytest.raises(
        Incompatible, match="weight decay on them would take the same part of the weight away"
    ):
        rf.attach(model, optimizer)


@pytest.mark.parametrize("other", ["relora", "periodic-lora", "dynamics=switchlora"])
def test_dynamics_that_change_the_factors_themselves_are_refused(other: str) -> None:
    with pytest.raises(Incompatible, match="undo each other's effect"):
        adapted(f"{POINT}/{other}", rank=2)


@pytest.mark.parametrize("point", [POINT, f"{POINT}/kaiming", "dora/pissa/dynamics=hd-pissa"])
def test_continuing_from_files_is_training_that_never_stopped(point: str, tmp_path: Path) -> None:
    training = Training(adapted(point, holding(matrix()), rank=RANK), torch.optim.Adam)
    for step in range(9):
        training.step(*batch(0, step))
        if step == 4:
            rf.save(training.model, tmp_path / "half")
            file = io.BytesIO()
            torch.save(training.optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    again = Training(rf.load(holding(matrix()), tmp_path / "half"), torch.optim.Adam, state=state)
    for step in range(5, 9):
        again.step(*batch(0, step))
    assert torch.equal(again.model(normal(5, IN)), training.model(normal(5, IN)))
    rf.remove(training.model)
    assert torch.equal(training.model(normal(5, IN)), holding(matrix())(normal(5, IN)))


# Several processes --------------------------------------------------------------------------------------

COUNT, STEPS = 2, 3


def _process(number: int, folder: str) -> None:
    """Train in one of several processes and leave the results in a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=number, world_size=COUNT
    )
    try:
        model = adapted("dora/dynamics=hd-pissa", holding(matrix()), rank=RANK)
        training, found = Training(model), []
        for step in range(STEPS):
            training.step(*batch(number, step))
            found.append({name: value.detach().clone() for name, value in leaves_of(model).items()})
        torch.save(found, f"{folder}/{number}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    """Return what every process holds after every step."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.start_processes(_process, (str(folder),), nprocs=COUNT, start_method="fork")
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(COUNT)]


def test_processes_take_bands_of_their_own(processes: Any) -> None:
    first, second = (found[-1] for found in processes)
    assert (first["up"].T @ second["up"]).abs().max() < 1e-12
    assert first["up"].norm() > second["up"].norm()


def test_all_processes_hold_the_same_weight_after_every_step(processes: Any) -> None:
    for first, second in zip(*processes, strict=True):
        assert torch.equal(first["base"], second["base"])
        assert torch.equal(first["magnitude"], second["magnitude"])


def test_one_step_has_twice_the_rank_of_all_bands_together(processes: Any) -> None:
    moved = [found["base"] for found in processes[0]]
    assert rank_of(moved[0] - matrix()) == 2 * RANK * COUNT
    assert rank_of(moved[1] - moved[0]) == 2 * RANK * COUNT


def test_a_step_is_the_sum_of_what_every_band_would_do_alone(processes: Any) -> None:
    changes, magnitudes = [], []
    for number in range(COUNT):
        recipe = rf.Recipe("dora", ("hd-pissa", {"band": number, "bands": COUNT}), dynamics=("hd-pissa",))
        model = adapted(recipe, holding(matrix()), rank=RANK)
        Training(model).step(*batch(number))
        changes.append(leaves_of(model)["base"] - matrix())
        magnitudes.append(leaves_of(model)["magnitude"].detach())
    found = processes[0][0]
    torch.testing.assert_close(found["base"] - matrix(), sum(changes))
    torch.testing.assert_close(found["magnitude"], torch.stack(magnitudes).mean(0))
