"""ReLoRA: merged and restarted, the change gains rank."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import normal, rank_of
from methods._moving import Training, assert_ends, assert_resumes, dynamics_of, event, perceptron, recipe
from torch import nn

import rankfold as rf
from rankfold.errors import InvalidOption, UnsupportedLayer
from rankfold.methods.dynamics.relora import jagged_cosine, restart
from rankfold.optim import moments
from rankfold.weights import Moved


def relora(structure: Any = "lora", init: Any = None, **options: Any) -> rf.Recipe:
    return recipe("relora", structure, init, **{"interval": 5, "warmup": 0, **options})


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
@pytest.mark.parametrize("structure", ["lora", "dora", ("lora", {"alpha": 6.0, "dropout": 0.5})])
def test_a_restart_leaves_the_function_unchanged(structure: Any, init: str) -> None:
    training = Training(relora(structure, init))
    training.run(3)
    training.model.eval()
    dynamics_of(training, "relora")
    assert training.pair.up.norm() > 0
    before, after = event(training, lambda: restart(training.started, training.pair))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
    assert not training.pair.up.any()
    assert training.pair.down.abs().max() <= 1 / math.sqrt(12)


def test_a_restart_merges_terms_behind_gates_and_leaves_closed_ones_alone() -> None:
    training = Training(
        rf.Recipe("lora", "random", ranks="adalora", dynamics=(("relora", {"interval": 50, "warmup": 0}),)),
        rank=4,
    )
    training.run(4)
    dynamics_of(training, "relora")
    pair = training.pair
    pair.gate.data[1] = 0
    pair.gate.data[0] = 0.7
    up, down = pair.up[:, 1].clone(), pair.down[1].clone()
    before, after = event(training, lambda: restart(training.started, pair))
    torch.testing.assert_close(after, before, atol=1e-12, rtol=0)
    assert torch.equal(pair.up[:, 1], up)
    assert torch.equal(pair.down[1], down)
    assert not pair.up[:, 0].any()


@pytest.mark.parametrize("restarts", [0, 1, 2, 3])
def test_after_k_restarts_the_rank_of_the_change_is_that_of_k_plus_one_adapters(restarts: int) -> None:
    training = Training(relora())
    training.run(5 * restarts + 3)
    assert rank_of(training.moved()) == min(2 * (restarts + 1), 10)


def test_right_after_a_restart_the_rank_is_that_of_what_was_merged_and_at_most_the_weights() -> None:
    for restarts, rank in ((1, 2), (2, 4), (7, 10)):
        training = Training(relora())
        training.run(5 * restarts)
        assert rank_of(training.moved()) == rank


def test_a_residual_start_stays_subtracted_and_adds_its_rank_once() -> None:
    training = Training(relora(init="pissa"))
    training.run(5)
    assert rank_of(training.moved()) == 4
    training.run(5)
    assert rank_of(training.moved()) == 6


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("prune", [0.0, 0.5, 0.9])
def test_a_restart_prunes_exactly_the_asked_share_of_every_moment_at_the_same_entries(
    prune: float, magnitude: bool
) -> None:
    training = Training(relora(init="pissa", prune=prune, magnitude=magnitude), rank=4)
    training.run(4)
    before = {k: v.clone() for k, v in moments(training.optimizer, training.pair.up).items()}
    method = dynamics_of(training, "relora")
    with torch.no_grad():
        method.prune_moments(training.started, training.pair)
    for factor in (training.pair.up, training.pair.down):
        kept = moments(training.optimizer, factor)
        zeros = [value == 0 for value in kept.values()]
        assert all(torch.equal(zeros[0], other) for other in zeros)
        assert int(zeros[0].sum()) == round(prune * factor.numel())
    after = moments(training.optimizer, training.pair.up)
    survives = after["exp_avg"] != 0
    assert torch.equal(after["exp_avg"][survives], before["exp_avg"][survives])
    if magnitude and prune:
        assert before["exp_avg_sq"][survives].min() > before["exp_avg_sq"][~survives].max()


def test_a_full_reset_starts_the_step_count_again() -> None:
    training = Training(relora(prune=1.0))
    training.run(5)
    state = training.optimizer.state[training.pair.down]
    assert not state["exp_avg"].any()
    assert int(state["step"]) == 0


@pytest.mark.parametrize("prune", [1.0, 0.999])
def test_the_first_step_after_a_restart_moves_only_the_output_factor(prune: float) -> None:
    training = Training(relora(prune=prune))
    training.run(5)
    up, down = training.pair.up.detach().clone(), training.pair.down.detach().clone()
    training.run(1)
    assert not training.pair.down.grad.any()
    assert torch.equal(training.pair.down, down)
    assert not torch.equal(training.pair.up, up)


def test_moments_that_survive_never_make_a_step_larger_than_a_few_learning_rates() -> None:
    # Moments pruned apart from each other would step by m / eps.
    training = Training(relora(prune=0.5), rank=4)
    training.run(5)
    for _ in range(3):
        before = training.pair.down.detach().clone()
        training.run(1)
        assert (training.pair.down - before).abs().max() < 20 * 1e-2


def test_after_a_restart_the_learning_rate_is_zero_and_climbs_linearly_for_that_step_only() -> None:
    training = Training(relora(warmup=4), make=torch.optim.SGD, lr=0.5)
    used, method = [], training.handle.methods["relora"]
    for _ in range(12):
        training.gradients()
        method.gradients_ready(training.started)
        used.append(training.optimizer.param_groups[0]["lr"])
        training.started.restore_rates()
        training.optimizer.step()
        assert training.optimizer.param_groups[0]["lr"] == 0.5
    assert used == [0.5] * 5 + [0.0, 0.125, 0.25, 0.375, 0.5, 0.0, 0.125]


def test_with_a_rate_of_zero_nothing_moves() -> None:
    training = Training(relora(warmup=2))
    training.run(5)
    before = training.pair.up.detach().clone()
    training.run(1)
    assert torch.equal(training.pair.up, before)


def test_the_jagged_cosine_is_the_papers() -> None:
    total, interval, first, warmup, floor = 100, 20, 10, 5, 0.1
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = jagged_cosine(
        optimizer, total=total, interval=interval, first_warmup=first, warmup=warmup, floor=floor
    )

    def cosine(t: float) -> float:
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (min(t, total) - first) / (total - first)))

    for t in range(total + 8):
        tau = t % interval
        if t < first:
            wanted = t / first
        elif t >= interval and tau < warmup:
            wanted = tau / warmup * cosine(t // interval * interval + warmup)
        else:
            wanted = cosine(t)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * wanted)
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "wrong", [{"first_warmup": 100}, {"interval": 0}, {"warmup": 21}, {"floor": 1.5}], ids=str
)
def test_an_impossible_schedule_is_refused(wrong: dict[str, Any]) -> None:
    options = {"total": 100, "interval": 20, "first_warmup": 10, "warmup": 5, "floor": 0.1, **wrong}
    with pytest.raises(InvalidOption, match=f"jagged_cosine: {next(iter(wrong))} must be"):
        jagged_cosine(torch.optim.SGD([torch.zeros(1)], lr=1.0), **options)


@pytest.mark.parametrize("wrong", [{"interval": 0}, {"warmup": 6}, {"warmup": -1}, {"prune": 1.1}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"relora: {next(iter(wrong))} must be"):
        Training(relora(**wrong))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("structure", ["lora", "dora"])
def test_training_resumes_bit_for_bit(structure: str, make: Any, tmp_path: Path) -> None:
    point = relora(structure, "pissa", interval=7, warmup=3, prune=0.5)
    assert_resumes(point, tmp_path, make=make)


def test_what_was_moved_is_saved_folded_and_taken_away(tmp_path: Path) -> None:
    training = Training(relora())
    training.run(12)
    rf.save(training.model, tmp_path / "adapter")
    loaded = rf.load(perceptron(), tmp_path / "adapter")
    assert torch.equal(loaded(training.inputs), training.function())
    assert_ends(training)


def test_it_reaches_a_target_of_a_higher_rank_than_its_own() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base, inputs = nn.Sequential(nn.Linear(12, 12, bias=False)).double(), normal(64, 12)
    target = normal(12, 8, seed=8) @ normal(8, 12, seed=9) / 8
    wanted = inputs @ (base[0].weight.detach() + target).T

    def loss_after(point: rf.Recipe) -> float:
        training = Training(
            point, model=copy.deepcopy(base), lr=0.03, inputs=inputs, wanted=wanted, total=600
        )
        return training.run(600)

    plain = rf.Recipe("lora", dynamics=(("relora", {"interval": 1000}),))
    assert loss_after(relora(interval=100, warmup=10)) < 0.1 * loss_after(plain)


# Layers and dtypes ------------------------------------------------------------------------------------


def test_a_convolution_and_an_embedding_restart_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.conv = nn.Embedding(9, 4), nn.Conv1d(4, 6, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.conv(self.embed(ids).mT)  # type: ignore[no-any-return]

    ids = torch.arange(18).view(2, 9) % 9
    model = rf.adapt(Net().double(), relora(), rank=2, targets=["embed", "conv"])
    optimizer = torch.optim.Adam(rf.param_groups(model, lr=1e-2))
    with rf.attach(model, optimizer) as handle:
        for _ in range(4):
            model(ids).square().mean().backward()
            optimizer.step()
        before = model(ids)
        handle.run.enter("relora")
        with torch.no_grad():
            for pair in handle.run.pairs:
                assert pair.up.any()
                restart(handle.run, pair)
        torch.testing.assert_close(model(ids), before)
        assert not any(pair.up.any() for pair in handle.run.pairs)


def test_a_model_in_bfloat16_is_moved_in_float32() -> None:
    model = perceptron(torch.bfloat16)
    start = model[0].weight.detach().clone()
    training = Training(
        relora(interval=1), model=model, lr=1e-4,
        inputs=normal(24, 12).bfloat16(), wanted=normal(24, 6, seed=6).bfloat16(),
    )  # fmt: skip
    training.run(4)
    moved = next(leaf for leaf in model[0].expression.leaves() if isinstance(leaf, Moved))
    assert moved.value.dtype == torch.float32
    change = (moved.value - start.float()).abs()
    assert 0 < change.max() < 2**-9 * start.abs().max()  # less than bfloat16 could hold
    assert torch.equal(model[0].weight, start)


def test_a_quantised_layer_is_refused() -> None:
    quantisation = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(32, 32))
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedLayer, match="0 is quantised, and moving changes into it would round them"):
        rf.adapt(model, "lora/relora", rank=2, targets=["0"])
