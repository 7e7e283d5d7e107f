"""ALLoRA: the rows of B learn at rates that fall with the row norms of the change."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import Host
from methods._dynamic import LAYERS, runs_on
from methods._layers import normal
from methods._moving import Training, assert_ends, assert_resumes, dynamics_of, perceptron, recipe

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.dynamics.allora import Allora

SGD = torch.optim.SGD


def test_the_multiplier_of_a_row_is_the_formulas() -> None:
    training = Training(recipe("allora", init="pissa", eta=2.0), make=SGD)
    training.pair.up.data = normal(10, 2)
    norms = training.pair.change().norm(dim=1)
    multipliers = dynamics_of(training, "allora").multipliers(training.pair)
    torch.testing.assert_close(multipliers, 1 / (norms + 1 / 4).sqrt())


def test_the_norm_is_that_of_the_product_behind_its_gate() -> None:
    training = Training(rf.Recipe("lora", "olora", ranks="adalora", dynamics=(("allora", {}),)), rank=3)
    training.pair.up.data = normal(*training.pair.up.shape)
    assert training.pair.gate is not None
    training.pair.gate.data[:] = torch.arange(training.pair.rank)
    norms = training.pair.change().norm(dim=1)
    multipliers = dynamics_of(training, "allora").multipliers(training.pair)
    torch.testing.assert_close(multipliers, 1 / (norms + 1 / 9).sqrt())


@pytest.mark.parametrize("make", [SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("eta", [1.0, 4.0])
def test_at_b_zero_the_step_of_b_is_eta_times_the_plain_one_and_that_of_a_is_the_plain_one(
    make: Any, eta: float
) -> None:
    training, plain = (
        Training(recipe("allora", eta=eta), make=make),
        Training(recipe("lora+", ratio=1.0), make=make),
    )
    start = training.pair.down.detach().clone()
    training.run(1)
    plain.run(1)
    torch.testing.assert_close(training.pair.up.detach(), eta * plain.pair.up.detach())
    torch.testing.assert_close(training.pair.down.detach(), plain.pair.down.detach())
    assert torch.equal(training.pair.down, start)


def test_doubling_a_row_of_b_changes_only_that_rows_multiplier() -> None:
    training = Training(recipe("allora", eta=2.0), make=SGD)
    training.pair.up.data = normal(10, 2)
    method, norm = dynamics_of(training, "allora"), training.pair.change().norm(dim=1)[3]
    before = method.multipliers(training.pair)
    training.pair.up.data[3] *= 2
    after = method.multipliers(training.pair)
    torch.testing.assert_close(after[3] / before[3], ((norm + 0.25) / (2 * norm + 0.25)).sqrt())
    others = torch.arange(10) != 3
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW])
def test_every_step_of_b_is_scaled_row_by_row_by_the_norms_before_it(make: Any) -> None:
    training = Training(recipe("allora", init="pissa"), make=make)
    plain: list[torch.Tensor] = []

    def look(*_: Any) -> None:
        plain.append(training.pair.up.detach().clone())

    hook = training.optimizer.register_step_post_hook(look)
    training.optimizer._optimizer_step_post_hooks.move_to_end(hook.id, last=False)
    for _ in range(3):
        training.gradients()
        before = training.pair.up.detach().clone()
        multipliers = dynamics_of(training, "allora").multipliers(training.pair)
        training.optimizer.step()
        wanted = before + multipliers[:, None] * (plain[-1] - before)
        torch.testing.assert_close(training.pair.up.detach(), wanted)
        assert not torch.equal(training.pair.up, plain[-1])


def test_the_forward_pass_and_the_gradients_are_loras_to_the_last_bit() -> None:
    training, plain = (
        Training(recipe("allora", init="pissa")),
        Training(rf.Recipe("lora", "pissa", dynamics=("lora+",))),
    )
    assert torch.equal(training.function(), plain.function())
    assert training.gradients() == plain.gradients()
    for ours, theirs in zip(training.model.parameters(), plain.model.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_nothing_is_remembered_between_steps() -> None:
    training = Training(recipe("allora"))
    training.run(3)
    assert training.memory("allora") == {}


@pytest.mark.parametrize("make", [SGD, torch.optim.AdamW])
@pytest.mark.parametrize("structure", ["lora", "dora"])
def test_training_resumes_bit_for_bit(structure: str, make: Any, tmp_path: Path) -> None:
    assert_resumes(recipe("allora", structure, "pissa"), tmp_path, make=make)


def test_a_rank_rule_can_drop_terms_beside_it() -> None:
    model = rf.adapt(perceptron(), "lora/olora/sora/allora", rank=4, targets="all-linear")
    training = Training(model, lr=3e-3)
    assert training.run(1) > training.run(30)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_what_was_trained_folds_and_is_taken_away() -> None:
    training = Training(recipe("allora"))
    training.run(12)
    assert_ends(training)


def test_alpha_and_dropout_are_refused() -> None:
    for act in (rf.adapt, rf.plan):
        model = perceptron()
        with pytest.raises(Incompatible, match=r"0: allora works without alpha, and .* is scaled by 4"):
            act(model, "lora/allora", rank=2, targets="all-linear", alpha=8.0)
        with pytest.raises(Incompatible, match="0: allora works without dropout"):
            act(model, "lora/allora", rank=2, targets="all-linear", dropout=0.1)
        assert type(model[0]) is torch.nn.Linear  # type: ignore[index]


def test_an_eta_that_is_not_positive_is_refused() -> None:
    with pytest.raises(InvalidOption, match="eta must be positive, not 0"):
        Allora(eta=0.0)


def test_a_structure_without_a_product_is_refused() -> None:
    with pytest.raises(Incompatible, match="lora-xs has none"):
        rf.adapt(perceptron(), "lora-xs/allora", rank=2, targets="all-linear")


def test_it_falls_faster_than_lora_over_a_few_steps() -> None:
    assert Training(recipe("allora")).run(30) < Training(recipe("lora+", ratio=1.0)).run(30)


@pytest.mark.parametrize("host", LAYERS, ids=lambda host: host.name)
def test_every_kind_of_layer_learns(host: Host) -> None:
    runs_on("lora/allora", host)
