"""A pool of blocks gives models of many sizes: how many, what they compute, and where their maps start."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from compression._calibrated import normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.papers.learngene_pool import (
    LearngenePool,
    PoolDistillation,
    Stitch,
    fitted_map,
    windows,
)
from rankfold.errors import Incompatible, InvalidOption


class Encoder(nn.Module):
    """Blocks of a width, between an input and a head; they return a tensor or a tuple."""

    def __init__(self, width: int, depth: int = 4, *, tuples: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(6, width)
            self.blocks = nn.ModuleList(Block(width, tuples=tuples) for _ in range(depth))
            self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for block in self.blocks:
            output = block(hidden)
            hidden = output[0] if isinstance(output, tuple) else output
        return self.head(hidden)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A residual block."""

    def __init__(self, width: int, *, tuples: bool) -> None:
        super().__init__()
        self.linear, self.tuples, self.calls = nn.Linear(width, width), tuples, 0

    def forward(self, hidden: Tensor) -> Tensor | tuple[Tensor, None]:
        self.calls += 1
        hidden = hidden + torch.tanh(self.linear(hidden))
        return (hidden, None) if self.tuples else hidden


def batches() -> list[Tensor]:
    return [normal(5, 7, 6, seed=seed) for seed in (1, 2)]


def pool(*widths: int, tuples: bool = False, depth: int = 4) -> LearngenePool:
    made = [Encoder(w, depth, tuples=tuples, seed=i).double() for i, w in enumerate(widths)]
    return LearngenePool(made, batches())


def test_the_windows_of_the_official_code() -> None:
    wanted = [
        (0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (3, 4), (4, 3),
        (4, 4), (4, 5), (5, 4), (5, 5),
    ]  # fmt: skip
    assert [pair for window in windows(6) for pair in window] == wanted
    assert [len(window) for window in windows(6)] == [4, 3, 3, 3, 3]
    assert [len(window) for window in windows(6, 3, 3)] == [9, 9]


def test_there_are_as_many_models_as_stitches_and_instances() -> None:
    three = pool(4, 6, 8)
    per_pair = sum(len(window) for window in windows(4))
    assert len(three.stitches) == 3 * per_pair == len(set(three.stitches))
    assert three.models == 3 * per_pair + 3
    assert all(stitch.front < stitch.back for stitch in three.stitches)
    assert {name: len(maps) for name, maps in three.maps.items()} == {"0-1": 3, "0-2": 3, "1-2": 3}


@pytest.mark.parametrize("tuples", [False, True])
def test_a_stitched_model_is_a_front_a_map_and_a_back(tuples: bool) -> None:
    two, x = pool(4, 8, tuples=tuples), batches()[0]
    small, large = two.instances
    for stitch in two.stitches:
        model = two.stitched(stitch)
        hidden = small.embed(x)
        for block in small.blocks[: stitch.after + 1]:
            hidden = hidden + torch.tanh(block.linear(hidden))
        assert model.map.weight.shape == (8, 4)
        hidden = hidden @ model.map.weight.T
        for block in large.blocks[stitch.before :]:
            hidden = hidden + torch.tanh(block.linear(hidden))
        torch.testing.assert_close(model(x), large.head(hidden))


@pytest.mark.parametrize("tuples", [False, True])
def test_an_instance_stitched_to_itself_is_that_instance(tuples: bool) -> None:
    two, x = pool(4, 8, tuples=tuples), batches()[0]
    for index in (0, 1):
        for after in range(3):
            assert torch.equal(
                two.stitched(Stitch(index, index, after, after + 1))(x), two.instances[index](x)
            )
    assert not torch.equal(two.stitched(Stitch(1, 1, 0, 2))(x), two.instances[1](x))


def test_running_leaves_the_instances_as_they_are() -> None:
    two, x = pool(4, 8), batches()[0]
    before = [[id(block) for block in two.blocks(i)] for i in (0, 1)]
    wanted = [instance(x) for instance in two.instances]
    two.stitched(two.stitches[2])(x)
    with pytest.raises(RuntimeError):
        two.stitched(two.stitches[2])(x[..., :3])
    assert [[id(block) for block in two.blocks(i)] for i in (0, 1)] == before
    assert all(torch.equal(instance(x), w) for instance, w in zip(two.instances, wanted, strict=True))
    assert not any(
        block._forward_hooks or block._forward_pre_hooks for i in (0, 1) for block in two.blocks(i)
    )


def test_blocks_that_are_not_of_the_model_are_skipped() -> None:
    two, x = pool(4, 8), batches()[0]
    model = two.stitched(Stitch(0, 1, 1, 2))
    model(x)
    for i in (0, 1):
        for block in two.blocks(i):
            block.calls = 0
    model(x)
    assert [block.calls for block in two.blocks(0)] == [1, 1, 0, 0]
    assert [block.calls for block in two.blocks(1)] == [0, 0, 1, 1]


def test_parameters_are_shared_with_the_pool_and_get_gradients() -> None:
    two, x = pool(4, 8), batches()[0]
    model = two.stitched(Stitch(0, 1, 1, 2))
    own = {id(p) for p in model.parameters()}
    assert own < {id(p) for p in two.parameters()}
    assert len(own) == 2 * 2 + 1 + 2 * 2
    model(x).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in two.blocks(0)[3].parameters())


