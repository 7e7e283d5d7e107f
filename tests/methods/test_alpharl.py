"""AlphaRL: a change extrapolated along the line of its leading triplet."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import disturbed, linear, normal
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankfold as rf
from rankfold.errors import BaseMismatch, Incompatible, InvalidOption
from rankfold.methods.dynamics.alpharl import extrapolate, line

PROGRESS = [0.1, 0.2, 0.3, 0.4]


def states(model: nn.Module, changes: list[Tensor], name: str = "0.weight") -> list[dict[str, Tensor]]:
    start = {k: v.detach().clone() for k, v in model.state_dict().items()}
    return [{**start, name: start[name] + change.view(start[name].shape)} for change in changes]


def on_a_line(noise: float = 0.0, offset: float = 0.0) -> list[Tensor]:
    """Return changes c_k u v^T, c_k linear in the progress."""
    rank_one = torch.outer(normal(6, seed=2), normal(8, seed=3))
    return [(2 * a + offset) * rank_one + noise * normal(6, 8, seed=10 + k) for k, a in enumerate(PROGRESS)]


@pytest.mark.parametrize("offset", [0.0, 0.5, -0.5])
def test_a_change_that_grows_along_a_line_is_found_to_the_last_digits(offset: float) -> None:
    # With the offset -0.5 the change passes through zero and turns its sign.
    model = linear()
    found = extrapolate(model, states(model, on_a_line(offset=offset)), PROGRESS, 1.0)
    truth = (2 + offset) / 2 * (on_a_line()[1] - on_a_line()[0]) / 0.1
    torch.testing.assert_close(found.lines["0.weight"].change(), truth)
    assert found.lines["0.weight"].r_squared == pytest.approx(1)
    assert found.lines["0.weight"].stability == pytest.approx(1)
    assert found.lines["0.weight"].share == pytest.approx(1)


def test_small_noise_makes_a_small_error() -> None:
    model = linear()
    found = extrapolate(model, states(model, on_a_line(noise=1e-3)), PROGRESS, 1.0)
    truth = (on_a_line()[1] - on_a_line()[0]) / 0.1
    reported = found.lines["0.weight"]
    assert float((reported.change() - truth).norm() / truth.norm()) < 0.01
    assert 0.99 < reported.r_squared < 1
    assert 0.99 < reported.share < 1


def test_the_line_is_the_one_component_partial_least_squares_regression() -> None:
    regression = pytest.importorskip("sklearn.cross_decomposition").PLSRegression(1, scale=True)
    tracks = normal(5, 6, seed=4) + torch.arange(1.0, 6, dtype=torch.float64)[:, None] * 3
    right = torch.nn.functional.normalize(normal(8, seed=5), dim=0)
    progress = torch.tensor([0.1, 0.15, 0.3, 0.35, 0.5], dtype=torch.float64)
    found = line([torch.outer(track, right) for track in tracks], progress, 0.9)
    regression.fit(progress[:, None].numpy(), tracks.numpy())
    predicted = torch.as_tensor(regression.predict([[0.9]])).flatten()
    torch.testing.assert_close(found.change(), torch.outer(predicted, right))
    assert found.r_squared < 1


def test_the_signs_of_the_triplets_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    from rankfold.methods.dynamics import alpharl

    changes, progress = on_a_line(noise=0.01), torch.tensor(PROGRESS, dtype=torch.float64)
    expected = line(changes, progress, 1.0)
    plain, calls = alpharl.truncated_svd, []

    def flipped(*args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(None)
        left, values, right = plain(*args, **options)
        return (-left, values, -right) if len(calls) in (2, 3) else (left, values, right)

    monkeypatch.setattr(alpharl, "truncated_svd", flipped)
    torch.testing.assert_close(line(changes, progress, 1.0).change(), expected.change())


def test_at_the_last_progress_it_is_nearly_the_leading_triplet_of_the_last_change() -> None:
    changes = on_a_line(noise=1e-3)
    left, values, right = torch.linalg.svd(changes[-1])
    best = values[0] * torch.outer(left[:, 0], right[0])
    found = line(changes, torch.tensor(PROGRESS, dtype=torch.float64), PROGRESS[-1])
    torch.testing.assert_close(found.change(), best, atol=2e-2, rtol=0)


def test_a_change_that_does_not_follow_a_line_is_reported() -> None:
    changes = [normal(6, 8, seed=20 + k) for k in range(4)]
    found = line(changes, torch.tensor(PROGRESS, dtype=torch.float64), 1.0)
    assert found.r_squared < 0.9
    assert found.stability < 0.9
    assert found.share < 0.7


def test_it_is_added_to_the_base_and_not_to_a_later_checkpoint() -> None:
    model = linear()
    start = model[0].weight.detach().clone()
    found = extrapolate(model, states(model, on_a_line()), PROGRESS, 1.0)
    assert torch.equal(model[0].weight, start)
    found.apply_to(model)
    torch.testing.assert_close(model[0].weight.detach(), start + (on_a_line()[1] - on_a_line()[0]) / 0.1)


def test_a_randomised_decomposition_finds_the_same() -> None:
    model = linear()
    exact = extrapolate(model, states(model, on_a_line(1e-3)), PROGRESS, 1.0)
    drawn = extrapolate(model, states(model, on_a_line(1e-3)), PROGRESS, 1.0, iterations=4)
    torch.testing.assert_close(drawn.lines["0.weight"].change(), exact.lines["0.weight"].change())


def test_differences_of_checkpoints_in_bfloat16_are_formed_in_float32() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).bfloat16()
    nn.init.ones_(model[0].weight)
    changes = [torch.full((6, 8), 2.0**-7 * k) for k in (1, 2)]
    found = extrapolate(model, states(model, [c.bfloat16() for c in changes]), [1.0, 2.0], 2.5)
    torch.testing.assert_close(found.lines["0.weight"].change(), torch.full((6, 8), 2.5 * 2.0**-7))


def test_folders_of_adapters_are_checkpoints(tmp_path: Path) -> None:
    rank_one = torch.outer(normal(6, seed=2), normal(8, seed=3))
    for k in (1, 2):
        model = rf.adapt(linear(), "lora", rank=1, alpha=2.0, targets=["0"])
        leaves = {leaf.name: leaf for leaf in model[0].expression.leaves()}
        leaves["up"].value.data = k / 2 * normal(6, seed=2)[:, None]
        leaves["down"].value.data = normal(8, seed=3)[None]
        rf.save(model, tmp_path / str(k))
    base = linear()
    found = extrapolate(base, [tmp_path / "1", str(tmp_path / "2")], [1, 2], 5)
    torch.testing.assert_close(found.lines["0.weight"].change(), 5 * rank_one)
    assert not hasattr(base[0], "expression")
    found.apply_to(base)
    torch.testing.assert_close(base[0].weight.detach(), linear()[0].weight.detach() + 5 * rank_one)


class Transposed(nn.Module):
    """A transposed linear, and attention, whose weights have names and forms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed, self.attention = Conv1D(8, 8), nn.MultiheadAttention(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.transposed(x)
        return self.attention(y, y, y)[0]  # type: ignore[no-any-return]


def test_adapters_of_layers_that_store_their_weight_otherwise_are_checkpoints_too(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = Transposed().double().eval()
    folders = []
    for k in (1, 2):
        model = rf.adapt(copy.deepcopy(base), "lora", rank=1, targets=["transposed", "attention.in_proj"])
        for path in ("transposed", "attention.in_proj"):
            leaves = {leaf.name: leaf for leaf in model.get_submodule(path).expression.leaves()}
            leaves["up"].value.data = 0.1 * k * normal(*leaves["up"].shape, seed=2)
            leaves["down"].value.data = normal(*leaves["down"].shape, seed=3)
        folders.append(rf.save(model, tmp_path / str(k)))
    found = extrapolate(base, folders, [1, 2], 2)
    assert set(found.lines) == {"transposed.weight", "attention.in_proj_weight"}
    x = normal(3, 2, 8)
    torch.testing.assert_close(found.apply_to(base)(x), model.eval()(x))


def test_a_convolution_is_extrapolated_as_a_matrix() -> None:
    model = nn.Sequential(nn.Conv1d(4, 6, 2)).double()
    found = extrapolate(model, states(model, on_a_line()), PROGRESS, 1.0)
    expected = model[0].weight.detach() + ((on_a_line()[1] - on_a_line()[0]) / 0.1).view(6, 4, 2)
    found.apply_to(model)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_weights_that_did_not_change_and_vectors_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).double()
    found = extrapolate(model, states(model, on_a_line()), PROGRESS, 1.0)
    assert set(found.lines) == {"0.weight"}


def test_a_part_of_a_training_reaches_what_all_of_it_learns() -> None:
    # With whitened inputs the root of the loss falls in proportion to what is left of a rank-one target.
    target, inputs = 0.5 * torch.outer(normal(6, seed=2), normal(8, seed=3)), torch.linalg.qr(normal(64, 8)).Q
    model = linear()
    start = model[0].weight.detach().clone()
    weight, found, progress = start.clone(), [], []
    for _ in range(12):
        error = inputs @ (weight - start - target).T
        progress.append(-math.sqrt(float(error.square().sum())))
        found.append(weight - start)
        weight = weight - 0.05 * error.T @ inputs
    early = extrapolate(model, states(model, found[1:5]), progress[1:5], 0.0)
    left = (early.lines["0.weight"].change() - target).norm()
    assert left < 0.01 * (found[-1] - target).norm()


# Refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "target", "sentence"),
    [
        ([0.1], 1.0, "a line needs two checkpoints or more, each with its progress, not 4 with 1"),
        ([0.2] * 4, 1.0, "progress must be finite and differ between checkpoints"),
        (PROGRESS, math.nan, "progress must be finite"),
    ],
)
def test_a_progress_that_makes_no_line_is_refused(
    progress: list[float], target: float, sentence: str
) -> None:
    model = linear()
    with pytest.raises(InvalidOption, match=sentence):
        extrapolate(model, states(model, on_a_line()), progress, target)


