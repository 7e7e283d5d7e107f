"""Points as text, and which parts go together."""

import itertools
import re
from typing import Any

import pytest
import torch
from methods._layers import linear, normal
from torch import nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption, RankfoldError, UnknownMethod
from rankfold.methods import registry
from rankfold.methods.recipe import resolve

STRUCTURES = (
    "lora", "dora", "lora-xs", "vera", "abba", "hira", "hra", "gralora", "diablo", "svfit", "uni-lora",
    "flora-tucker", "reft", "alora",
)  # fmt: skip
# Which starts make sense for which structure; every other pair is refused.
ACCEPTED = {
    "lora": {"kaiming", "pissa", "olora"},
    "dora": {"kaiming", "pissa", "olora"},
    "gralora": {"kaiming", "pissa", "olora"},
    "alora": {"kaiming", "pissa", "olora"},
    "hira": {"kaiming"},
    "abba": {"kaiming"},
    "lora-xs": {"pissa", "svd"},
    "svfit": {"pissa", "svd"},
}
INITS = ("kaiming", "olora", "pissa", "svd")
EXAMPLE: dict[str, dict[str, Any]] = {"alora": {"invocation": (1,)}}


# Points -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["dora/pissa", "pissa/dora", " pissa / dora ", "init=pissa/dora", "structure=dora/pissa"]
)
def test_parts_stand_in_any_order(text: str) -> None:
    assert rf.parse_point(text) == rf.Recipe("dora", "pissa")


def test_without_a_structure_it_is_lora() -> None:
    assert rf.parse_point("pissa") == rf.Recipe("lora", "pissa")


def test_every_structure_is_a_point_of_its_own() -> None:
    assert {m.name for m in rf.methods("structure")} >= set(STRUCTURES)
    assert all(rf.parse_point(m.name) == rf.Recipe(m.name) for m in rf.methods("structure"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("lroa", "no method is called 'lroa'; did you mean lora"),
     ("dora/pisa", "no method is called 'pisa'; did you mean pissa"),
     ("xyz", "no method is called 'xyz'"), ("", "a part of the point '' is empty"),
     ("dora/", "a part of the point 'dora/' is empty"),
     ("intit=pissa", "'intit' in 'intit=pissa' is no axis of a point; did you mean init"),
     ("init=dora", "no init is called 'dora'; 'dora' is of the axis structure")],
)  # fmt: skip
def test_what_is_unknown_is_refused_with_near_names(text: str, sentence: str) -> None:
    with pytest.raises(UnknownMethod, match=re.escape(sentence)):
        rf.parse_point(text)


@pytest.mark.parametrize(
    ("text", "axis"), [("lora/dora", "structure"), ("pissa/olora", "init"), ("lora/lora", "structure")]
)
def test_two_methods_of_one_axis_are_refused(text: str, axis: str) -> None:
    with pytest.raises(Incompatible, match=f"gives two methods for {axis}: {' and '.join(text.split('/'))}"):
        rf.parse_point(text)


@pytest.mark.usefixtures("clean")
def test_a_name_on_two_axes_needs_its_axis_written() -> None:
    registry.init("dora", gives="zero", title="Another", year=2000, formula="0")(
        lambda site, rank, scaling: None
    )
    with pytest.raises(
        Incompatible, match="'dora' is of the axes structure and init: write structure=dora or init=dora"
    ):
        rf.parse_point("dora")
    assert rf.parse_point("init=dora") == rf.Recipe("lora", "dora")
    assert rf.parse_point("structure=dora") == rf.Recipe("dora")


@pytest.mark.usefixtures("clean")
def test_dynamics_may_be_several() -> None:
    for name in ("first", "second"):
        registry.register("dynamics", name, title="A", year=2000, formula="0")(lambda: None)
    assert rf.parse_point("first/dora/second") == rf.Recipe("dora", dynamics=("first", "second"))


def test_a_recipe_is_plain_data_and_back() -> None:
    recipe = rf.Recipe(("dora", {"alpha": 3}), ("pissa", {"iterations": 2}))
    assert recipe.text() == "dora/pissa"
    again = rf.Recipe.from_dict(recipe.to_dict())
    assert again.to_dict() == recipe.to_dict()
    assert resolve(again, {}).options == resolve(recipe, {}).options


@pytest.mark.parametrize(
    "method", [3, None, rf.Recipe(3), rf.Recipe(("dora",)), rf.Recipe(("dora", 4)), ["lora"]]
)
def test_what_is_no_recipe_is_refused(method: Any) -> None:
    with pytest.raises(InvalidOption):
        resolve(method, {})


# Options ----------------------------------------------------------------------------------------------


