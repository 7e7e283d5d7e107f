"""LoRE-Merging: a shared base and low-rank changes, estimated together."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankfold.errors import InvalidOption
from rankfold.merging.papers.lore_merging import estimate, lore_merging, shrunk
from rankfold.merging.parts import Parts


def matrices(count: int = 4, rows: int = 7, columns: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)


def parts(models: Tensor, weights: tuple[float, ...] | None = None, name: str = "w") -> Parts:
    return Parts(name, tuple(models), weights or (1.0,) * len(models))


def objective(models: Tensor, base: Tensor, changes: Tensor, mu: float) -> float:
    nuclear = torch.linalg.svdvals(changes).sum()
    return float((base + changes - models).square().sum() + mu * nuclear)


def test_no_half_step_raises_the_objective() -> None:
    models, mu = matrices(), 1.5
    base, changes = models.mean(0), torch.zeros_like(models)
    reached = [objective(models, base, changes, mu)]
    for _ in range(20):
        changes, _ = shrunk(models - base, mu / 2)
        reached.append(objective(models, base, changes, mu))
        base = (models - changes).mean(0)
        reached.append(objective(models, base, changes, mu))
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(reached))
    assert reached[-1] < 0.9 * reached[0]


def test_no_sweep_raises_the_objective() -> None:
    models, mu = matrices(), 0.3
    found = [estimate(models, mu, iterations=count, tolerance=0.0) for count in range(1, 40)]
    reached = [objective(models, base, changes, mu) for base, changes in found]
    assert all(after <= before + 1e-10 for before, after in itertools.pairwise(reached))


def test_a_hundred_sweeps_come_near_the_minimum_where_plain_ones_do_not() -> None:
    models = matrices(3, 8, 6) + 5 * matrices(3, 8, 1, seed=1) @ matrices(3, 1, 6, seed=2)
    mu = 0.1
    base = models.mean(0)
    for _ in range(100):
        changes, _ = shrunk(models - base, mu / 2)
        base = (models - changes).mean(0)
    plain = objective(models, base, changes, mu)
    least = objective(models, *estimate(models, mu, iterations=1500, tolerance=0.0), mu)
    reached = objective(models, *estimate(models, mu, iterations=100, tolerance=0.0), mu)
    assert reached < 1.01 * least < 1.05 * least < plain


def test_at_the_end_base_and_changes_satisfy_the_conditions_of_a_minimum() -> None:
    models, mu = matrices(), 1.5
    base, changes = estimate(models, mu, iterations=5000, tolerance=0.0)
    rest = models - base - changes  # a subgradient of mu/2 times the nuclear norm at every change
    assert float(rest.mean(0).abs().max()) < 1e-12
    assert float(torch.linalg.matrix_norm(rest, 2).max()) <= mu / 2 * (1 + 1e-6)
    inner, nuclear = (rest * changes).sum((1, 2)), torch.linalg.svdvals(changes).sum(1)
    assert torch.allclose(inner, mu / 2 * nuclear, rtol=1e-6)


def test_the_threshold_is_the_one_that_minimises_the_penalised_square() -> None:
    change, values = shrunk(torch.tensor([[3.0]], dtype=torch.float64), 1.0)
    # (d - 3)^2 + mu |d| with mu = 2 is least at d = 2
    assert change.item() == pytest.approx(2.0)
    assert values.tolist() == pytest.approx([2.0])


@settings(max_examples=15, deadline=None)
@given(mu=st.floats(0.0, 20.0), iterations=st.integers(1, 6))
def test_averaged_changes_and_scale_one_give_the_plain_average_whatever_mu(
    mu: float, iterations: int
) -> None:
    models = matrices()
    weights = (1 / len(models),) * len(models)
    merged = lore_merging(parts(models, weights), mu=mu, iterations=iterations)
    assert torch.allclose(merged, models.mean(0), atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 9, 6), (3, 6, 9), (2, 5, 5)])
@pytest.mark.parametrize("threshold", [0.0, 1e-3, 1.0, 100.0])
def test_singular_values_are_lowered_and_singular_vectors_kept(
    shape: tuple[int, ...], threshold: float
) -> None:
    given = matrices(*shape)
    given[0] = given[0, :, :1] @ given[0, :1]  # of rank 1
    left, values, right = torch.linalg.svd(given, full_matrices=False)
    lowered = (values - threshold).clamp(min=0)
    found, singular = shrunk(given, threshold)
    assert torch.allclose(found, left * lowered[:, None] @ right, atol=1e-9)
    assert torch.allclose(singular.sum(-1), lowered.sum(-1), atol=1e-6)


def test_a_common_base_and_changes_of_rank_two_are_recovered() -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tasks, size, rank = 8, 40, 2
    base, true = normal(size, size), normal(tasks, size, rank) @ normal(tasks, rank, size)
    models = base + true + 0.01 * normal(tasks, size, size)
    found, changes = estimate(models, 1.0, iterations=100, tolerance=1e-9)
    assert torch.linalg.matrix_rank(changes).tolist() == [rank] * tasks
    assert float((found - base).norm()) < 0.1 * float((models.mean(0) - base).norm())
    merged, ideal = lore_merging(parts(models), mu=1.0), base + true.sum(0)
    assert float((merged - ideal).norm()) < 0.1 * float((models.mean(0) - ideal).norm())


def test_a_large_mu_gives_the_average() -> None:
    models = matrices()
    base, changes = estimate(models, 1e3, iterations=10, tolerance=0.0)
    assert not changes.any()
    assert torch.equal(base, models.mean(0))
    assert torch.equal(lore_merging(parts(models), mu=1e3, scale=3.0), models.mean(0))


def test_without_a_price_the_descent_stays_at_its_start() -> None:
    models = matrices()
    base, changes = estimate(models, 0.0, iterations=10, tolerance=0.0)
    assert torch.allclose(base, models.mean(0))
    assert torch.allclose(changes, models - models.mean(0))


def test_weights_and_scale_multiply_the_changes() -> None:
    models, weights = matrices(2), (0.5, 2.0)
    base, (first, second) = estimate(models, 0.5, iterations=7, tolerance=0.0)
    merged = lore_merging(parts(models, weights), mu=0.5, scale=3.0, iterations=7, tolerance=0.0)
    assert torch.allclose(merged, base + 3 * (0.5 * first + 2 * second))


def test_the_tolerance_ends_the_descent() -> None:
    models = matrices()
    once, _ = estimate(models, 1.5, iterations=2, tolerance=0.0)
    loose, _ = estimate(models, 1.5, iterations=100, tolerance=1.0)
    tight, _ = estimate(models, 1.5, iterations=100, tolerance=0.0)
    assert torch.equal(loose, once)
    assert not torch.allclose(tight, once)


@pytest.mark.parametrize(
    ("shape", "name"), [((6,), "w"), ((6, 1), "w"), ((3, 2, 2), "w"), ((4, 3), "embed.w")]
)
def test_other_tensors_are_averaged(shape: tuple[int, ...], name: str) -> None:
    models = torch.arange(2.0 * torch.Size(shape).numel()).reshape(2, *shape)
    merged = lore_merging(parts(models, (5.0, 5.0), name), mu=0.0, scale=9.0, plain=("embed*",))
    assert torch.equal(merged, models.mean(0))


@pytest.mark.parametrize("options", [{"mu": -1.0}, {"iterations": 0}, {"tolerance": -0.1}])
def test_impossible_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InvalidOption, match="must be 0 or more"):
        lore_merging(parts(matrices()), **options)
