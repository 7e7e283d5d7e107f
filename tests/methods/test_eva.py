"""EVA: the down factor holds the principal directions of the inputs, and ranks follow what they explain."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._calibrated import assert_finite, assert_reloads, centred, inputs
from methods._layers import (
    adapted,
    backward,
    change,
    convolution,
    disturbed,
    leaves_of,
    linear,
    normal,
    sgd_step,
)
from methods._peft import HOSTS
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, InvalidRank
from rankfold.methods.capacity import LeftOut
from rankfold.methods.inits.eva import eva as initialise
from rankfold.methods.ranks.eva import eva as share
from rankfold.methods.rules import Unit


def start(point: str = "lora", *, rank: int = 3, model: nn.Module | None = None, **options: Any) -> nn.Module:
    given = {key: options.pop(key) for key in ("whiten", "iterations") if key in options}
    arguments = {"data": inputs(offset=3.0), "progress": False, **options}
    return adapted(rf.Recipe(point, ("eva", given)), model, rank=rank, **arguments)


def assert_same_rows(actual: Tensor, expected: Tensor) -> None:
    """Assert that rows of length 1 are equal up to signs."""
    torch.testing.assert_close((actual * expected).sum(1).abs(), torch.ones(len(actual)).to(actual))


# The start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
def test_the_down_factor_holds_the_leading_directions_of_the_centred_inputs(count: int) -> None:
    # With as many components as there are features, decomposing batch by batch loses nothing.
    data = inputs(6, count=count, offset=3.0)
    leaves = leaves_of(start(model=linear(8, 6), rank=6, data=data))
    assert_same_rows(leaves["down"], centred(data)[1])
    assert torch.equal(leaves["up"], torch.zeros(8, 6))


def test_fewer_directions_of_one_batch_are_the_leading_ones() -> None:
    data = inputs(count=1, offset=3.0)
    down = leaves_of(start(data=data))["down"]
    assert_same_rows(down, centred(data)[1][:3])
    torch.testing.assert_close(down @ down.T, torch.eye(3, dtype=torch.float64))
    assert (down.gather(1, down.abs().argmax(1, keepdim=True)) > 0).all()


def test_the_mean_of_the_inputs_is_not_among_the_directions() -> None:
    data = inputs(count=1, offset=3.0)
    mean = data[0].flatten(0, 1).mean(0)
    assert (leaves_of(start(rank=1, data=data))["down"] @ (mean / mean.norm())).abs() < 0.8


def test_whitening_divides_by_the_root_of_the_singular_values() -> None:
    data = inputs(count=1)
    down, values = leaves_of(start(data=data, whiten=True))["down"], centred(data)[0][:3]
    torch.testing.assert_close(down @ down.T, torch.diag(1 / values))


@pytest.mark.parametrize("structure", ["lora", "dora", "abba", "gralora", "hira"])
def test_the_start_is_exactly_the_bases_output(structure: str) -> None:
    x = normal(5, 8)
    output, base = start(structure, rank=2)(x), linear()(x)
    if structure == "dora":
        torch.testing.assert_close(output, base)
    else:
        assert torch.equal(output, base)


def test_a_block_sees_the_directions_of_its_part_of_the_inputs() -> None:
    data = inputs(count=2, offset=1.0)
    down = leaves_of(start("gralora", rank=6, data=data, k=2, model=linear(8, 8)))["down"]
    full = leaves_of(start("gralora", rank=8, data=data, k=2, model=linear(8, 8)))["down"]
    for n, columns in enumerate((slice(0, 4), slice(4, 8))):
        directions = centred([x[..., columns] for x in data])[1]
        for j in range(2):
            assert_same_rows(full[n][4 * j : 4 * (j + 1)], directions)
            rows = down[n][3 * j : 3 * (j + 1)]
            torch.testing.assert_close(rows @ rows.T, torch.eye(3).double())


@pytest.mark.parametrize("whiten", [False, True])
def test_directions_that_no_input_reaches_are_filled_up_at_random(whiten: bool) -> None:
    few = [x[:, :3] for x in inputs(count=1)]
    downs = [leaves_of(start(data=few, rank=5, whiten=whiten, seed=seed))["down"] for seed in (0, 0, 1)]
    lengths = downs[0].norm(dim=1)
    torch.testing.assert_close(downs[0] @ downs[0].T, torch.diag(lengths.square()))
    assert_same_rows(downs[0][:2] / lengths[:2, None], centred(few)[1][:2])
    torch.testing.assert_close(lengths[2:], torch.ones(3).double())
    assert torch.equal(downs[0], downs[1])
    assert not torch.equal(downs[0][2:], downs[2][2:])


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("point", ["lora", "gralora"])
def test_inputs_that_are_all_alike_give_random_directions(point: str, whiten: bool) -> None:
    model = start(point, rank=4, data=[torch.ones(1, 6, 8).double()], whiten=whiten)
    assert_finite(model)
    rows = leaves_of(model)["down"].reshape(-1, leaves_of(model)["down"].shape[-1])[:2]
    torch.testing.assert_close(rows @ rows.T, torch.eye(2).double())


def test_a_randomised_decomposition_is_close_to_the_exact_one() -> None:
    exact, randomised = (leaves_of(start(iterations=count))["down"] for count in (None, 6))
    torch.testing.assert_close(randomised, exact, atol=1e-3, rtol=0)


def test_a_convolution_sees_its_windows() -> None:
    x = normal(3, 4, 6, 5)
    windows = torch.nn.functional.unfold(x, (3, 2)).transpose(1, 2)
    model = start(model=convolution(), data=[x], iterations=None)
    assert torch.equal(model(x), convolution()(x))
    down = leaves_of(model)["down"].flatten(1)
    assert_same_rows(down, centred([windows])[1][:3])


def test_it_learns_faster_than_a_random_start_where_the_inputs_are_anisotropic() -> None:
    def loss_after(model: nn.Module) -> float:
        for _ in range(20):
            model.zero_grad()
            loss = (model(x) - wanted).square().mean()
            loss.backward()
            sgd_step(model, 0.1)
        return float(loss.detach())

    x = normal(100, 40) * torch.cat([2 * torch.ones(4), 0.1 * torch.ones(36)]).double()
    wanted = linear(10, 40)(x).detach() + 0.2 * x @ normal(40, 10, seed=9)
    ours = start(model=linear(10, 40), rank=4, data=[x])
    assert loss_after(ours) < 0.5 * loss_after(adapted("lora", linear(10, 40), rank=4))


def test_the_adapter_loads_without_data_in_single_precision_over_half(tmp_path: Path) -> None:
    model = start(model=linear().bfloat16(), data=[x.bfloat16() for x in inputs()])
    assert leaves_of(model)["down"].dtype == torch.float32
    assert_reloads(model, linear().bfloat16(), normal(5, 8).bfloat16(), tmp_path)


def test_statistics_that_were_collected_before_will_do() -> None:
    data = inputs(offset=3.0)
    found = rf.collect(linear(), data, [("input_pca", {"components": 3})], targets="0", progress=False)
    assert torch.equal(leaves_of(start(data=found))["down"], leaves_of(start(data=data))["down"])


# peft as the reference --------------------------------------------------------------------------------


def perceptron() -> nn.Module:
    return HOSTS["perceptron"].model(torch.float32)


def by_peft(batch: Tensor, rank: int, rho: float) -> tuple[nn.Module, dict[str, int]]:
    """Return peft's layers and how many ranks it gives them."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["0", "2"], init_lora_weights="eva",
        eva_config=EvaConfig(rho=rho, use_label_mask=False),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(perceptron(), config)  # type: ignore[arg-type]
        initialize_lora_eva_weights(
            model, dataloader=[batch], forward_fn=lambda m, b: m(b),
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
    layers: nn.Module = model.base_model.model  # type: ignore[assignment]
    downs = {path: getattr(layers.get_submodule(path), "lora_A", None) for path in ("0", "2")}
    return layers, {path: 0 if a is None else a["default"].weight.shape[0] for path, a in downs.items()}


def spread(*deviations: float) -> Tensor:
    """Return rows of which the first features have these deviations and the others 0.01."""
    return normal(60, 12).float() * torch.tensor([*deviations, *(12 - len(deviations)) * [0.01]])


def test_the_directions_are_pefts_up_to_signs() -> None:
    batch = spread(9, 6, 4, 2, 1)
    theirs, _ = by_peft(batch, 3, 1.0)
    ours = rf.adapt(
        perceptron(), "lora/init=eva", rank=3, alpha=6, targets=["0", "2"], data=[batch], progress=False
    )
    for path in ("0", "2"):
        down = theirs.get_submodule(path).lora_A["default"].weight  # type: ignore[union-attr,index]
        cosines = (down * leaves_of(ours, path)["down"]).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones(3), atol=1e-4, rtol=0)


