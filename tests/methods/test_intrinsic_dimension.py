"""Intrinsic dimension: everything moves in one subspace of all weights together."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from methods._subspace import PATHS, loss_of, perceptron, projection_of, train, weights_of
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption

KINDS = ("fastfood", "sparse", "dense")


def adapted(**options: Any) -> nn.Module:
    return rf.adapt(perceptron(), "intrinsic-dimension", **{"dimension": 12, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_at_theta_0_and_stays_in_its_subspace(kind: str) -> None:
    model, start = adapted(projection=kind), weights_of(perceptron())
    assert torch.equal(weights_of(model), start)
    train(model, 5)
    change = weights_of(model) - start
    basis = torch.linalg.qr(projection_of(model).dense()).Q
    assert change.norm() > 1e-3
    assert (change - basis @ (basis.T @ change)).norm() < 1e-12 * change.norm()


def test_all_weights_share_one_vector_and_one_projection() -> None:
    model = adapted()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["rankfold_default_theta"]
    assert projection_of(model).shape == (6 * 9 + 9 * 7 + 7 * 5, 12)
    leaves = [model.get_submodule(path).expression.leaf("change") for path in PATHS]
    assert len({id(leaf.projection) for leaf in leaves}) == 1
    assert rf.plan(perceptron(), "intrinsic-dimension", dimension=12).trainable == 12


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_columns_have_length_one_over_all_weights_and_not_over_each(kind: str) -> None:
    matrix = projection_of(adapted(projection=kind)).dense()
    torch.testing.assert_close(matrix.norm(dim=0), torch.ones(12).double())
    assert (matrix[:54].norm(dim=0) < 0.99).any()


def wide(kind: str, **options: Any) -> Tensor:
    model = rf.adapt(nn.Sequential(nn.Linear(60, 50)), "intrinsic-dimension", projection=kind, **options)
    return projection_of(model).dense()


def test_fastfood_columns_have_lengths_near_one_and_hardly_meet() -> None:
    matrix = wide("fastfood", dimension=40)
    assert matrix.shape == (3000, 40)
    assert ((matrix.norm(dim=0) - 1).abs() < 0.05).all()
    assert (matrix.T @ matrix - torch.diag(matrix.square().sum(0))).abs().max() < 0.1


def test_sparse_entries_are_as_many_as_its_density_says_and_of_either_sign() -> None:
    matrix = wide("sparse", dimension=40)
    count = int((matrix != 0).sum())
    expected = 3000 * 40 / 3000**0.5
    assert abs(count - expected) < 5 * expected**0.5
    assert abs(int((matrix > 0).sum()) - count / 2) < 3 * count**0.5
    for column in matrix.T:
        assert column[column != 0].abs().unique().numel() == 1


def test_no_column_of_a_small_sparse_projection_is_empty() -> None:
    for seed in range(20):
        model = rf.adapt(
            nn.Sequential(nn.Linear(4, 2)), "intrinsic-dimension", projection="sparse", seed=seed
        )
        assert projection_of(model).dense().any(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_gradient_descent_is_that_of_the_projected_gradient(kind: str) -> None:
    model, plain = adapted(projection=kind), perceptron()
    train(model, 1)
    weights = [plain.get_submodule(path).weight for path in PATHS]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(plain), weights)])
    matrix = projection_of(model).dense()
    wanted = weights_of(plain) - 0.3 * matrix @ (matrix.T @ gradient)
    torch.testing.assert_close(weights_of(model), wanted)


def test_with_as_many_dimensions_as_weights_and_an_orthogonal_projection_it_is_full_training() -> None:
    model, plain = adapted(projection="dense", dimension=10_000), perceptron()
    matrix = projection_of(model)
    assert matrix.shape == (152, 152)  # more dimensions than weights there cannot be
    matrix.value.copy_(torch.linalg.qr(matrix.value).Q)
    weights = [plain.get_submodule(path).weight for path in PATHS]
    train(model, 5)
    train(plain, 5, torch.optim.SGD(weights, lr=0.3))
    torch.testing.assert_close(weights_of(model), weights_of(plain))


def test_a_file_holds_the_vector_alone_and_another_seed_is_another_subspace(tmp_path: Path) -> None:
    model = adapted()
    train(model, 3)
    rf.save(model, tmp_path / "adapter")
    tensors = safetensors.torch.load_file(next((tmp_path / "adapter").glob("*.safetensors")))
    assert [tuple(t.shape) for t in tensors.values()] == [(12,)]
    assert not any("projection" in name for name in model.state_dict())
    assert torch.equal(weights_of(rf.load(perceptron(), tmp_path / "adapter")), weights_of(model))
    assert not torch.allclose(projection_of(adapted(seed=1)).dense(), projection_of(model).dense())


def test_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = adapted()
    optimizer = train(whole, 4, torch.optim.Adam(rf.param_groups(whole, lr=0.05)))
    rf.save(whole, tmp_path / "adapter")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    again = rf.load(perceptron(), tmp_path / "adapter")
    resumed = torch.optim.Adam(rf.param_groups(again, lr=0.05))
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(whole, 5, optimizer)
    train(again, 5, resumed)
    assert torch.equal(weights_of(again), weights_of(whole))


@pytest.mark.parametrize("wrong", [{"dimension": 0}, {"projection": "fast"}], ids=str)
def test_impossible_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=f"intrinsic-dimension: {next(iter(wrong))} must be"):
        adapted(**wrong)


# The sweep --------------------------------------------------------------------------------------------


def test_a_sweep_ends_at_the_first_dimension_that_is_enough_for_every_seed() -> None:
    asked: list[tuple[int | None, int]] = []

    def score(dimension: int | None, seed: int) -> float:
        asked.append((dimension, seed))
        return 2.0 if dimension is None else 2.0 * min(1.0, dimension / (10 * (1 + seed)))

    found = rf.intrinsic_dimension_of(score, [30, 9, 3, 18], seeds=(0, 1))
    assert found.reached == {0: 9, 1: 18}
    assert found.dimension == 13.5
    assert found.full == {0: 2.0, 1: 2.0}
    assert asked == [(None, 0), (None, 1), (3, 0), (9, 0), (3, 1), (9, 1), (18, 1)]
    assert rf.intrinsic_dimension_of(score, [3], seeds=(0, 1)).dimension is None


@pytest.mark.parametrize(
    "wrong", [{"share": 0.0}, {"share": 1.1}, {"dimensions": []}, {"dimensions": [0]}, {"seeds": ()}], ids=str
)
def test_a_sweep_over_nothing_is_refused(wrong: dict[str, Any]) -> None:
    given = {"dimensions": [3], **wrong}
    with pytest.raises(InvalidOption, match="intrinsic_dimension_of"):
        rf.intrinsic_dimension_of(lambda dimension, seed: 1.0, **given)


def test_a_share_of_a_negative_score_is_refused() -> None:
    with pytest.raises(InvalidOption, match="needs positive scores"):
        rf.intrinsic_dimension_of(lambda dimension, seed: -0.5, [3])


def test_digits_need_a_small_share_of_the_dimensions_of_a_network() -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, digits = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def score(dimension: int | None, seed: int) -> float:
        model = copy.deepcopy(fresh)
        if dimension is not None:
            rf.adapt(model, "intrinsic-dimension", dimension=dimension, seed=seed)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=0.03 if dimension is None else 0.3)
        for _ in range(25):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels[:400]), digits[:400]).backward()
            optimizer.step()
        return float((model(pixels[400:]).argmax(1) == digits[400:]).float().mean())

    found = rf.intrinsic_dimension_of(score, [3, 300], share=0.85)
    assert found.dimension == 300  # of 2,368
