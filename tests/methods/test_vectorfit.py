"""VectorFit: all singular values train, and those of the weights that have moved most rest for a while."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._dynamic import PATHS, Training, resumes
from methods._layers import adapted, base, change, count, disturbed, leaves_of, linear, normal, rank_of

import rankfold as rf
from rankfold.errors import InvalidOption


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_the_change_is_diagonal_in_all_singular_bases_and_of_full_rank(shape: tuple[int, int]) -> None:
    model = disturbed(adapted("vectorfit", linear(*shape)))
    assert count(model) == 6
    left, _, right = torch.linalg.svd(base(model), full_matrices=False)
    inside = left.T @ change(model) @ right.T
    torch.testing.assert_close(inside, torch.diag(torch.diagonal(inside)))
    assert rank_of(change(model)) == 6


def test_the_singular_values_are_scaled_to_any_others_exactly() -> None:
    model = adapted("vectorfit")
    left, values, right = torch.linalg.svd(base(model), full_matrices=False)
    factors = normal(6).abs()
    leaves_of(model)["offset"].data.copy_(values * (factors - 1))
    x = normal(5, 8)
    torch.testing.assert_close(model(x), x @ (left * values * factors @ right).T + linear()[0].bias)


def recipe(**options: Any) -> rf.Recipe:
    return rf.Recipe(("vectorfit", {"freeze": 1, "interval": 5, "beta": 0.8, **options}))


def _vectors(training: Training) -> list[torch.Tensor]:
    return [leaves_of(training.model, path)["offset"].detach().clone() for path in PATHS]


def test_between_two_choices_the_strongest_vectors_rest_bit_for_bit_and_their_moments_too() -> None:
    training = Training(recipe(freeze=2, warmup=0.25), 40, rank=None)
    averages, rested = torch.zeros(3), []
    for step in range(1, 41):
        before = _vectors(training)
        training.step()
        after = _vectors(training)
        resting = [torch.equal(*pair) for pair in zip(before, after, strict=True)]
        assert resting == (rested or [False] * 3), step
        strengths = torch.tensor([float(vector.abs().mean()) for vector in after])
        averages = 0.8 * averages + 0.2 * strengths
        remembered = [training.run.memory(f"{path}:offset")["strength"] for path in PATHS]
        torch.testing.assert_close(torch.tensor(remembered), averages)
        if step >= 10 and step % 5 == 0:
            rested = [bool(each) for each in averages >= averages.sort().values[1]]
            parameters = [leaves_of(training.model, path)["offset"] for path in PATHS]
            moments = [training.optimizer.state[p]["exp_avg"].clone() for p in parameters]
        elif rested:
            now = [training.optimizer.state[p]["exp_avg"] for p in parameters]
            assert [torch.equal(*pair) for pair in zip(moments, now, strict=True)] == rested
    assert sum(rested) == 2


def test_vectors_take_turns() -> None:
    training, seen = Training(recipe(warmup=0.0, beta=0.0), 60, rank=None, rate=0.05), set()
    for _ in range(60):
        training.step()
        seen.add(next((p for p in PATHS if training.run.memory(f"{p}:offset").get("frozen")), None))
    assert len(seen - {None}) > 1


def test_without_freezing_there_is_nothing_to_attach() -> None:
    assert not Training("vectorfit", rank=None).handle.methods


def test_a_training_that_is_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    resumes(recipe(), tmp_path, rank=None)


def test_freezing_all_vectors_and_options_out_of_range_are_refused() -> None:
    with pytest.raises(InvalidOption, match="below the 3 vectors"):
        Training(recipe(freeze=3), rank=None)
    for options in ({"freeze": -1}, {"interval": 0}, {"warmup": 1.0}, {"beta": 1.0}):
        with pytest.raises(InvalidOption, match=next(iter(options))):
            Training(recipe(**options), rank=None)