def test_the_ranks_and_the_scaling_are_pefts() -> None:
    batch = spread(3, 3)
    theirs, given = by_peft(batch, 3, 2.0)
    assert sum(given.values()) == 6
    assert given["0"] != given["2"]
    point = "lora/init=eva/ranks=eva"
    ours = rf.adapt(perceptron(), point, rank=3, alpha=6, targets=["0", "2"], data=[batch], progress=False)
    assert {path: leaves_of(ours, path)["up"].shape[1] for path in given} == given
    for path, rank in given.items():
        leaves = leaves_of(disturbed(ours), path)
        assert theirs.get_submodule(path).scaling["default"] == pytest.approx(2)  # type: ignore[union-attr,index]
        torch.testing.assert_close(
            change(ours, path), 2 * leaves["up"] @ leaves["down"], atol=1e-4, rtol=1e-3
        )
        assert leaves["up"].shape[1] == rank


# Ranks ------------------------------------------------------------------------------------------------


class Known:
    """A weight whose inputs explain known shares of their variance."""

    def __init__(self, explained: Iterable[float]) -> None:
        self.explained = torch.tensor(list(explained))

    def statistic(self, name: str) -> Any:
        """Return itself."""
        assert name == "input_pca"
        return self


def units(*rows: Iterable[float], **about: Any) -> list[Unit]:
    return [Unit(f"w{i}", (9, 9), site=Known(row), **about) for i, row in enumerate(rows)]


