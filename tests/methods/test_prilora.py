"""PRILoRA: ranks by depth, and a pruned factor on the side of the input."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from hosts import blocks, token_ids
from methods._layers import leaves_of, linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.ranks.prilora import PRILoRA
from rankfold.methods.rules import Unit

# Ranks --------------------------------------------------------------------------------------------------


def units(count: int, **about: Any) -> list[Unit]:
    return [
        Unit(f"{i}.{name}", (64, 64), depth=i, blocks=count, **about) for i in range(count) for name in "qv"
    ]


def by_depth(count: int, rank: int, rule: PRILoRA | None = None, **about: Any) -> list[int]:
    found = (rule or PRILoRA()).share(units(count, **about), rank)
    assert all(found[f"{i}.q"] == found[f"{i}.v"] for i in range(count))
    return [found[f"{i}.q"] for i in range(count)]


def test_the_ranks_of_twelve_blocks_are_the_papers() -> None:
    assert by_depth(12, 8) == [4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12]


@pytest.mark.parametrize("count", [2, 3, 7, 12, 24, 32])
@pytest.mark.parametrize("rank", [2, 4, 6, 8, 10, 16])
@pytest.mark.parametrize("multiple", [1, 2])
def test_ranks_rise_with_depth_in_multiples_and_their_mean_is_the_one_asked_for(
    count: int, rank: int, multiple: int
) -> None:
    found = by_depth(count, rank, multiple=multiple)
    assert found == sorted(found)
    assert all(r % multiple == 0 and r > 0 for r in found)
    if rank > 2:  # below, one multiple is the least
        assert sum(found) == rank * count


def test_ends_of_your_own_and_falling_ranks() -> None:
    assert by_depth(3, 8, PRILoRA(first=0.25, last=2.0)) == [2, 9, 16]
    assert by_depth(3, 8, PRILoRA(first=1.5, last=0.5)) == [12, 8, 4]
    assert by_depth(1, 8) == [8]
    assert by_depth(3, 8, limit=10) == [4, 8, 10]


def expressions(model: nn.Module) -> dict[str, Any]:
    return model.__dict__["_rankfold"].expressions("default")  # type: ignore[no-any-return]


def test_an_adapter_has_these_ranks_and_one_scaling() -> None:
    model = rf.adapt(blocks(), "lora/prilora", rank=4, alpha=8)
    pairs = {path: next(e.pairs()) for path, e in expressions(model).items()}
    assert {path: pair.up.shape[1] for path, pair in pairs.items()} == {
        f"blocks.{i}.{name}": rank for i, rank in ((0, 2), (1, 6)) for name in ("attention", "up", "down")
    }
    assert {pair.scale for pair in pairs.values()} == {2.0}
    assert all(pair.gate is None for pair in pairs.values())


@pytest.mark.parametrize("structure", ["vera", "svfit", "gralora", "reft", "uni-lora"])
def test_a_structure_without_a_leaf_at_the_input_takes_the_ranks_alone(structure: str) -> None:
    with pytest.raises(
        Incompatible, match=rf"prunes the trained leaf that meets the input, and {structure} has none"
    ):
        rf.adapt(blocks(), f"{structure}/prilora", rank=4)
    model = rf.adapt(blocks(), rf.Recipe(structure, ranks=("prilora", {"prune": 0})), rank=4)
    assert set(model.__dict__["_rankfold"].adapter().record["ranks"].values()) == {2, 6}


# Pruning ------------------------------------------------------------------------------------------------


class Training:
    """Training with prilora that prunes every few steps."""

    def __init__(
        self, point: Sequence[Any] = ("lora", None), model: nn.Module | None = None, **options: Any
    ) -> None:
        rule = {"interval": 3, **options}
        recipe = rf.Recipe(point[0], point[1], ranks=("prilora", rule), dynamics=point[2:])
        self.model = rf.adapt(linear(6, 8) if model is None else model, recipe, rank=2, targets=["*"])
        self.start()

    def start(self, state: Any = None) -> None:
        self.optimizer = torch.optim.Adam(rf.param_groups(self.model, lr=0.02))
        if state is not None:
            self.optimizer.load_state_dict(state)
        self.handle = rf.attach(self.model, self.optimizer)

    def step(self, *inputs: Tensor) -> None:
        self.optimizer.zero_grad()
        for x in inputs:
            (self.model(x) - torch.ones(())).square().mean().backward()
        self.optimizer.step()

    def memory(self) -> Any:
        return self.optimizer.param_groups[0]["rankfold"]["memory"]["ranks=prilora"]


def zeros_by_row(leaf: Tensor) -> list[int]:
    return (leaf == 0).sum(1).tolist()


@pytest.mark.parametrize("share", [0.25, 0.5, 0.7])
def test_after_an_event_exactly_the_share_of_every_row_is_zero_and_not_before(share: float) -> None:
    training = Training(prune=share)
    for step in range(1, 7):
        before = leaves_of(training.model)["down"].detach().clone()
        training.step(normal(20, 8, seed=step))
        count = int(share * 8) if step % 3 == 0 else 0
        if count or step < 3:
            assert zeros_by_row(leaves_of(training.model)["down"]) == [count, count]
        elif step == 4:
            grown = (before == 0) & (leaves_of(training.model)["down"] != 0)
            assert grown.any(), "pruned entries grow again"


def test_kept_entries_matter_more_than_dropped_ones() -> None:
    training = Training(interval=1)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0  # so that the step itself moves nothing
    before = leaves_of(training.model)["down"].detach().clone()
    training.step(normal(20, 8) * torch.linspace(0.2, 3, 8).double())
    importance = before.abs() * training.memory()["0"]["activity"]
    for row, dropped in zip(importance, leaves_of(training.model)["down"] == 0, strict=True):
        assert int(dropped.sum()) == 4
        assert row[dropped].max() < row[~dropped].min()


def test_of_equal_entries_the_one_at_the_quieter_input_goes() -> None:
    training = Training(interval=1)
    leaves_of(training.model)["down"].data = torch.ones(2, 8).double()
    loudness = torch.tensor([5.0, 1, 5, 1, 5, 1, 5, 1]).double()
    training.step(normal(50, 8) * loudness)
    assert ((leaves_of(training.model)["down"] == 0) == (loudness == 1)).all()


def test_the_activity_is_a_moving_average_of_the_inputs_lengths_per_step() -> None:
    training, expected = Training(beta=0.8), torch.zeros(8).double()
    for step in range(5):
        batches = [normal(4, 5, 8, seed=10 * step + i) for i in range(2)]  # accumulated over two batches
        training.step(*batches)
        expected = 0.8 * expected + 0.2 * torch.cat(batches).flatten(0, 1).norm(dim=0)
        with torch.no_grad():
            training.model(100 * normal(20, 8))  # validation
    torch.testing.assert_close(training.memory()["0"]["activity"].double(), expected, rtol=1e-5, atol=0)


def test_an_overflow_of_one_step_is_not_remembered() -> None:
    training = Training()
    training.step(normal(20, 8))
    before = training.memory()["0"]["activity"].clone()
    training.model(torch.full((1, 8), torch.inf).double())
    training.step(normal(20, 8))
    assert torch.equal(training.memory()["0"]["activity"], before)


def test_pruning_where_the_product_is_zero_changes_nothing() -> None:
    training, x = Training(interval=1), normal(20, 8)
    training.optimizer.param_groups[0]["lr"] = training.optimizer.param_groups[1]["lr"] = 0.0
    training.step(x)
    assert zeros_by_row(leaves_of(training.model)["down"]) == [4, 4]
    assert torch.equal(training.model(x), linear(6, 8)(x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_is_subtracted_is_pruned_with_it_so_the_base_stays(init: str) -> None:
    training, x = Training(("lora", init), interval=1), normal(20, 8)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    training.step(x)
    leaves = leaves_of(training.model)
    assert zeros_by_row(leaves["down"]) == zeros_by_row(leaves["down.start"]) == [4, 4]
    torch.testing.assert_close(training.model(x), linear(6, 8)(x))


def test_reflections_are_pruned_by_vector_and_stay_paired_at_the_start() -> None:
    training, x = Training(("hra", None), interval=1), normal(20, 8)
    for group in training.optimizer.param_groups:
        group["lr"] = 0.0
    training.step(x)
    vectors = leaves_of(training.model)["vectors"]
    assert vectors.shape == (8, 2)
    assert zeros_by_row(vectors.T) == [4, 4]
    torch.testing.assert_close(training.model(x), linear(6, 8)(x))


@pytest.mark.parametrize("structure", ["lora", "dora", "hra", "abba", "hira"])
def test_every_leaf_at_the_input_is_pruned(structure: str) -> None:
    training = Training((structure, None), blocks().train())
    for step in range(3):
        training.step(token_ids(step))
    for path, expression in expressions(training.model).items():
        for leaf, axis in expression.entries():
            rows = leaf.tensor().movedim(axis, 1)
            if path != "embed":
                assert zeros_by_row(rows) == [rows.shape[1] // 2] * len(rows), path


def test_the_embedding_has_no_input_channels_and_is_left_whole() -> None:
    training = Training(model=blocks().train(), interval=1)
    training.step(token_ids())
    assert (leaves_of(training.model, "embed")["down"] != 0).all()
    assert "embed" not in training.memory() or not training.memory()["embed"]


def conv(groups: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, (3, 2), groups=groups)).double()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_patches(groups: int) -> None:
    training, x = Training(model=conv(groups), interval=1, beta=0.0), normal(2, 4, 6, 5)
    training.step(x)
    patches = nn.functional.unfold(x, (3, 2)).movedim(1, 2).reshape(-1, groups, 24 // groups)
    expected = patches.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(training.memory()["0"]["activity"].double(), expected, rtol=1e-5, atol=0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def test_a_packed_projection_counts_its_queries_keys_and_values() -> None:
    training, x = Training(model=Attending().double(), interval=1, beta=0.0), normal(2, 5, 8)
    training.step(x)
    activity = training.memory()["attention.in_proj"]["activity"].double()
    torch.testing.assert_close(activity, 3**0.5 * x.flatten(0, 1).norm(dim=0), rtol=1e-5, atol=0)
    whole = next(expressions(training.model)["attention.out_proj"].pairs()).down.tensor()
    assert (whole != 0).all()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linear(8, 8)[0], linear(8, 8)[0]
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(2 * self.first(x))


def test_a_tied_weight_counts_all_its_inputs() -> None:
    with pytest.warns(UserWarning, match="second shares its tensor with first"):
        training, x = Training(model=Tied(), interval=1, beta=0.0), normal(5, 8)
    with torch.no_grad():
        inputs = torch.cat([x, 2 * training.model.first(x)])
    training.step(x)
    (path,) = expressions(training.model)
    torch.testing.assert_close(
        training.memory()[path]["activity"].double(), inputs.norm(dim=0), rtol=1e-5, atol=0
    )


# The handle ---------------------------------------------------------------------------------------------


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def test_the_hooks_go_with_the_handle_and_the_model_comes_back() -> None:
    training, x = Training(model=blocks(), interval=1), token_ids()
    training.step(x)
    assert hooks(training.model) == 7  # all weights but the embedding
    training.handle.remove()
    assert hooks(training.model) == 0
    rf.remove(training.model)
    assert torch.equal(training.model(x), blocks()(x))


def test_without_pruning_there_are_no_hooks_and_nothing_is_remembered() -> None:
    training = Training(prune=0)
    assert hooks(training.model) == hooks(rf.adapt(linear(6, 8), "lora", rank=2, targets=["0"]))
    training.step(normal(20, 8))
    assert (leaves_of(training.model)["down"] != 0).all()


@pytest.mark.parametrize(
    "point", [("lora", None), ("hra", None), ("dora", "pissa"), ("lora", "pissa", "relora")], ids=str
)
def test_continuing_from_files_is_training_that_never_stopped(point: Any, tmp_path: Path) -> None:
    training = Training(point, interval=4)
    for step in range(10):
        training.step(normal(20, 8, seed=step))
        if step == 5:
            rf.save(training.model, tmp_path / "half")
            file = io.BytesIO()
            torch.save(training.optimizer.state_dict(), file)
    again = Training(point, interval=4)
    again.handle.remove()
    again.model = rf.load(linear(6, 8), tmp_path / "half")
    file.seek(0)
    again.start(torch.load(file, weights_only=True))
    for step in range(6, 10):
        again.step(normal(20, 8, seed=step))
    for name, value in leaves_of(training.model).items():
        assert torch.equal(value, leaves_of(again.model)[name]), name
    assert torch.equal(training.memory()["0"]["activity"], again.memory()["0"]["activity"])


def _process(number: int, folder: str) -> None:
    """Train in one of two processes, on inputs of its own, and leave what is remembered in a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=number, world_size=2)
    try:
        training = Training(interval=1, beta=0.0)
        for group in training.optimizer.param_groups:
            group["lr"] = 0.0
        training.step(normal(20, 8, seed=number))
        found = {"down": leaves_of(training.model)["down"].detach(), "q": training.memory()["0"]["activity"]}
        torch.save(found, f"{folder}/{number}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_processes_with_inputs_of_their_own_prune_alike(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(_process, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(2))
    assert torch.equal(first["down"], second["down"])
    both = torch.cat([normal(20, 8, seed=number) for number in range(2)])
    torch.testing.assert_close(first["q"].double(), both.norm(dim=0), rtol=1e-5, atol=0)


def test_a_dynamics_that_needs_the_factors_alone_refuses_pruning_and_takes_the_ranks() -> None:
    with pytest.raises(Incompatible, match="hd-pissa needs the factors alone, and prilora changes them too"):
        rf.adapt(linear(), "lora/prilora/dynamics=hd-pissa", rank=2, targets=["0"])
    recipe = rf.Recipe("lora", ranks=("prilora", {"prune": 0}), dynamics=("hd-pissa",))
    rf.adapt(linear(), recipe, rank=2, targets=["0"])


@pytest.mark.parametrize(
    "options",
    [{"first": 0.0}, {"last": -1.0}, {"prune": 1.0}, {"prune": -0.1}, {"interval": 0}, {"beta": 1.0}],
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"prilora: {next(iter(options))} must be"):
        PRILoRA(**options)
