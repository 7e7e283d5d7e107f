"""Weight matching: hidden units find their counterparts, and the matched models are interpolated."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, MissingDependency
from rankfold.merging.connectivity import distance
from rankfold.merging.matching import assigned, match, match_activations, match_many, matched
from rankfold.merging.papers.weight_matching import weight_matching
from rankfold.merging.permutations import Specification, named_tensors, permuted, specified
from rankfold.merging.sources import Sources
from rankfold.merging.symmetries import specification


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b, dtype=torch.float64) for a, b in itertools.pairwise(widths)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in named_tensors(model).items()}


def reader(model: nn.Module) -> Callable[[str], Tensor]:
    return tensors(model).__getitem__


def product(first: nn.Module, second: nn.Module) -> float:
    other = tensors(second)
    return float(sum((tensor * other[name]).sum() for name, tensor in tensors(first).items()))


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert {name for name in first if not torch.equal(first[name], second[name])} == set()


def merged(models: list[nn.Module], **options: Any) -> dict[str, Tensor]:
    outer = {name: options.pop(name) for name in ("weights", "data", "loss", "seed") if name in options}
    with Sources(models, **outer) as sources:
        return dict(weight_matching(sources, **options))


@pytest.mark.parametrize("hidden", [1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_permuted_copy_is_recovered_exactly(hidden: int, seed: int) -> None:
    model = chain(16, *[32] * hidden, 10, seed=seed)
    spec = specification(model)
    copy = permuted(model, spec, spec.drawn(seed + 1))
    assert not torch.equal(copy[0].weight, model[0].weight)  # type: ignore[index]
    assert_equal(tensors(matched(copy, to=model, seed=seed)), tensors(model))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), hidden=st.integers(1, 4))
def test_the_objective_never_falls_and_the_distance_never_rises(seed: int, hidden: int) -> None:
    first, second = (chain(5, *[7] * hidden, 3, seed=seed + n) for n in range(2))
    spec = specification(first)
    objectives, distances = [product(first, second)], [distance(first, second)]
    for sweeps in range(1, 6):
        found = match(reader(first), reader(second), spec, seed=seed, sweeps=sweeps)
        twin = permuted(second, spec, found.orders)
        objectives.append(product(first, twin))
        distances.append(distance(first, twin))
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(objectives))
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(distances))
    fixed = product(first, second) - found.objectives[0]  # of what no permutation moves
    assert found.objectives[-1] + fixed == pytest.approx(objectives[-1], abs=1e-10)


def test_one_hidden_layer_converges_in_one_sweep_to_the_best_of_all_permutations() -> None:
    first, second = chain(3, 5, 2, seed=1), chain(3, 5, 2, seed=2)
    spec = specification(first)
    found = match(reader(first), reader(second), spec)
    assert found.converged
    assert len(found.objectives) == 3
    assert found.objectives[1] == found.objectives[2]
    best = max(
        product(first, permuted(second, spec, {"0": torch.tensor(order)}))
        for order in itertools.permutations(range(5))
    )
    assert product(first, permuted(second, spec, found.orders)) == pytest.approx(best, rel=1e-12)


def test_every_sweep_takes_the_permutations_in_an_order_that_the_seed_determines() -> None:
    first, second = chain(4, 9, 9, 9, 2, seed=1), chain(4, 9, 9, 9, 2, seed=2)
    spec = specification(first)
    found = [match(reader(first), reader(second), spec, seed=seed).objectives for seed in (0, 0, 1, 2, 3)]
    assert found[0] == found[1]
    assert len(set(found)) > 1


def test_the_objective_rises_too_where_a_permutation_moves_both_axes_of_one_tensor() -> None:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(8, 8, generator=generator, dtype=torch.float64) for _ in range(2)]
    spec = specified({"w": ["p", "p"]}, {"w": (8, 8)})
    found = match(lambda name: values[0], lambda name: values[1], spec)
    moved = spec.permuted("w", values[1], found.orders)
    assert all(b >= a for a, b in itertools.pairwise(found.objectives))
    assert found.objectives[-1] == pytest.approx(float((values[0] * moved).sum()), rel=1e-12)


def test_the_order_says_which_unit_of_the_second_comes_to_each_place_of_the_first() -> None:
    similar = torch.zeros(3, 3)
    similar[0, 2] = similar[1, 0] = similar[2, 1] = 1.0
    assert assigned(similar).tolist() == [2, 0, 1]


def small(name: str) -> nn.Module:
    import transformers

    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    torch.manual_seed(0)
    if name == "llama":
        config = transformers.LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=4)
        return transformers.LlamaForCausalLM(config).double()
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, num_attention_heads=8)).double()


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_heads_units_and_residual_stream_of_a_permuted_transformer_are_recovered(
    name: str, residual: bool
) -> None:
    model = small(name)
    spec = specification(model, residual=residual)
    copy = permuted(model, spec, spec.drawn(1))
    found = matched(copy, to=model, residual=residual)
    assert distance(model, copy) > 1
    # The keys' biases are zero, as are the norms'.
    assert_equal(tensors(found), tensors(model))


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 4, 3),
    )  # fmt: skip
    model.double()[1].running_mean.copy_(torch.arange(6) / 10)  # type: ignore[operator, union-attr]
    return model.eval()


def images() -> Tensor:
    return torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_channels_of_a_permuted_convolutional_network_are_recovered_with_their_statistics() -> None:
    model = convolutions()
    spec = specification(model)
    copy = permuted(model, spec, spec.drawn(1))
    assert_equal(tensors(matched(copy, to=model)), tensors(model))


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (lambda: chain(6, 12, 12, 2), [torch.linspace(-2, 2, 120, dtype=torch.float64).sin().view(20, 6)]),
        (convolutions, [images()]),
        (lambda: small("llama"), [{"input_ids": torch.arange(24).view(2, 12)}]),
    ],
)
def test_units_of_a_permuted_copy_are_recovered_from_what_they_do_on_data(
    make: Callable[[], nn.Module], batches: list[Any]
) -> None:
    model = make()
    spec = specification(model)
    copy = permuted(model, spec, spec.drawn(1))
    assert_equal(tensors(matched(copy, to=model, data=batches)), tensors(model))


def test_activation_matching_maximises_the_product_of_the_units_values() -> None:
    first, second = chain(4, 6, 2, seed=1), chain(4, 6, 2, seed=2)
    data = [torch.randn(9, 4, dtype=torch.float64) for _ in range(2)]
    found = match_activations(first, second, data, specification(first))
    mine, other = (torch.cat([model[:2](x) for x in data]) for model in (first, second))
    assert torch.equal(found["0"], assigned((mine.T @ other).detach()))


def test_several_permuted_copies_are_brought_to_the_places_of_the_first() -> None:
    model = chain(8, 16, 16, 4)
    spec = specification(model)
    copies = [model, *(permuted(model, spec, spec.drawn(seed)) for seed in (1, 2, 3))]
    found = match_many([reader(copy) for copy in copies], spec)
    assert_equal(found[0], spec.identity())
    for copy, orders in zip(copies, found, strict=True):
        assert_equal(tensors(permuted(copy, spec, orders)), tensors(model))


def test_many_models_come_closer_together_than_by_matching_each_to_the_running_mean_alone() -> None:
    models = [chain(6, 12, 12, 12, 3, seed=seed) for seed in range(10, 15)]
    spec = specification(models[0])

    def spread(found: list[dict[str, Tensor]]) -> float:
        moved = [permuted(model, spec, orders) for model, orders in zip(models, found, strict=True)]
        return sum(distance(a, b) ** 2 for a, b in itertools.combinations(moved, 2))

    running = [spec.identity()]
    for which in range(1, 5):
        before = [tensors(permuted(m, spec, o)) for m, o in zip(models, running, strict=False)]

        def mean(name: str, before: list[dict[str, Tensor]] = before) -> Tensor:
            return torch.stack([one[name] for one in before]).mean(0)

        running.append(dict(match(mean, reader(models[which]), spec).orders))
    once = spread(running)
    assert once < spread([spec.identity()] * 5)
    found = match_many([reader(model) for model in models], spec)
    assert spread(found) < once
    assert_equal(found[0], spec.identity())  # the first model's places, although it took its turns


def test_the_weights_are_shares_of_the_matched_models() -> None:
    first, second = chain(4, 8, 2, seed=1), chain(4, 8, 2, seed=2)
    twin = tensors(matched(second, to=first))
    found = merged([first, second], weights=[3.0, 1.0])
    for name, tensor in tensors(first).items():
        torch.testing.assert_close(found[name], 0.75 * tensor + 0.25 * twin[name], rtol=0, atol=1e-14)


def test_merging_permuted_copies_gives_the_model_itself_by_weights_and_by_activations() -> None:
    model = chain(4, 12, 12, 2)
    spec = specification(model)
    copies = [model, *(permuted(model, spec, spec.drawn(seed)) for seed in (1, 2))]
    data = [torch.randn(40, 4, dtype=torch.float64)]
    for options in ({}, {"by": "activations", "data": data}):
        found = merged(copies, **options)
        for name, tensor in tensors(model).items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-14)


def test_a_specification_by_hand_replaces_that_of_the_architecture() -> None:
    model = chain(4, 8, 2)
    spec = specification(model)
    copy = permuted(model, spec, spec.drawn(1))
    by_hand = {"0.weight": ["h", None], "0.bias": ["h"], "2.weight": [None, "h"]}
    assert_equal(merged([model, copy], spec=by_hand), tensors(model))


def test_without_data_merging_batch_norms_says_that_their_statistics_break_the_interpolation() -> None:
    with pytest.warns(UserWarning, match="running statistics break the interpolation; pass data="):
        merged([convolutions(), convolutions()])


def test_with_data_the_statistics_of_merged_batch_norms_are_measured_anew() -> None:
    models = [convolutions(), convolutions()]
    models[1].apply(lambda m: m.reset_parameters() if isinstance(m, nn.Conv2d) else None)  # type: ignore[operator]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = merged(models, data=[images()])
    seen = nn.functional.conv2d(images(), found["0.weight"], found["0.bias"])
    torch.testing.assert_close(found["1.running_mean"], seen.mean((0, 2, 3)))
    torch.testing.assert_close(found["1.running_var"], seen.transpose(0, 1).flatten(1).var(1))


def test_the_merged_tensors_come_in_the_order_of_the_sources() -> None:
    models = [chain(4, 8, 2, seed=seed) for seed in range(2)]
    assert list(merged(models)) == [f"{place}.{kind}" for place in (0, 2) for kind in ("weight", "bias")]


def test_it_is_a_method_of_merging_that_needs_no_base() -> None:
    method = next(m for m in rf.methods("merge") if m.name == "weight-matching")
    assert method.traits["base"] == "unused"
    assert method.traits["whole"]
    assert method.options == {"spec": None, "by": "weights", "residual": False, "sweeps": 100}


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ({"by": "names"}, InvalidOption, "by must be one of weights, activations"),
        ({"by": "activations"}, Incompatible, "pass data="),
        ({"sweeps": 0}, InvalidOption, "sweeps must be at least 1, not 0"),
        ({"weights": [1.0, -1.0]}, InvalidOption, "add up to nothing"),
        ({"spec": {}, "residual": True}, InvalidOption, "leave one out"),
        ({"spec": {"9.weight": ["h"]}}, InvalidOption, r"no tensor '9\.weight'"),
    ],
)
def test_impossible_options_are_refused(
    options: dict[str, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        merged([chain(4, 8, 2), chain(4, 8, 2, seed=1)], **options)


def test_models_of_other_shapes_are_refused_by_their_first_difference() -> None:
    with pytest.raises(Incompatible, match=r"0\.weight is \(8, 4\) in one, \(9, 4\) in the other"):
        matched(chain(4, 9, 2), to=chain(4, 8, 2))


def test_a_tensor_with_nan_is_named() -> None:
    bad = chain(4, 8, 2)
    bad[2].weight.data[0, 0] = float("nan")  # type: ignore[index, operator]
    with pytest.raises(Incompatible, match=r"2\.weight holds NaN"):
        matched(bad, to=chain(4, 8, 2))


def test_units_that_no_data_reached_are_refused() -> None:
    model = chain(4, 8, 2)
    with pytest.raises(Incompatible, match="data= holds no batch"):
        match_activations(model, model, [], specification(model))


def test_without_scipy_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingDependency, match=r"rankfold\[solvers\]"):
        matched(chain(4, 8, 2), to=chain(4, 8, 2))


def test_tensors_that_no_permutation_moves_do_not_matter_to_the_search() -> None:
    spec = Specification({})
    assert match(lambda name: torch.zeros(()), lambda name: torch.zeros(()), spec).converged


def test_folders_of_permuted_copies_merge_to_the_model_itself(tmp_path: Path) -> None:
    model = small("llama").float()
    spec = specification(model)
    for name, one in (("one", model), ("two", permuted(model, spec, spec.drawn(1)))):
        one.save_pretrained(tmp_path / name)  # type: ignore[operator]
    folders = [tmp_path / "one", tmp_path / "two"]
    rf.merge(folders, "weight-matching", out=tmp_path / "merged", progress=False)
    found = type(model).from_pretrained(tmp_path / "merged")  # type: ignore[attr-defined]
    assert_equal(tensors(found), tensors(model))


def test_files_with_other_names_than_the_architecture_are_refused_by_the_first_name() -> None:
    class Renamed(Sources):
        @property
        def names(self) -> tuple[str, ...]:
            return tuple(f"net.{name}" for name in super().names)

    with (
        Renamed([chain(4, 8, 2), chain(4, 8, 2)]) as sources,
        pytest.raises(Incompatible, match=r"the tensor 0\.weight, which the models' files do not hold"),
    ):
        dict(weight_matching(sources))