def test_maps_start_at_least_squares_shared_within_a_window() -> None:
    two, x = pool(4, 8), torch.cat(batches())
    states = []
    for instance in two.instances:
        hidden, seen = instance.embed(x), [instance.embed(x)]
        for block in instance.blocks:
            hidden = hidden + torch.tanh(block.linear(hidden))
            seen.append(hidden)
        states.append([h.detach().flatten(0, 1) for h in seen])
    for number, window in enumerate(windows(4)):
        given = torch.cat([states[0][a + 1] for a, _ in window])
        wanted = torch.cat([states[1][b] for _, b in window])
        found = two.maps["0-1"][number].weight
        torch.testing.assert_close(
            (given @ found.T - wanted).T @ given, torch.zeros(8, 4).double(), atol=1e-9, rtol=0
        )
        assert all(two.map(Stitch(0, 1, a, b)) is two.maps["0-1"][number] for a, b in window)


def test_a_linear_relation_is_found_again() -> None:
    given, m = normal(30, 4), normal(7, 4, seed=1)
    torch.testing.assert_close(
        fitted_map([(given[:20], given[:20] @ m.T), (given[20:], given[20:] @ m.T)]), m
    )


def test_an_instance_beside_its_copy_with_maps_that_are_identities_is_that_instance() -> None:
    one, x = Encoder(8).double(), batches()[0]
    two = LearngenePool([one, copy.deepcopy(one)], maps={(0, 1): torch.eye(8).double()})
    in_step = [stitch for stitch in two.stitches if stitch.before == stitch.after + 1]
    assert len(in_step) == 3
    for stitch in in_step:
        torch.testing.assert_close(two.stitched(stitch)(x), one(x))


def test_models_are_drawn_uniformly_and_by_the_generator() -> None:
    two = pool(4, 8)
    generator = torch.Generator().manual_seed(0)
    drawn = [two.draw(generator) for _ in range(600)]
    names = [
        getattr(model, "stitch", None) or [m is model for m in two.instances].index(True) for model in drawn
    ]
    counts = {name: names.count(name) for name in set(names)}
    assert len(counts) == two.models == 12
    assert min(counts.values()) > 25
    again = torch.Generator().manual_seed(0)
    second = [two.draw(again) for _ in range(20)]
    assert [getattr(m, "stitch", None) for m in second] == [getattr(m, "stitch", None) for m in drawn[:20]]


def test_a_pool_is_copied_and_saved_whole() -> None:
    two, x = pool(4, 8), batches()[0]
    two.stitched(two.stitches[3])(x)
    other = copy.deepcopy(two)
    stitch = two.stitches[3]
    assert torch.equal(other.stitched(stitch)(x), two.stitched(stitch)(x))
    with torch.no_grad():
        for parameter in two.parameters():
            parameter.zero_()
    assert other.stitched(stitch)(x).abs().max() > 0
    two.load_state_dict(other.state_dict())
    assert torch.equal(other.stitched(stitch)(x), two.stitched(stitch)(x))