FIRST, SECOND = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01), (0.3, 0.25, 0.2, 0.15, 0.05, 0.04)


def test_ranks_count_the_largest_shares_of_all_weights_together() -> None:
    assert share(units(FIRST, SECOND), 3) == {"w0": 2, "w1": 4}
    assert share(units(FIRST, SECOND), 1) == {"w0": 1, "w1": 1}


def test_no_weight_gets_more_than_rho_times_the_rank() -> None:
    assert share(units((0.9, 0.8, 0.7, 0.6), SECOND), 2, rho=1.5) == {"w0": 3, "w1": 1}
    assert share(units((0.9, 0.8, 0.7, 0.6), SECOND), 2, rho=1.0) == {"w0": 2, "w1": 2}


def test_a_weight_whose_inputs_explain_little_gets_nothing() -> None:
    assert share(units(FIRST, (0.01,) * 6), 2) == {"w0": 4, "w1": 0}


def test_equal_shares_go_to_the_weight_with_fewer_and_then_to_the_first() -> None:
    assert share(units(FIRST, FIRST), 2) == {"w0": 2, "w1": 2}
    assert share(units(FIRST, FIRST, (0.6, 0.15)), 1) == {"w0": 1, "w1": 1, "w2": 1}
    assert share(units(FIRST, FIRST, (0.6, 0.55)), 1) == {"w0": 1, "w1": 0, "w2": 2}