def test_options_given_beside_the_recipe_win_and_the_rest_are_defaults() -> None:
    resolved = resolve(rf.Recipe(("lora", {"alpha": 3, "dropout": 0.1})), {"alpha": 5})
    assert resolved.options == {"alpha": 5, "dropout": 0.1, "rank_stabilised": False}


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [("lora", {"alhpa": 3}, "lora has no option 'alhpa'; did you mean alpha"),
     ("svfit", {"alpha": 3}, "svfit has no option 'alpha'; its options: none"),
     ("lora", {"zzz": 3}, "lora has no option 'zzz'; its options: alpha, rank_stabilised, dropout"),
     ("lora", {"alpha": float("nan")}, "lora: alpha must be a finite number, not nan"),
     ("lora", {"alpha": float("inf")}, "lora: alpha must be a finite number, not inf"),
     ("lora", {"alpha": "3"}, "lora: alpha must be a number, not '3'"),
     ("lora", {"alpha": True}, "lora: alpha must be a number, not True"),
     ("lora", {"dropout": None}, "lora: dropout must be a number, not None"),
     ("lora", {"rank_stabilised": 1}, "lora: rank_stabilised must be true or false, not 1"),
     ("gralora", {"k": 2.0}, "gralora: k must be a whole number, not 2.0"),
     ("reft", {"positions": 7}, "reft: positions must be a text, not 7"),
     (rf.Recipe("lora", ("pissa", {"iterations": 1.5})), {},
      "pissa: iterations must be a whole number, not 1.5"),
     (rf.Recipe("lora", ("pissa", {"niter": 1})), {}, "pissa has no option 'niter'")],
)  # fmt: skip
def test_impossible_options_are_refused(method: Any, options: dict[str, Any], sentence: str) -> None:
    model = linear()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(InvalidOption, match=re.escape(sentence)):
        rf.adapt(model, method, **options)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("options", [{"alpha": 3}, {"alpha": None}, {"alpha": 2.5}, {"dropout": 0}])
def test_a_whole_number_is_a_number_and_none_stands_for_the_default(options: dict[str, Any]) -> None:
    assert resolve("lora", options).options.items() >= options.items()


# Pairs ------------------------------------------------------------------------------------------------


def pairs(accepted: bool) -> list[tuple[str, str]]:
    every = itertools.product(STRUCTURES, INITS)
    return [(s, i) for s, i in every if (i in ACCEPTED.get(s, ())) is accepted]


@pytest.mark.parametrize(("structure", "init"), pairs(accepted=False))
def test_a_start_without_meaning_is_refused_in_a_sentence(structure: str, init: str) -> None:
    model = linear()
    with pytest.raises(Incompatible) as refusal:
        rf.adapt(model, f"{structure}/{init}", targets=["0"], **EXAMPLE.get(structure, {}))
    sentence = str(refusal.value)
    assert structure in sentence
    assert init in sentence
    assert "\n" not in sentence
    assert type(model[0]) is nn.Linear
    reason = "has no factors to initialise" if structure not in ACCEPTED else "cannot start from"
    assert reason in sentence


def test_a_refusal_says_what_is_given_and_what_is_needed() -> None:
    sentence = (
        "hira cannot start from olora: it gives factors whose product is subtracted from the base, and the"
    )
    with pytest.raises(Incompatible, match=f"{sentence} structure needs a product that is zero"):
        rf.plan(linear(), "hira/olora")


class Invoked(nn.Module):
    """A layer behind an embedding, for what needs token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Embedding(4, 8), nn.Linear(8, 6)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.embed(input_ids))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("structure", "init"), pairs(accepted=True))
@pytest.mark.parametrize("alpha", [None, 7.0])
def test_an_accepted_pair_keeps_the_step_zero_promise(structure: str, init: str, alpha: float | None) -> None:
    torch.manual_seed(0)
    gated = structure == "alora"
    model, x = (Invoked().double(), torch.tensor([[0, 1, 2]])) if gated else (linear(), normal(5, 8))
    before = model(x)
    scaled = alpha is not None and "alpha" in registry.get("structure", structure).options
    options = {**EXAMPLE.get(structure, {}), **({"alpha": alpha} if scaled else {})}
    rf.adapt(model, f"{structure}/{init}", rank=4, targets=["layer" if gated else "0"], **options)
    promises = [registry.get("structure", structure).start, registry.get("init", init).start]
    if all(p.kind == "exact" for p in promises):
        assert torch.equal(model(x), before)
    else:
        tolerance = max(p.tolerance for p in promises)
        assert (model(x) - before).abs().max() <= tolerance * before.abs().max()


def test_data_that_nothing_reads_are_refused() -> None:
    with pytest.raises(Incompatible, match="lora/kaiming reads no data; leave data= away"):
        rf.adapt(linear(), "lora", data=[normal(2, 8)])


def test_every_refusal_is_a_rankfold_error_and_the_built_in_it_refines() -> None:
    for text, kind in (("lora/dora", ValueError), ("nothing", LookupError)):
        with pytest.raises(kind) as refusal:
            rf.plan(linear(), text)
        assert isinstance(refusal.value, RankfoldError)