def test_distillation_learns_maps_and_they_start_stitches() -> None:
    teacher, student = Encoder(8, 6, seed=1).double(), Encoder(4, 4).double()
    distillation = PoolDistillation(student, teacher, batches()[0])
    assert distillation.positions == [(0, 0), (1, 2), (3, 5)]
    assert [tuple(p.weight.shape) for p in distillation.maps] == [(4, 8)] * 3
    assert {id(p) for p in distillation.parameters()}.isdisjoint(id(p) for p in teacher.parameters())
    optimizer = torch.optim.Adam(distillation.parameters(), 1e-2)
    first = [float(distillation(batch).detach()) for batch in batches()]
    for _ in range(60):
        for batch in batches():
            optimizer.zero_grad()
            distillation(batch).backward()
            optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    last = [float(distillation(batch).detach()) for batch in batches()]
    assert all(after < 0.8 * before for after, before in zip(last, first, strict=True))
    start = distillation.mean_map()
    torch.testing.assert_close(start, sum(p.weight.detach().T for p in distillation.maps) / 3)
    two = LearngenePool([student, Encoder(8).double()], maps={(0, 1): start})
    assert all(torch.equal(linear.weight, start) for linear in two.maps["0-1"])
    assert two.stitched(two.stitches[0])(batches()[0]).shape == (5, 7, 3)


def test_the_loss_of_distillation_is_that_of_the_paper() -> None:
    teacher, student = Encoder(8, seed=1).double(), Encoder(4).double()
    distillation = PoolDistillation(student, teacher, batches()[0], positions=[(3, 3)])
    x = batches()[0]
    hidden = [model.embed(x) for model in (student, teacher)]
    for index, model in enumerate((student, teacher)):
        for block in model.blocks:
            hidden[index] = hidden[index] + torch.tanh(block.linear(hidden[index]))
    soft = -(teacher(x).softmax(-1) * student(x).log_softmax(-1)).sum(-1).mean()
    wanted = soft + F.mse_loss(hidden[0], hidden[1] @ distillation.maps[0].weight.T)
    torch.testing.assert_close(distillation(x), wanted)


def test_it_works_on_models_of_transformers(bert: str) -> None:
    from transformers import AutoModel

    small = AutoModel.from_pretrained(bert).eval()
    large = AutoModel.from_pretrained(bert).eval()
    ids = torch.randint(5, small.config.vocab_size, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])}
    two = LearngenePool([small, large], [batch])
    with torch.no_grad():
        wanted = large(**batch).last_hidden_state
        same = two.stitched(Stitch(1, 1, 0, 1))(**batch).last_hidden_state
        other = two.stitched(Stitch(0, 1, 0, 1))(**batch).last_hidden_state
    assert torch.equal(same, wanted)
    assert other.shape == wanted.shape


@pytest.mark.parametrize(
    ("widths", "depths", "options"),
    [
        ((4,), (4,), {}),
        ((4, 8), (4, 5), {}),
        ((4, 8), (4, 4), {"kernel": 0}),
        ((4, 8), (4, 4), {"stride": 0}),
    ],
)
def test_what_is_no_pool_is_refused(
    widths: tuple[int, ...], depths: tuple[int, ...], options: dict[str, int]
) -> None:
    made = [Encoder(width, depth).double() for width, depth in zip(widths, depths, strict=True)]
    with pytest.raises(InvalidOption, match="two instances or more with equally many blocks"):
        LearngenePool(made, batches(), **options)


def test_stitches_need_a_start_and_lead_upwards() -> None:
    with pytest.raises(InvalidOption, match=r"the pair \(0, 1\) has no start"):
        LearngenePool([Encoder(4), Encoder(8)])
    for stitch in (Stitch(1, 0, 0, 1), Stitch(0, 1, 0, 3), Stitch(0, 0, 4, 1)):
        with pytest.raises(InvalidOption, match="the pool has no Stitch"):
            pool(4, 8).stitched(stitch)


def test_it_is_called_by_its_own_name() -> None:
    with pytest.raises(Incompatible, match="LearngenePool"):
        rf.compress(nn.Linear(3, 3), "learngene-pool", progress=False)