def test_ranks_fit_the_structure() -> None:
    assert share(units(FIRST, SECOND, multiple=2), 2) == {"w0": 2, "w1": 2}
    assert share(units(FIRST, SECOND, multiple=2), 4) == {"w0": 4, "w1": 4}
    assert share(units(FIRST, SECOND, limit=3), 3) == {"w0": 3, "w1": 3}
    assert share(units(FIRST, SECOND, limit=3, multiple=2), 4) == {"w0": 2, "w1": 2}


def test_a_multiple_counts_by_all_of_its_components() -> None:
    assert share(units((0.3, 0, 0.28, 0), (0.4, 0.3, 0.25, 0.2), multiple=2), 2) == {"w0": 0, "w1": 4}


def test_what_the_inputs_have_no_components_for_is_not_shared_out() -> None:
    assert share(units((0.9,), (0.6, 0.4)), 3) == {"w0": 1, "w1": 2}


def test_a_rho_below_one_is_refused() -> None:
    with pytest.raises(InvalidOption, match="rho must be at least 1"):
        share(units(FIRST), 2, rho=0.5)


class Fork(nn.Module):
    """Two weights that share an input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        return self.last(torch.tanh(self.first(x) * self.second(x)))  # type: ignore[no-any-return]


def fork() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Fork().double()


def counts_of(model: nn.Module) -> dict[str, int]:
    return {p: int(leaves_of(model, p)["up"].shape[1]) for p in ("first", "second", "last")}


@pytest.mark.parametrize("rank", [2, 3])
def test_weights_that_share_an_input_share_its_directions_and_their_ranks_up_to_one(
    rank: int, tmp_path: Path
) -> None:
    data = [x * torch.tensor([1] + 7 * [0.1]).double() for x in inputs()]
    model = rf.adapt(
        fork(), "init=eva/ranks=eva", rank=rank, alpha=6, targets="all-linear", data=data, progress=False
    )
    ranks = counts_of(model)
    assert sum(ranks.values()) == 3 * rank
    assert ranks["first"] - ranks["second"] == 1
    assert ranks["last"] > rank
    first, second = (leaves_of(model, path)["down"] for path in ("first", "second"))
    assert torch.equal(first[: len(second)], second)
    x = normal(5, 8)
    assert torch.equal(model(x), fork()(x))
    leaves = leaves_of(disturbed(model), "last")
    torch.testing.assert_close(change(model, "last"), 6 / rank * leaves["up"] @ leaves["down"])
    assert_reloads(model, fork(), x, tmp_path)


@pytest.mark.parametrize("structure", ["abba", "dora", "gralora", "vera", "lora-xs", "hra"])
def test_other_structures_take_its_ranks(structure: str) -> None:
    recipe = rf.Recipe(structure, ranks="eva")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftOut)
        model = rf.adapt(fork(), recipe, rank=2, targets="all-linear", data=inputs(), progress=False)
    x = normal(5, 8)
    torch.testing.assert_close(model(x), fork()(x), atol=1e-3, rtol=0)
    backward(model, x)


def test_a_weight_without_rank_is_named_and_left_out() -> None:
    # Two directions hold all of the first weight's inputs, and all are alike for the second.
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 6)).double()
    model[0].weight.data.zero_()
    data = [x * torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).double() for x in inputs()]
    with pytest.warns(LeftOut, match="2: eva gave it no rank"):
        rf.adapt(model, rf.Recipe("lora", ranks="eva"), rank=1, targets=["0", "2"], data=data, progress=False)
    assert leaves_of(model, "0")["up"].shape[1] == 2


def test_a_structure_without_weights_is_refused() -> None:
    with pytest.raises(Incompatible, match="eva reads statistics of weights, and reft changes activations"):
        rf.adapt(fork(), rf.Recipe("reft", ranks="eva"), rank=2, data=inputs(), progress=False)


def test_more_directions_than_inputs_are_refused() -> None:
    with pytest.raises(InvalidRank, match="at most 8 directions"):
        initialise(type("Site", (), {"shape": (20, 8), "path": "0"})(), 9, 1.0)  # type: ignore[arg-type]