def test_checkpoints_that_do_not_belong_to_the_model_are_refused() -> None:
    model, found = linear(), states(linear(), on_a_line())
    with pytest.raises(BaseMismatch, match=r"0\.weight is missing"):
        extrapolate(model, [{}, *found[1:]], PROGRESS, 1.0)
    with pytest.raises(BaseMismatch, match=r"0.weight has shape \(8, 6\) and \(6, 8\) was expected"):
        extrapolate(model, [{"0.weight": torch.ones(8, 6)}, *found[1:]], PROGRESS, 1.0)
    with pytest.raises(BaseMismatch, match=r"0\.weight is missing"):
        extrapolate(model, found, PROGRESS, 1.0).apply_to(nn.Linear(8, 6))
    with pytest.raises(InvalidOption, match="does not differ from the model"):
        extrapolate(model, [model.state_dict()] * 4, PROGRESS, 1.0)


def test_a_checkpoint_with_nan_is_refused() -> None:
    model, found = linear(), on_a_line()
    found[2][0, 0] = math.nan
    with pytest.raises(InvalidOption, match="NaN"):
        extrapolate(model, states(model, found), PROGRESS, 1.0)


def test_it_is_no_dynamics_that_a_model_could_be_adapted_with() -> None:
    with pytest.raises(Incompatible, match=r"call rankfold.methods.dynamics.alpharl.extrapolate after it"):
        rf.adapt(linear(), "lora/alpharl", rank=2, targets=["0"])


def test_an_adapter_that_has_not_moved_everything_is_a_checkpoint_too(tmp_path: Path) -> None:
    folders = []
    for k in (1, 2):
        model = disturbed(rf.adapt(linear(), "dora", rank=1, targets=["0"]), 0.01 * k)
        folders.append(rf.save(model, tmp_path / str(k)))
    found = extrapolate(linear(), folders, [1, 2], 2)
    assert found.lines["0.weight"].stability > 0.9
