"""OPCM: models are merged one after the other, each projected away from what is merged already."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rankfold.errors import Incompatible, InvalidOption
from rankfold.merging.papers.opcm import opcm, without_overlap
from rankfold.merging.sources import Sources


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """A tall and a wide matrix, a bias, and a table of embeddings, with random values."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, dtype=torch.float64)
        self.up = nn.Linear(4, 7, dtype=torch.float64)
        self.down = nn.Linear(7, 3, bias=False, dtype=torch.float64)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=100 * seed + number)


def merged(models: Sequence[nn.Module], base: nn.Module, **options: object) -> dict[str, Tensor]:
    with Sources(list(models), base=base) as sources:
        return dict(opcm(sources, **options))  # type: ignore[arg-type]


def full_projection(change: Tensor, delta: Tensor, alpha: float) -> Tensor:
    """The paper's projection by square singular matrices, for a delta of full rank."""
    left, values, right = torch.linalg.svd(delta, full_matrices=True)
    split = int((values.cumsum(0) / values.sum() > alpha).int().argmax()) if alpha < 1 else len(values)
    inner = left.T @ change @ right.T
    inner.fill_diagonal_(0)
    inner[:split, :split] = 0
    return left @ inner @ right


def paper(models: Sequence[Net], base: Net, alpha: float) -> dict[str, Tensor]:
    """The paper's procedure word for word: the merged model is rescaled after every arrival."""
    start = base.state_dict()
    tasks = [{name: value - start[name] for name, value in model.state_dict().items()} for model in models]
    norms = [torch.cat([value.flatten() for value in task.values()]).norm() for task in tasks]
    delta, factor = tasks[0], torch.ones((), dtype=torch.float64)
    for count, task in enumerate(tasks[1:], start=2):
        for name, change in task.items():
            linear = name in ("up.weight", "down.weight")
            change = full_projection(change, delta[name], alpha) if linear else change
            delta[name] = factor * delta[name] + change
        size = torch.cat([value.flatten() for value in delta.values()]).norm()
        factor = size / (sum(norms[:count]) / count)
        delta = {name: value / factor for name, value in delta.items()}
    return {name: start[name] + value for name, value in delta.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_it_is_the_paper_s_procedure_by_full_singular_matrices(alpha: float) -> None:
    base, models = Net(0), [Net(seed) for seed in range(1, 5)]
    found, expected = merged(models, base, alpha=alpha), paper(models, base, alpha)
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-10), name


@settings(max_examples=25, deadline=None)
@given(alpha=st.floats(0, 1), rank=st.integers(0, 6), rows=st.integers(2, 9), columns=st.integers(2, 9))
def test_what_is_added_is_orthogonal_to_what_is_merged(
    alpha: float, rank: int, rows: int, columns: int
) -> None:
    delta = normal(rows, rank, seed=rank) @ normal(rank, columns, seed=rows)
    added = without_overlap(normal(rows, columns, seed=7), delta, alpha)
    assert abs(float((delta * added).sum())) < 1e-10 * max(1.0, float(delta.norm()))


def test_the_merged_change_has_the_mean_norm_of_the_models_changes() -> None:
    base, models = Net(0), [Net(seed) for seed in range(1, 5)]

    def distance(state: dict[str, Tensor]) -> Tensor:
        return torch.cat(
            [(state[name] - value).flatten() for name, value in base.state_dict().items()]
        ).norm()

    for count in range(1, 5):
        own = torch.stack([distance(model.state_dict()) for model in models[:count]])
        assert torch.allclose(distance(merged(models[:count], base)), own.mean())


def test_the_divisor_grows_about_as_the_root_of_the_number_of_models() -> None:
    changes = [normal(40, 30, seed=seed) for seed in range(4)]
    total = changes[0]
    for count, change in enumerate(changes[1:], start=2):
        total = total + without_overlap(change, total, 0.5)
        mean = torch.stack([one.norm() for one in changes[:count]]).mean()
        assert 0.9 * count**0.5 < float(total.norm() / mean) < count**0.5


def test_one_model_is_that_model() -> None:
    model = Net(1)
    for name, value in merged([model], Net(0)).items():
        assert torch.allclose(value, model.state_dict()[name], atol=1e-13)


def test_models_that_are_the_base_give_the_base() -> None:
    base = Net(0)
    for name, value in merged([Net(0), Net(0)], base).items():
        assert torch.equal(value, base.state_dict()[name])


def test_a_change_inside_the_leading_subspace_adds_nothing() -> None:
    delta = normal(9, 7)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    block = int((values.cumsum(0) / values.sum() <= 0.6).sum())
    inside = left[:, :block] @ normal(block, block, seed=3) @ right[:block]
    outside = left[:, block:] @ normal(7 - block, block, seed=4) @ right[:block]
    assert block >= 2
    assert float(without_overlap(inside, delta, 0.6).norm()) < 1e-12
    assert torch.allclose(without_overlap(inside + outside, delta, 0.6), outside, atol=1e-12)


