"""AdaRank: masks over all singular components, learned from the entropy on unlabelled data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rankfold.errors import Incompatible, InvalidOption
from rankfold.merging.masked import Masked, Start
from rankfold.merging.papers.adarank import adarank
from rankfold.merging.papers.task_arithmetic import task_arithmetic
from rankfold.merging.parts import Parts
from rankfold.merging.sources import Sources
from rankfold.merging.unlabelled import task_streams
from rankfold.statistics.finite import NotFinite


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Net(nn.Module):
    """Two layers and a head of three classes, near those of every other seed."""

    def __init__(self, seed: int, spread: float = 0.5) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8, dtype=torch.float64)
        self.second = nn.Linear(8, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 3, dtype=torch.float64)
        self.noise = nn.Dropout(0.5)
        for number, parameter in enumerate(self.parameters()):
            own = spread * normal(*parameter.shape, seed=100 * seed + number) if seed else 0.0
            parameter.data = normal(*parameter.shape, seed=number) + own

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.noise(self.first(x).tanh())
        logits: Tensor = self.head(self.second(hidden).tanh())
        return logits


BATCHES = [normal(16, 6, seed=seed) for seed in range(50, 54)]


def merged(
    models: Iterable[nn.Module] = (),
    base: nn.Module | None = None,
    data: Any = BATCHES,
    weights: list[float] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    with Sources(
        list(models) or [Net(1), Net(2)], base=base or Net(0), data=data, weights=weights
    ) as sources:
        return dict(adarank(sources, **options))


def entropy_of(state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The mean entropy of the predictions of a network with these tensors."""
    logits: Tensor = functional_call(Net(0).eval(), dict(state), (x,))
    return torch.distributions.Categorical(logits=logits).entropy().mean()  # type: ignore[no-untyped-call]


def of(changes: Tensor, **start: Any) -> Masked:
    given = {"from_mean": False, "fraction": 1.0, "coefficient": 0.3, "margin": 0.1, "temperature": 10.0}
    base = torch.zeros_like(changes[0])
    return Masked(Parts("w", tuple(changes), (1.0,) * len(changes), base), Start(**{**given, **start}))


def test_with_all_components_on_it_starts_at_task_arithmetic() -> None:
    found = merged(steps=0, weights=[1.0, 2.0], coefficient=0.4)
    with Sources([Net(1), Net(2)], base=Net(0), weights=[1.0, 2.0]) as sources:
        for name, value in found.items():
            assert torch.allclose(value, task_arithmetic(sources.parts(name), scale=0.4), atol=1e-13)


def test_around_the_mean_it_starts_with_the_leading_components_of_every_task() -> None:
    models = [Net(1), Net(2), Net(3)]
    weights = torch.stack([model.first.weight.data for model in models])
    mean, biases = weights.mean(0), torch.stack([model.first.bias.data for model in models])
    left, values, right = torch.linalg.svd(weights - mean, full_matrices=False)
    cut = (left[:, :, :2] * values[:, None, :2]) @ right[:, :2]  # 1/3 of six
    with Sources(models) as sources:
        found = dict(adarank(sources, origin="mean", steps=0))
    assert torch.allclose(found["first.weight"], mean + 2.3 * cut.sum(0), atol=1e-12)
    assert torch.allclose(found["first.bias"], biases.mean(0), atol=1e-12)  # changes from the mean cancel


def test_a_component_s_gradient_is_that_of_its_probability_also_where_it_is_off() -> None:
    changes, weight_gradient = normal(2, 6, 4), normal(6, 4, seed=3)
    matrix = of(changes, fraction=0.5, coefficient=0.7)
    (matrix.tensor() * weight_gradient).sum().backward()
    left, values, right = torch.linalg.svd(changes, full_matrices=False)
    along = torch.einsum("mn,tmk,tkn->tk", weight_gradient, left, right)
    chance = (matrix.logits / 10).sigmoid()
    assert matrix.logits.grad is not None
    assert torch.allclose(matrix.logits.grad, 0.7 * along * values * chance * (1 - chance) / 10, atol=1e-14)
    assert bool((matrix.logits[:, 2:] < 0).all())
    assert bool((matrix.logits.grad[:, 2:] != 0).all())


def test_a_masked_component_adds_nothing_and_the_others_their_whole_value() -> None:
    changes = normal(1, 6, 4)
    matrix = of(changes, coefficient=1.0)
    with torch.no_grad():
        matrix.logits.copy_(torch.tensor([[-3.0, 0.01, -0.01, 5.0]]))
    left, values, right = torch.linalg.svd(changes[0], full_matrices=False)
    kept = values * torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert torch.allclose(matrix.tensor(), left * kept @ right, atol=1e-13)


