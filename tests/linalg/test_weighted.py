"""The weighted approximation is the best of its rank under every metric, inverse or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg.matrices import gram, normal, seeds, sizes, spectral
from torch import Tensor

from rankfold.errors import InvalidOption, InvalidRank
from rankfold.linalg import (
    Diagonal,
    Gram,
    LowRank,
    Metric,
    RootGram,
    gram_low_rank,
    psd_root,
    tail_errors,
    truncated_svd,
    weighted_low_rank,
)


@st.composite
def metrics(draw: st.DrawFn, size: int) -> Metric | None:
    """Draw a metric of any kind, often of lower rank than its size."""
    kind, seed = draw(st.sampled_from([None, Diagonal, Gram, RootGram])), draw(seeds)
    if kind is None:
        return None
    if kind is Diagonal:
        zeros = draw(st.lists(st.booleans(), min_size=size, max_size=size))
        return Diagonal(normal(size, seed=seed).abs().masked_fill(torch.tensor(zeros), 0))
    return kind(gram(size, draw(st.integers(1, size)), seed))


def dense(metric: Metric | None, size: int) -> Tensor:
    if metric is None:
        return torch.eye(size, dtype=torch.float64)
    if isinstance(metric, Diagonal):
        return metric.entries.diag()
    return metric.matrix if isinstance(metric, Gram) else psd_root(metric.matrix)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, Metric | None, Metric | None]:
    rows, columns = draw(sizes), draw(sizes)
    target = normal(rows, columns, seed=draw(seeds))
    return target, draw(st.integers(1, min(rows, columns))), draw(metrics(rows)), draw(metrics(columns))


def weighted_error(near: LowRank, target: Tensor, left: Metric | None, right: Metric | None) -> float:
    rest = target - near.up @ near.down
    return float((dense(left, len(target)) @ rest @ dense(right, target.shape[1])).norm())


@given(problems())
def test_the_error_is_the_smallest_of_the_rank_and_is_what_the_result_says(
    problem: tuple[Tensor, int, Metric | None, Metric | None],
) -> None:
    target, rank, left, right = problem
    near = weighted_low_rank(target, rank, left=left, right=right)
    weighed = dense(left, len(target)) @ target @ dense(right, target.shape[1])
    spectrum = torch.linalg.svdvals(weighed)
    noise = 1e-7 * float(spectrum[0]) + 1e-12
    assert near.up.shape == (len(target), rank)
    assert near.down.shape == (rank, target.shape[1])
    assert torch.allclose(near.spectrum, spectrum, atol=noise)
    assert torch.allclose(near.values, spectrum[:rank], atol=noise)
    assert abs(near.error - float(spectrum[rank:].norm())) < noise
    assert abs(weighted_error(near, target, left, right) - near.error) < noise


@given(problems(), st.floats(0.3, 30))
def test_a_split_times_its_scaling_is_the_approximation(
    problem: tuple[Tensor, int, Metric | None, Metric | None], scaling: float
) -> None:
    target, rank, left, right = problem
    near = weighted_low_rank(target, rank, left=left, right=right)
    for balance in ("metric", "product"):
        up, down = near.split(scaling, balance=balance)
        assert torch.allclose(scaling * up @ down, near.matrix(), atol=1e-9 * float(near.matrix().norm() + 1))
    assert torch.allclose(up.T @ up, down @ down.T, atol=1e-7 * float(up.norm() ** 2 + 1))


@given(sizes, sizes, seeds, st.data())
def test_with_one_metric_the_top_and_the_bottom_terms_together_are_the_target(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    target, size = normal(rows, columns, seed=seed), min(rows, columns)
    side = data.draw(st.sampled_from(["left", "right"]))
    metric = data.draw(metrics(rows if side == "left" else columns))
    top = data.draw(st.integers(0, size))
    for form in (target, (target, torch.eye(columns)), (torch.eye(rows), target)):
        parts = [
            weighted_low_rank(form, rank, select=select, **{side: metric}).matrix()
            for rank, select in ((top, "top"), (size - top, "bottom"))
            if rank
        ]
        # Factors have as many terms as their inner dimension allows, which is all of them here.
        assert torch.allclose(sum(parts), target, atol=1e-7 * float(target.norm()))


@given(sizes, sizes, sizes, seeds, st.data())
def test_factors_give_what_their_product_gives(
    rows: int, inner: int, columns: int, seed: int, data: st.DataObject
) -> None:
    up, down = normal(rows, inner, seed=seed), normal(inner, columns, seed=seed + 1)
    rank = data.draw(st.integers(1, min(rows, inner, columns)))
    # Full rank, so that the answer is unique.
    left, right = RootGram(gram(rows, rows + 3, seed)), Diagonal(1 + normal(columns, seed=seed + 2).abs())
    factored = weighted_low_rank((up, down), rank, left=left, right=right)
    product = weighted_low_rank(up @ down, rank, left=left, right=right)
    scale = float(product.spectrum[0])
    assert torch.allclose(factored.values, product.values, atol=1e-9 * scale)
    assert abs(factored.error - product.error) < 1e-8 * scale
    assert torch.allclose(factored.matrix(), product.matrix(), atol=1e-5 * scale)
    assert factored.solver == "factored"


def test_no_metric_gives_the_truncated_decomposition_and_its_even_split() -> None:
    target = normal(7, 5)
    near = weighted_low_rank(target, 3)
    left, values, right = truncated_svd(target, 3)
    for ours, theirs in zip((near.left, near.values, near.right), (left, values, right), strict=True):
        assert torch.allclose(ours, theirs)
    up, down = near.split(2.0)
    assert torch.allclose(up, left * (values / 2).sqrt())
    assert torch.allclose(down, (values / 2).sqrt()[:, None] * right)


def test_with_the_gram_matrix_itself_the_split_is_that_of_corda() -> None:
    target, inputs = normal(6, 5), gram(5, 20)
    left, values, right = truncated_svd(target @ inputs, 2)
    up, down = weighted_low_rank(target, 2, right=Gram(inputs)).split(4.0)
    root = (values / 4).sqrt()
    assert torch.allclose(up, left * root)
    assert torch.allclose(down, root[:, None] * right @ inputs.inverse())


def test_with_row_weights_the_split_is_that_of_fila() -> None:
    target, weights = normal(6, 5), 1 + normal(6, seed=1).abs()
    left, values, right = truncated_svd(weights[:, None] * target, 2)
    up, down = weighted_low_rank(target, 2, left=Diagonal(weights)).split(4.0)
    root = (values / 4).sqrt()
    assert torch.allclose(up, left / weights[:, None] * root)
    assert torch.allclose(down, root[:, None] * right)


def test_with_two_metrics_the_split_divides_by_both() -> None:
    target, weights, inputs = normal(6, 5), 1 + normal(6, seed=1).abs(), gram(5, 20)
    left, values, right = truncated_svd(weights[:, None] * target @ inputs, 2)
    up, down = weighted_low_rank(target, 2, left=Diagonal(weights), right=Gram(inputs)).split()
    assert torch.allclose(up, left / weights[:, None] * values.sqrt())
    assert torch.allclose(down, values.sqrt()[:, None] * right @ inputs.inverse())


def test_a_gram_matrix_and_its_root_as_metrics_are_different_problems() -> None:
    target, inputs = (
        normal(8, 6),
        gram(6, 9)
        * torch.logspace(0, 2, 6, dtype=torch.float64).outer(torch.logspace(0, 2, 6, dtype=torch.float64)),
    )
    outputs = psd_root(inputs)
    errors = {
        kind: float(((target - weighted_low_rank(target, 2, right=kind).matrix()) @ outputs).norm())
        for kind in (RootGram(inputs), Gram(inputs), None)
    }
    root, whole, plain = errors.values()
    assert root < 0.9999 * whole < 0.9999 * plain


def test_any_factor_of_a_gram_matrix_and_any_scale_gives_the_same_approximation() -> None:
    target, inputs = normal(6, 5), gram(5, 12)
    near = weighted_low_rank(target, 2, right=RootGram(inputs)).matrix()
    assert torch.allclose(weighted_low_rank(target, 2, right=Gram(psd_root(inputs))).matrix(), near)
    assert torch.allclose(weighted_low_rank(target, 2, right=RootGram(1e6 * inputs)).matrix(), near)
    cholesky = torch.linalg.cholesky(inputs)
    left = torch.linalg.svd(target @ cholesky).U[:, :2]
    assert torch.allclose(left @ left.T @ target, near)


@pytest.mark.parametrize("name", ["up", "down"])
def test_no_small_change_of_a_factor_lowers_the_weighted_error(name: str) -> None:
    target, left, right = normal(6, 7), Diagonal(1 + normal(6, seed=3).abs()), RootGram(gram(7, 4))
    near = weighted_low_rank(target, 3, left=left, right=right)
    factors = {"up": near.up, "down": near.down}
    for seed in range(20):
        change = 1e-2 * normal(*factors[name].shape, seed=seed)
        moved = {**factors, name: factors[name] + change}
        rest = dense(left, 6) @ (target - moved["up"] @ moved["down"]) @ dense(right, 7)
        assert float(rest.norm()) >= near.error * (1 - 1e-12)


@pytest.mark.parametrize("factored", [False, True])
def test_directions_of_weight_zero_are_filled_with_the_largest_terms_of_the_rest(factored: bool) -> None:
    target = spectral(8, 6, torch.tensor([5.0, 4, 3, 2, 1, 0.5]))
    form = (target, torch.eye(6)) if factored else target
    metric = RootGram(gram(6, 2))
    near = weighted_low_rank(form, 4, right=metric)
    first = weighted_low_rank(form, 2, right=metric)
    rest = target - first.matrix()
    plain = float(tail_errors(torch.linalg.svdvals(rest))[2])
    assert first.error < 1e-7
    assert torch.allclose(near.up[:, :2], near.left[:, :2])
    assert abs(float((target - near.matrix()).norm()) - plain) < 1e-9


@pytest.mark.parametrize("select", [[0, 3], torch.tensor([3, 0]), torch.tensor([True, False, False, True])])
def test_terms_are_selected_by_indices_and_by_mask(select: list[int] | Tensor) -> None:
    target = spectral(5, 4, torch.tensor([4.0, 3.0, 2.0, 1.0]))
    near = weighted_low_rank(target, None, select=select)
    assert torch.allclose(near.values.sort().values, torch.tensor([1.0, 4.0], dtype=torch.float64))
    assert abs(near.error - 13**0.5) < 1e-9
    assert abs(float((target - near.matrix()).norm()) - 13**0.5) < 1e-9


def test_the_bottom_terms_are_those_of_least_weight() -> None:
    target, metric = normal(6, 5), RootGram(gram(5, 9))
    near = weighted_low_rank(target, 2, right=metric, select="bottom")
    assert torch.equal(near.values, near.spectrum[-2:])
    size = float((near.matrix() @ psd_root(metric.matrix)).norm())
    assert abs(size - float(near.values.norm())) < 1e-9


def test_the_bias_makes_the_mean_error_of_the_outputs_zero() -> None:
    target, inputs = normal(4, 6), normal(50, 6, seed=1) + 3
    near = weighted_low_rank(
        target, 2, right=RootGram(torch.cov(inputs.T, correction=0)), mean=inputs.mean(0)
    )
    errors = inputs @ (target - near.matrix()).T - near.bias
    assert errors.mean(0).abs().max() < 1e-12
    uncentred = weighted_low_rank(target, 2, right=RootGram(inputs.T @ inputs / 50), mean=inputs.mean(0))
    other = inputs @ (target - uncentred.matrix()).T - uncentred.bias
    assert errors.square().sum() < other.square().sum()
    assert abs(float(errors.square().sum() / 50) - near.error**2) < 1e-9


def test_no_mean_gives_no_bias() -> None:
    assert weighted_low_rank(normal(3, 3), 1).bias is None


@pytest.mark.parametrize("kind", [Diagonal, Gram, RootGram])
def test_heavy_damping_gives_the_plain_approximation_and_light_damping_the_weighted_one(kind: type) -> None:
    target, matrix = normal(6, 5), gram(5, 8)
    metric = kind(matrix.diagonal() if kind is Diagonal else matrix)
    plain, weighted = (weighted_low_rank(target, 2, right=m).matrix() for m in (None, metric))
    heavy, light = (weighted_low_rank(target, 2, right=metric, damping=d).matrix() for d in (1e9, 1e-12))
    assert torch.allclose(heavy, plain, atol=1e-6)
    assert torch.allclose(light, weighted, atol=1e-6)
    assert not torch.allclose(plain, weighted, atol=1e-2)


def test_a_damped_root_asks_for_outputs_and_weights_together() -> None:
    target, inputs = normal(6, 5), gram(5, 3)
    near = weighted_low_rank(target, 2, right=RootGram(inputs), damping=0.1)
    rest = target - near.matrix()
    both = (rest @ inputs @ rest.T).trace() + 0.1 * inputs.diagonal().mean() * rest.square().sum()
    assert abs(float(both) - near.error**2) < 1e-9


def test_an_ill_conditioned_gram_matrix_in_float32_is_answered_as_well_as_in_float64() -> None:
    inputs = spectral(40, 40, torch.logspace(0, -6, 40, dtype=torch.float64))
    matrix = (inputs.T @ inputs).float()
    target = normal(30, 40).float()
    root = psd_root(matrix.double())
    single = weighted_low_rank(target, 4, right=RootGram(matrix))
    double = weighted_low_rank(target.double(), 4, right=RootGram(matrix.double()))
    error = float(((target - single.matrix()).double() @ root).norm())
    assert single.up.dtype == torch.float32
    assert error < (1 + 1e-5) * double.error


def test_the_smallest_terms_of_a_float32_target_are_not_lost_under_a_steep_gram_matrix() -> None:
    inputs = spectral(20, 20, torch.logspace(0, -5, 20, dtype=torch.float64))
    metric, target = Gram((inputs.T @ inputs).float().double()), normal(20, 20).float()
    single = weighted_low_rank(target, 3, right=metric, select="bottom")
    double = weighted_low_rank(target.double(), 3, right=metric, select="bottom")
    assert torch.allclose(single.values.double(), double.values, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_answered_in_float32(dtype: torch.dtype) -> None:
    target = normal(5, 4).to(dtype)
    near = weighted_low_rank(target, 4, right=Diagonal(torch.ones(4, dtype=dtype)))
    assert near.up.dtype == near.down.dtype == near.values.dtype == torch.float32
    assert torch.allclose(near.matrix(), target.float(), atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_target_of_zeros_has_finite_factors_of_zero_product(side: str) -> None:
    target, metric = torch.zeros(4, 4), RootGram(gram(4, 2))
    sides = ["left", "right"] if side == "both" else [side]
    near = weighted_low_rank(target, 3, **dict.fromkeys(sides, metric))
    parts = [near.up, near.down, *near.split(2.0), *near.split(2.0, balance="product")]
    assert all(bool(part.isfinite().all()) for part in parts)
    assert near.error == 0
    assert not near.matrix().any()


def test_the_result_keeps_no_graph() -> None:
    near = weighted_low_rank(torch.nn.Parameter(normal(4, 3)), 2)
    assert not near.up.requires_grad


def decaying(power: float) -> Tensor:
    return spectral(120, 90, torch.arange(1, 91, dtype=torch.float64) ** -power)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("power", [0.25, 1.0, 3.0])
def test_the_randomised_solver_says_how_far_it_may_be_from_the_best(power: float) -> None:
    target, metric = decaying(power), RootGram(gram(90, 60))
    exact = weighted_low_rank(target, 6, right=metric)
    for iterations in (1, 2, 4, 8):
        near = weighted_low_rank(
            target, 6, right=metric, solver="randomised", iterations=iterations, generator=seeded()
        )
        above = weighted_error(near, target, None, metric) / exact.error - 1
        assert near.solver == "randomised"
        assert -1e-9 < above < max(1.5 * near.excess, 1e-7) < 0.2
        assert len(near.spectrum) == 16
        assert (near.spectrum <= exact.spectrum[:16] * (1 + 1e-9)).all()


def test_a_randomised_result_that_misses_its_tolerance_is_replaced_by_the_exact_one() -> None:
    target = decaying(0.25)
    exact = weighted_low_rank(target, 6)
    options = {"solver": "randomised", "iterations": 0, "generator": seeded()}
    missed, met = (weighted_low_rank(target, 6, tolerance=t, **options) for t in (1e-6, 0.5))
    assert (missed.solver, met.solver) == ("exact", "randomised")
    assert torch.equal(missed.matrix(), exact.matrix())
    assert met.error > 1.005 * exact.error


def test_a_target_of_the_asked_rank_meets_any_tolerance() -> None:
    target = normal(50, 3) @ normal(3, 40)
    near = weighted_low_rank(target, 3, solver="randomised", tolerance=0.0, generator=seeded())
    assert near.solver == "randomised"
    assert torch.allclose(near.matrix(), target)


def test_the_randomised_solver_answers_a_target_of_zeros() -> None:
    near = weighted_low_rank(torch.zeros(30, 20), 2, solver="randomised", tolerance=0.0, generator=seeded())
    assert (near.error, near.excess, near.solver) == (0, 0, "randomised")


def test_the_randomised_solver_is_determined_by_its_generator() -> None:
    first, again = (
        weighted_low_rank(decaying(0.5), 4, solver="randomised", iterations=1, generator=seeded())
        for _ in range(2)
    )
    other = weighted_low_rank(
        decaying(0.5), 4, solver="randomised", iterations=1, generator=torch.Generator().manual_seed(4)
    )
    assert torch.equal(first.up, again.up)
    assert not torch.equal(first.up, other.up)


def test_the_signs_do_not_depend_on_the_solver_nor_on_the_sign_of_the_target() -> None:
    target = decaying(1.0)
    exact = weighted_low_rank(target, 3)
    randomised = weighted_low_rank(target, 3, solver="randomised", iterations=12, generator=seeded())
    assert torch.allclose(randomised.up, exact.up, atol=1e-6)
    assert torch.allclose(weighted_low_rank(-target, 3).up, exact.up)


NAN = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
EYE = torch.eye(2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"target": NAN}, r"the target of shape \(2, 2\) holds NaN"),
        ({"target": (NAN, EYE)}, r"a factor of the target of shape \(2, 2\) holds NaN"),
        ({"target": (EYE, torch.eye(3))}, r"\(2, 2\) and \(3, 3\) do not multiply"),
        ({"target": torch.ones(2)}, r"\(2,\) is not a matrix"),
        ({"right": Gram(NAN)}, "a Gram matrix of shape .* holds NaN"),
        ({"right": Diagonal(torch.ones(3))}, r"needs 2 entries"),
        ({"left": RootGram(torch.eye(3))}, r"needs the shape \(2, 2\)"),
        ({"left": RootGram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))}, "is not symmetric"),
        ({"left": RootGram(torch.diag(torch.tensor([1.0, -1.0])))}, "not positive semi-definite"),
        ({"damping": -1.0}, "damping must be at least 0"),
        ({"select": "middle"}, "select 'middle'"),
        ({"select": [0, 0]}, "different indices"),
        ({"select": [], "rank": None}, "at least one"),
        ({"select": [0.5], "rank": None}, "different indices"),
        ({"select": [2], "rank": None}, r"in 0\.\.1"),
        ({"select": [0, 1]}, "rank 1 is not the number of selected terms, 2"),
        ({"select": torch.tensor([True])}, r"a mask of shape \(1,\)"),
        ({"rank": None}, "with rank None"),
        ({"select": "bottom", "solver": "randomised"}, "the top terms alone"),
        ({"iterations": -1, "solver": "randomised"}, "iterations must be at least 0"),
        ({"solver": "fast"}, "solver must be"),
        ({"mean": torch.ones(3)}, r"a mean of shape \(3,\) needs 2"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, object], sentence: str) -> None:
    arguments = {"target": EYE, "rank": 1, **options}
    with pytest.raises(InvalidOption, match=sentence):
        weighted_low_rank(**arguments)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_rank_that_factors_cannot_have_is_refused(rank: int) -> None:
    with pytest.raises(InvalidRank, match=rf"rank {rank} is not in 1\.\.the number of terms = 2"):
        weighted_low_rank((normal(5, 2), normal(2, 5)), rank)


@pytest.mark.parametrize(("scaling", "balance"), [(0.0, "metric"), (-1.0, "metric"), (1.0, "even")])
def test_a_split_needs_a_positive_scaling_and_a_known_balance(scaling: float, balance: str) -> None:
    with pytest.raises(InvalidOption, match="must be"):
        weighted_low_rank(EYE, 1).split(scaling, balance=balance)


def test_the_triplets_of_the_approximation_have_orthonormal_bases() -> None:
    near = weighted_low_rank(normal(6, 5), 3, right=Gram(gram(5, 9)))
    left, values, right = near.svd()
    identity = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(left.T @ left, identity)
    assert torch.allclose(right @ right.T, identity)
    assert torch.allclose(left * values @ right, near.matrix())
    assert near.rank == 3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (9, 9)])
def test_the_eigenvectors_of_the_smaller_gram_matrix_give_the_same_product(
    shape: tuple[int, int], weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(*shape, generator=generator, dtype=torch.float64)
    inputs = torch.randn(30, shape[1], generator=generator, dtype=torch.float64)
    gram = inputs.T @ inputs / 30 if weighted else None
    right = None if gram is None else RootGram(gram)
    for rank in (1, 4, 9):
        for damping in (0.0, 0.1) if weighted else (0.0,):
            near = weighted_low_rank(target, rank, right=right, damping=damping)
            up, down, values = gram_low_rank(target, rank, gram, damping=damping)
            torch.testing.assert_close(up @ down, near.matrix())
            torch.testing.assert_close(values, near.spectrum)
            torch.testing.assert_close(up.T @ up, torch.eye(rank, dtype=torch.float64))
    with pytest.raises(InvalidRank):
        gram_low_rank(target, 10, gram)