def test_what_lies_outside_all_singular_vectors_is_kept() -> None:
    delta, change = normal(9, 4), normal(9, 4, seed=1)
    left = torch.linalg.svd(delta, full_matrices=False)[0]
    outside = change - left @ (left.T @ change)
    assert torch.allclose(without_overlap(outside, delta, 1.0), outside, atol=1e-12)


def test_alpha_one_closes_the_whole_spectrum() -> None:
    delta, change = normal(6, 6), normal(6, 6, seed=1)
    sizes = [float(without_overlap(change, delta, alpha).norm()) for alpha in (0.0, 0.5, 0.9, 1.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 1e-12 < sizes[-2]


def test_the_arbitrary_basis_beyond_the_rank_has_no_influence() -> None:
    delta, change = normal(10, 2) @ normal(2, 14, seed=1), normal(10, 14, seed=2)

    def turning_the_rest(space: Tensor, seed: int) -> Tensor:
        full = torch.linalg.qr(space, mode="complete").Q
        turned = full.clone()
        turned[:, 2:] = full[:, 2:] @ torch.linalg.qr(normal(len(full) - 2, len(full) - 2, seed=seed)).Q
        return turned @ full.T

    left, right = turning_the_rest(delta[:, :2], 3), turning_the_rest(delta.T[:, :2], 4)
    assert torch.allclose(left @ delta @ right.T, delta, atol=1e-10)
    turned = without_overlap(left @ change @ right.T, delta, 0.5)
    assert torch.allclose(turned, left @ without_overlap(change, delta, 0.5) @ right.T, atol=1e-10)


class One(nn.Module):
    """A model of one matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


def every_order(changes: Sequence[Tensor]) -> list[Tensor]:
    base = One(torch.zeros_like(changes[0]))
    orders = itertools.permutations(changes)
    return [merged([One(change) for change in order], base)["weight"] for order in orders]


def test_the_order_of_tasks_in_orthogonal_subspaces_does_not_matter() -> None:
    left, right = torch.linalg.qr(normal(9, 6)).Q.split(2, 1), torch.linalg.qr(normal(8, 6)).Q.split(2, 1)
    first, *others = every_order([u @ normal(2, 2) @ v.T for u, v in zip(left, right, strict=True)])
    assert all(torch.allclose(other, first, atol=1e-12) for other in others)


def test_the_order_of_overlapping_tasks_matters_and_none_is_favoured_by_norm() -> None:
    first, *others = every_order([normal(6, 6, seed=seed) for seed in range(3)])
    assert all(torch.allclose(other.norm(), first.norm()) for other in others)
    assert not any(torch.allclose(other, first, atol=1e-3) for other in others)


def test_weights_multiply_the_changes() -> None:
    base, models = Net(0), [Net(1), Net(2)]
    with Sources(models, base=base, weights=[2.0, 1.0]) as sources:
        found = dict(opcm(sources))
    start, double = base.state_dict(), Net(1)
    double.load_state_dict({name: 2 * value - start[name] for name, value in models[0].state_dict().items()})
    expected = merged([double, models[1]], base)
    assert all(torch.allclose(found[name], value, atol=1e-12) for name, value in expected.items())


@pytest.mark.parametrize(("plain", "projected"), [(None, False), ((), True), (("*",), False)])
def test_only_matrices_that_meet_an_input_are_projected(plain: object, projected: bool) -> None:
    options = {} if plain is None else {"plain": plain}
    found = merged([Net(1), Net(2)], Net(0), alpha=1.0, **options)["embedding.weight"]
    start, first, second = (Net(seed).embedding.weight.data for seed in range(3))
    summed, change = (first - start) + (second - start), found - start
    aligned = float((summed * change).sum() / summed.norm() / change.norm())
    assert (aligned < 0.99) is projected


class Counting(Sources):
    """Sources that count how many of the tensors they gave are still held."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.given: list[weakref.ref[Tensor]] = []
        self.most = 0

    def read(self, which: int | None, name: str) -> Tensor:
        tensor = super().read(which, name).clone()
        self.given = [one for one in [*self.given, weakref.ref(tensor)] if one() is not None]
        self.most = max(self.most, len(self.given))
        return tensor


def test_no_more_tensors_are_held_for_many_models_than_for_two() -> None:
    held = []
    for count in (2, 6):
        with Counting([Net(seed) for seed in range(1, count + 1)], base=Net(0)) as sources:
            for _ in opcm(sources):
                pass
            held.append(sources.most)
    assert held[0] == held[1] <= 3


def test_without_a_base_and_with_an_impossible_alpha_it_refuses() -> None:
    with Sources([Net(1), Net(2)]) as sources, pytest.raises(Incompatible, match="pass base="):
        dict(opcm(sources))
    with pytest.raises(InvalidOption, match=r"alpha=1.5 must lie between 0 and 1"):
        merged([Net(1)], Net(0), alpha=1.5)
