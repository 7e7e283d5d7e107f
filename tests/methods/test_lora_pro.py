"""LoRA-Pro: the closest low-rank change to the weight's own gradient, and Adam on that."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Host
from methods._dynamic import LAYERS, runs_on
from methods._layers import normal
from methods._moving import (
    INPUTS,
    WANTED,
    Training,
    assert_ends,
    assert_resumes,
    dynamics_of,
    perceptron,
    recipe,
)
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.dynamics.lora_pro import LoraPro, closest, product_norm
from rankfold.methods.dynamics.owned import Gradients, gram

OUT, IN, RANK, SCALE = 9, 7, 3, 1.7
AdamW = torch.optim.AdamW


def random_gradients(factor: float = 1.0) -> tuple[Gradients, Tensor]:
    """Return random factors with the gradients that a random G gives them, and G."""
    up, down, full = factor * normal(OUT, RANK), normal(RANK, IN, seed=2) / factor, normal(OUT, IN, seed=3)
    return Gradients(up, down, SCALE * full @ down.mT, SCALE * up.mT @ full, SCALE), full


def induced(gradients: Gradients, update: tuple[Tensor, Tensor]) -> Tensor:
    """Return s B gA + s gB A."""
    return gradients.scale * (gradients.up @ update[1] + update[0] @ gradients.down)


def projected(gradients: Gradients, full: Tensor) -> Tensor:
    """Return G - (I - P_B) G (I - P_A)."""
    left = torch.eye(OUT) - gradients.up @ torch.linalg.pinv(gradients.up)
    right = torch.eye(IN) - torch.linalg.pinv(gradients.down) @ gradients.down
    return full - left @ full @ right


@pytest.mark.parametrize("seed", [None, 11, 12])
def test_the_weight_moves_along_the_projected_gradient_whatever_x_is(seed: int | None) -> None:
    gradients, full = random_gradients()
    to_up, to_down = closest(gradients, balance=False)
    x = torch.zeros(RANK, RANK).double() if seed is None else normal(RANK, RANK, seed=seed)
    update = (to_up - gradients.up @ x, to_down + x @ gradients.down)
    torch.testing.assert_close(induced(gradients, update), projected(gradients, full), rtol=0, atol=1e-12)
    balanced = closest(gradients)
    torch.testing.assert_close(induced(gradients, balanced), projected(gradients, full), rtol=0, atol=1e-12)


def test_nothing_of_the_form_of_a_low_rank_change_is_closer() -> None:
    gradients, full = random_gradients()
    best = (induced(gradients, closest(gradients)) - full).norm()
    for seed in range(5):
        other = tuple(
            step + 0.01 * normal(*step.shape, seed=seed + 20 * i) for i, step in enumerate(closest(gradients))
        )
        assert (induced(gradients, other) - full).norm() > best  # type: ignore[arg-type]


def test_x_solves_the_sylvester_equation_and_is_the_nearest_to_the_plain_gradients() -> None:
    gradients, _ = random_gradients()
    up, down = gradients.up, gradients.down
    plain, balanced = closest(gradients, balance=False), closest(gradients)
    x = (balanced[1] - plain[1]) @ torch.linalg.pinv(down)
    right = -torch.linalg.inv(up.mT @ up) @ gradients.to_down @ down.mT / SCALE**2
    torch.testing.assert_close(up.mT @ up @ x + x @ down @ down.mT, right)

    def distance(x: Tensor) -> Tensor:
        far_up, far_down = plain[0] - up @ x - gradients.to_up, plain[1] + x @ down - gradients.to_down
        return far_up.square().sum() + far_down.square().sum()

    for seed in range(5):
        assert distance(x + 0.01 * normal(RANK, RANK, seed=seed)) > distance(x)


def test_the_direction_of_the_weight_does_not_depend_on_how_the_product_is_split() -> None:
    first, _ = random_gradients()
    second, _ = random_gradients(5.0)
    torch.testing.assert_close(induced(first, closest(first)), induced(second, closest(second)))


def test_the_loss_falls_at_first_order_by_the_square_of_the_equivalent_gradient() -> None:
    gradients, _ = random_gradients()
    to_up, to_down = closest(gradients)
    slope = (gradients.to_up * to_up).sum() + (gradients.to_down * to_down).sum()
    torch.testing.assert_close(slope, induced(gradients, (to_up, to_down)).square().sum())
    assert slope > 0


def test_while_b_is_zero_a_stays_and_b_steps_in_the_metric_of_a() -> None:
    full, down = normal(OUT, IN, seed=3), normal(RANK, IN, seed=2)
    zero = torch.zeros(OUT, RANK).double()
    to_up, to_down = closest(
        Gradients(zero, down, SCALE * full @ down.mT, torch.zeros(RANK, IN).double(), SCALE)
    )
    assert not to_down.any()
    torch.testing.assert_close(to_up, full @ down.mT @ torch.linalg.inv(down @ down.mT) / SCALE)


def test_damping_is_relative_to_the_trace() -> None:
    factor = normal(OUT, RANK)
    inverse = gram(factor, 0.1).inverse
    mean = factor.square().sum() / RANK
    torch.testing.assert_close(inverse, torch.linalg.inv(factor.mT @ factor + 0.1 * mean * torch.eye(RANK)))
    torch.testing.assert_close(gram(1e-6 * factor, 0.1).inverse, 1e12 * inverse)


def test_a_direction_of_zero_norm_is_left_out_and_not_divided_by() -> None:
    gradients, _ = random_gradients()
    gradients.up[:, 1] = gradients.up[:, 0]
    steps = closest(gradients)
    assert all(torch.isfinite(step).all() for step in steps)


def stepped(training: Training) -> tuple[Tensor, Gradients, Tensor]:
    """Take one step; return the first layer's factors before it and the weight's gradient."""
    pair = training.pair
    training.gradients()
    assert pair.up.grad is not None
    assert pair.down.grad is not None
    before = Gradients(
        pair.up.detach().clone(), pair.down.detach().clone(),
        pair.up.grad.clone(), pair.down.grad.clone(), pair.scale,
    )  # fmt: skip
    change = pair.change()
    training.optimizer.step()
    return change, before, pair.change()


def test_a_step_is_adams_on_the_equivalent_gradient_solved_again() -> None:
    training = Training(recipe("lora-pro", ("lora", {"alpha": 3.0}), damping=0.0), make=AdamW, lr=1e-3)
    for group in training.optimizer.param_groups:
        group["weight_decay"] = 0.01
    mean = square = 0.0
    for step in range(1, 5):
        _, before, _ = stepped(training)
        gradient = induced(before, closest(before, balance=False))
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = mean / (1 - 0.9**step) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        to_up, to_down = before.scale * direction @ before.down.mT, before.scale * before.up.mT @ direction
        to_up, to_down = closest(Gradients(before.up, before.down, to_up, to_down, before.scale))
        torch.testing.assert_close(training.pair.up.detach(), before.up - 1e-3 * (to_up + 0.01 * before.up))
        wanted = before.down - 1e-3 * (to_down + 0.01 * before.down)
        torch.testing.assert_close(training.pair.down.detach(), wanted)


def test_the_optimizer_moves_the_factors_no_further_and_everything_else_itself() -> None:
    training = Training(recipe("lora-pro", "dora"), make=AdamW)
    training.run(3)
    for pair in training.started.pairs:
        assert pair.up.grad is None
        assert pair.up not in training.optimizer.state
    magnitude = training.model[0].expression.magnitude.tensor()  # type: ignore[index]
    assert "exp_avg" in training.optimizer.state[magnitude]


def test_the_state_is_two_full_matrices_a_weight_in_float32_or_better() -> None:
    model = perceptron(torch.bfloat16)
    training = Training(
        recipe("lora-pro"), model=model, make=AdamW, inputs=INPUTS.bfloat16(), wanted=normal(24, 6).bfloat16()
    )
    training.run(2)
    memory = training.memory("lora-pro")
    assert {k: (v.shape, v.dtype) for k, v in memory.items() if isinstance(v, Tensor)} == {
        "mean": ((10, 12), torch.float32),
        "square": ((10, 12), torch.float32),
    }
    assert training.pair.up.dtype == training.model[0].expression.leaf("up").value.dtype  # type: ignore[index]


def test_it_falls_faster_than_lora_when_both_have_their_best_rate() -> None:
    def best(names: tuple[str, ...]) -> float:
        point = rf.Recipe("lora", dynamics=tuple((name, {}) for name in names))
        losses = []
        for rate in (3e-3, 1e-2, 3e-2):
            model = rf.adapt(perceptron(), point, rank=2, targets="all-linear")
            optimizer = AdamW(rf.param_groups(model, lr=rate))
            with rf.attach(model, optimizer):
                for _ in range(40):
                    optimizer.zero_grad()
                    loss = (model(INPUTS) - WANTED).square().mean()
                    loss.backward()
                    optimizer.step()
            losses.append(float(loss.detach()))
        return min(losses)

    assert best(("lora-pro",)) < best(())


def test_the_norm_of_a_product_is_found_from_its_factors() -> None:
    left, right = normal(OUT, 4), normal(4, IN, seed=2)
    torch.testing.assert_close(product_norm(left, right), (left @ right).norm())


@pytest.mark.parametrize("size", [0.01, 1e6])
def test_clipping_scales_the_equivalent_gradients_of_all_weights_together(size: float) -> None:
    training = Training(recipe("lora-pro", max_norm=size, damping=0.0), make=AdamW)
    training.gradients()
    pairs = training.started.pairs
    equivalents = []
    for pair in pairs:
        assert pair.up.grad is not None
        assert pair.down.grad is not None
        now = Gradients(
            pair.up.detach(), pair.down.detach(), pair.up.grad.clone(), pair.down.grad.clone(), pair.scale
        )
        equivalents.append(induced(now, closest(now, balance=False)))
    training.optimizer.step()
    norm = float(torch.stack([e.norm() for e in equivalents]).norm())
    for pair, equivalent in zip(pairs, equivalents, strict=True):
        training.started.enter("lora-pro")
        wanted = 0.1 * equivalent * min(1.0, size / (norm + 1e-6))
        torch.testing.assert_close(training.started.memory(pair.key)["mean"], wanted)


def test_maximising_climbs_where_minimising_falls() -> None:
    def climbing(parameters: Any) -> AdamW:
        return AdamW(parameters, maximize=True)

    training = Training(recipe("lora-pro"), make=climbing, lr=1e-3)
    assert training.run(1) < training.run(20)


@pytest.mark.parametrize("structure", ["lora", "dora"])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_training_resumes_bit_for_bit(structure: str, init: str, tmp_path: Path) -> None:
    assert_resumes(recipe("lora-pro", structure, init), tmp_path, make=AdamW)


def test_what_was_trained_folds_and_is_taken_away() -> None:
    training = Training(recipe("lora-pro"), make=AdamW)
    training.run(12)
    assert_ends(training)


def test_a_product_without_gradients_is_left_alone() -> None:
    training = Training(recipe("lora-pro"), make=AdamW)
    training.run(2)
    before = copy.deepcopy(training.memory("lora-pro"))
    training.gradients()
    training.pair.up.grad = training.pair.down.grad = None
    training.optimizer.step()
    after = training.memory("lora-pro")
    assert after["steps"] == before["steps"] == 2
    assert torch.equal(after["mean"], before["mean"])


@pytest.mark.parametrize("options", [{"damping": -1.0}, {"max_norm": 0.0}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match=f"lora-pro: {next(iter(options))} must be"):
        LoraPro(**options)  # type: ignore[arg-type]


def attached(point: Any, make: Any, **arguments: Any) -> None:
    model = rf.adapt(nn.Sequential(nn.Linear(8, 8)), point, rank=2, targets="0")
    rf.attach(model, make(rf.param_groups(model, lr=1e-3, weight_decay=0.1), **arguments))


@pytest.mark.parametrize("name", ["lora-pro", "loft"])
def test_an_optimizer_whose_step_cannot_be_taken_over_is_refused(name: str) -> None:
    with pytest.raises(
        Incompatible, match=f"{name} takes Adam's step .* cannot do for SGD; use torch.optim.Adam"
    ):
        attached(f"lora/{name}", torch.optim.SGD)
    with pytest.raises(Incompatible, match="use amsgrad=False"):
        attached(f"lora/{name}", AdamW, amsgrad=True)
    with pytest.raises(Incompatible, match=r"use torch\.optim\.AdamW or weight_decay=0"):
        attached(f"lora/{name}", torch.optim.Adam)
    with pytest.raises(Incompatible, match=r"0: .* works without dropout"):
        attached(recipe(name, ("lora", {"dropout": 0.1})), AdamW)


@pytest.mark.parametrize("name", ["lora-pro", "loft"])
@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        (
            "lora-xs/{}",
            "acts on a product of two trained factors that is a term of the weight, and lora-xs has none",
        ),
        ("hira/{}", "hira has none"),
        ("lora/adalora/{}", "needs the factors alone, and adalora puts a gate between them"),
        ("lora/lora+/{}", "undo each other's effect"),
        ("lora/relora/{}", "undo each other's effect"),
    ],
)
def test_points_that_make_no_sense_are_refused(name: str, point: str, sentence: str) -> None:
    with pytest.raises(Incompatible, match=sentence):
        rf.adapt(perceptron(), point.format(name), rank=2, targets="all-linear")


def test_two_methods_that_take_the_step_are_refused_together() -> None:
    with pytest.raises(Incompatible, match="both replace the optimizer's step"):
        rf.adapt(perceptron(), "lora/lora-pro/loft", rank=2, targets="all-linear")


def test_dora_from_eva_is_accepted() -> None:
    model = rf.adapt(perceptron(), "dora/init=eva/lora-pro", rank=2, targets="all-linear", data=[INPUTS])
    training = Training(model, make=AdamW)
    assert dynamics_of(training, "lora-pro")
    assert training.run(1) > training.run(20)


@pytest.mark.parametrize("host", LAYERS, ids=lambda host: host.name)
def test_every_kind_of_layer_learns(host: Host) -> None:
    runs_on("lora/lora-pro", host)