def test_a_large_component_goes_off_while_a_smaller_one_stays_and_another_comes_back() -> None:
    left, right = torch.linalg.qr(normal(6, 3)).Q, torch.linalg.qr(normal(5, 3, seed=1)).Q
    values = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
    change = left * values @ right.T
    matrix = of(change[None], fraction=0.4, coefficient=1.0)  # of five: the leading two are on
    wanted = left * torch.tensor([0.0, 3.0, 2.0]) @ right.T
    optimizer = torch.optim.Adam([matrix.logits], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        (matrix.tensor() - wanted).square().sum().backward()
        optimizer.step()
    assert (matrix.logits[0, :3] > 0).tolist() == [False, True, True]
    assert torch.allclose(matrix.tensor(), wanted, atol=1e-10)


def test_the_entropy_of_the_data_decreases_and_the_masks_are_learned() -> None:
    x = torch.cat(BATCHES)
    start, coefficients, full = (
        merged(steps=0),
        merged(steps=60, learning_rate=0.01, masks=False),
        merged(steps=60, learning_rate=0.01),
    )
    before, without, after = (float(entropy_of(state, x)) for state in (start, coefficients, full))
    assert without < before
    assert after < before
    changed = torch.linalg.svdvals(full["first.weight"] - coefficients["first.weight"])
    assert float(changed[0]) > 0.1


def test_without_masks_a_task_s_change_is_scaled_only() -> None:
    base, model = Net(0), Net(1)
    found = merged([model], base, steps=5, learning_rate=0.05, masks=False)
    for name, start in base.state_dict().items():
        change = model.state_dict()[name] - start
        factor = float(((found[name] - start) * change).sum() / change.square().sum())
        assert torch.allclose(found[name] - start, factor * change, atol=1e-12)
        assert abs(factor - 0.3) > 0.01


def test_every_step_is_one_of_adam_on_the_sum_of_the_tasks_entropies() -> None:
    start = Net(0).state_dict()
    changes = [
        {name: value - start[name] for name, value in Net(seed).state_dict().items()} for seed in (1, 2)
    ]
    rates = {name: torch.full((2,), 0.3, dtype=torch.float64, requires_grad=True) for name in start}
    streams = [BATCHES[:3], BATCHES[1:3]]
    optimizer = torch.optim.Adam(rates.values(), lr=0.01)

    def state() -> dict[str, Tensor]:
        return {
            name: start[name]
            + sum(rate * change[name] for rate, change in zip(rates[name], changes, strict=True))
            for name in start
        }

    for step in range(7):
        optimizer.zero_grad()
        tensors = state()
        sum(entropy_of(tensors, stream[step % len(stream)]) for stream in streams).backward()  # type: ignore[union-attr]
        optimizer.step()
    found = merged(data=streams, steps=7, learning_rate=0.01, masks=False)
    for name, value in state().items():
        assert torch.allclose(found[name], value, atol=1e-10), name


def test_heads_stay_the_origin_s_and_every_task_is_measured_with_its_own() -> None:
    options: dict[str, Any] = {"steps": 5, "learning_rate": 0.01, "heads": ("head.*",)}
    base, models = Net(0), [Net(1), Net(2)]
    found = merged(models, base, **options)
    assert torch.equal(found["head.weight"], base.head.weight)
    assert torch.equal(found["head.bias"], base.head.bias)
    other = Net(2)
    other.head.load_state_dict(Net(5).head.state_dict())
    assert not torch.equal(merged([models[0], other], base, **options)["first.weight"], found["first.weight"])
    around = merged(models, base, **{**options, "origin": "mean"})
    assert torch.allclose(around["head.weight"], (models[0].head.weight + models[1].head.weight) / 2)


def test_the_models_and_the_base_never_change_and_the_result_is_the_same_again() -> None:
    models, base = [Net(1), Net(2)], Net(0)
    first = merged(models, base, steps=3)
    for net, seed in ((base, 0), (models[0], 1), (models[1], 2)):
        assert all(
            torch.equal(value, Net(seed).state_dict()[name]) for name, value in net.state_dict().items()
        )
        assert net.training
        assert all(parameter.grad is None for parameter in net.parameters())
    second = merged(models, base, steps=3)
    assert all(torch.equal(value, second[name]) and not value.requires_grad for name, value in first.items())


def test_every_task_may_have_batches_of_its_own() -> None:
    here, there = BATCHES[:2], BATCHES[2:]
    options: dict[str, Any] = {"steps": 3, "learning_rate": 0.01, "heads": ("head.*",)}
    listed = merged(data=[here, there], **options)
    named = merged(data={"here": here, "there": there}, **options)
    swapped = merged(data=[there, here], **options)
    assert torch.equal(listed["first.weight"], named["first.weight"])
    assert not torch.equal(listed["first.weight"], swapped["first.weight"])


def test_streams_start_again_and_tasks_read_a_common_one_each_for_itself() -> None:
    first, second = task_streams([torch.zeros(1), torch.ones(1)], 2, torch.device("cpu"))
    assert [float(next(first).content) for _ in range(5)] == [0, 1, 0, 1, 0]
    assert float(next(second).content) == 0


class Language(nn.Module):
    """A model that takes tokens by name and gives an object with logits, as models of transformers do."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.output = nn.Linear(4, 7)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = normal(*parameter.shape, seed=10 * seed + number).float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.output(self.embedding(input_ids)))


def test_batches_by_name_lose_their_labels_and_padding_does_not_count() -> None:
    tokens = torch.tensor([[1, 2, 3, 0], [4, 5, 0, 0]])
    mask = (tokens > 0).long()
    padded = torch.where(tokens > 0, tokens, 6)
    results = [
        merged([Language(1), Language(2)], Language(0), [batch], steps=3, learning_rate=0.01)
        for batch in (
            {"input_ids": tokens, "attention_mask": mask, "labels": tokens},
            {"input_ids": padded, "attention_mask": mask},
            {"input_ids": padded, "attention_mask": torch.ones_like(mask)},
        )
    ]
    assert torch.equal(results[0]["output.weight"], results[1]["output.weight"])
    assert not torch.equal(results[0]["output.weight"], results[2]["output.weight"])


class Mixing(Net):
    """A network that mixes its inputs by a matrix that is not stored."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.register_buffer("mixing", normal(6, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x @ self.mixing)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_models_of_half_precision_are_learned_in_single(precision: torch.dtype) -> None:
    base, *models = (Mixing(seed).bfloat16() for seed in range(3))
    found = merged(models, base, [BATCHES[0].to(precision)], steps=2)
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert not torch.equal(found["first.weight"], merged(models, base, steps=0)["first.weight"])


class Renamed(Sources):
    def module(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        return nn.Sequential(super().module(tensors))


def test_a_live_model_of_other_names_than_the_files_is_refused() -> None:
    with (
        Renamed([Net(1), Net(2)], base=Net(0), data=BATCHES) as sources,
        pytest.raises(Incompatible, match=r"Sequential calls no tensor first\.weight"),
    ):
        dict(adarank(sources, steps=1))


def test_tables_of_embeddings_have_no_mask() -> None:
    found = merged([Language(1), Language(2)], Language(0), None, fraction=0.0, steps=0)
    start, first, second = (Language(seed) for seed in range(3))
    assert torch.allclose(found["output.weight"], start.output.weight, atol=1e-6)
    changes = first.embedding.weight + second.embedding.weight - 2 * start.embedding.weight
    assert torch.allclose(found["embedding.weight"], start.embedding.weight + 0.3 * changes, atol=1e-6)


class Pooler(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum()


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (BATCHES[0], "is one Tensor"),
        ([BATCHES, BATCHES, BATCHES], "for 3 tasks, and 2 models"),
        ([], "task 1 has no batch"),
        (iter(BATCHES), "no batch"),
        ([BATCHES, iter(BATCHES)], "task 2 has no batch on the second pass"),
    ],
)
def test_data_that_cannot_be_read_are_refused(data: Any, sentence: str) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        merged(data=data, steps=6)


def test_what_it_cannot_learn_from_is_refused() -> None:
    with pytest.raises(Incompatible, match="pass data="):
        merged(data=None)
    with pytest.raises(Incompatible, match="Pooler gives no logits"):
        merged([Pooler(1), Pooler(2)], Pooler(0), steps=1)
    with Sources([Net(1), Net(2)], data=BATCHES) as sources, pytest.raises(Incompatible, match="pass base="):
        dict(adarank(sources, steps=1))
    with pytest.raises(NotFinite, match="entropy at step 1 is nan"):
        merged(data=[torch.full((2, 6), torch.nan, dtype=torch.float64)], steps=1)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"origin": "zero"}, "origin must be one of base, mean"),
        ({"fraction": 1.5}, "between 0 and 1"),
        ({"steps": -1}, "0 or more"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"temperature": -1.0}, "above 0"),
        ({"margin": 0.0}, "above 0"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        merged(**options)


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_shows_the_steps_where_one_is_wanted(
    progress: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Sources([Net(1)], base=Net(0), data=BATCHES, progress=progress) as sources:
        dict(adarank(sources, steps=2))
    assert ("adarank: 100%" in capsys.readouterr().err) is progress
