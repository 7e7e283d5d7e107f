"""What rules see of the models, and what is refused before any work is done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_folders import Writer
from safetensors.torch import save_file
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import FormatError, Incompatible, InvalidOption, MissingPath, UnsupportedLayer
from rankfold.merging.sources import Sources

Names = dict[str, Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def twins(count: int, make: Callable[[], nn.Module] = network) -> list[nn.Module]:
    return [make() for _ in range(count)]


def test_modules_and_folders_of_the_same_tensors_give_the_same_parts(folder: Writer) -> None:
    one, two = twins(2)
    paths = [folder("one", one.state_dict()), folder("two", two.state_dict(), shards=2)]
    with Sources([one, two], base=network()) as live, Sources(paths, base=paths[0]) as stored:
        assert (
            set(live.names)
            == set(stored.names)
            == {"0.weight", "0.bias", "1.weight", "1.bias"}
            | {
                "1.running_mean",
                "1.running_var",
            }
        )
        assert live.kept == stored.kept == ("1.num_batches_tracked",)
        for name in live.names:
            for a, b in zip(live.parts(name).models, stored.parts(name).models, strict=True):
                assert torch.equal(a, b)
    assert stored.count == 2
    assert stored.has_base
    assert torch.equal(stored.read(1, "0.weight"), two.state_dict()["0.weight"])
    assert torch.equal(stored.read(None, "0.weight"), one.state_dict()["0.weight"])


def test_a_tensor_is_read_when_it_is_asked_for_and_no_other(folder: Writer) -> None:
    path = folder("one", {"a": torch.ones(2), "b": torch.ones(3)}, shards=2)
    sources = Sources([path])
    assert sources.names == ("a", "b")
    next(path.glob("*2-of*.safetensors")).unlink()
    assert torch.equal(sources.read(0, "a"), torch.ones(2))
    with pytest.raises(FormatError, match="model-00002-of-00002"):
        sources.read(0, "b")


def test_tied_weights_of_a_module_are_one_tensor_and_stay_tied() -> None:
    def tied() -> nn.Module:
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    sources = Sources(twins(2, tied))
    assert sources.names == ("embed.weight",)
    copy = sources.module({"embed.weight": torch.zeros(5, 3)})
    assert copy["head"].weight is copy["embed"].weight  # type: ignore[index]
    assert not copy["head"].weight.any()  # type: ignore[index]
    assert sources.read(0, "embed.weight").any()


def test_a_tied_head_that_a_file_repeats_is_merged_once(folder: Writer) -> None:
    table = torch.randn(5, 3)
    once, twice = {"embed.weight": table}, {"embed.weight": table, "lm_head.weight": table.clone()}
    config = {"tie_word_embeddings": True, "vocab_size": 5}
    paths = [folder("once", once, config), folder("twice", twice, config)]
    assert Sources(paths).names == ("embed.weight",)
    untied = folder("untied", twice, {"vocab_size": 5, "tie_word_embeddings": False})
    assert Sources([untied]).names == ("embed.weight", "lm_head.weight")
    other = folder("other", {"embed.weight": table, "lm_head.weight": table + 1}, config)
    assert Sources([other]).names == ("embed.weight", "lm_head.weight")


@pytest.mark.parametrize(
    ("tensors", "config", "sentence"),
    [
        ({"a.weight": (4, 3)}, {}, "two has no b.weight"),
        ({"a.weight": (4, 3), "b.weight": (2, 4), "c": (1,)}, {}, "one has no c"),
        ({"a.weight": (4, 3), "b.weight": (3, 4)}, {}, "b.weight is 2x4 in the one and 3x4 in the other"),
        (
            {"a.weight": (5, 3), "b.weight": (2, 4)},
            {"vocab_size": 5},
            "their vocabularies differ: a.weight is 4x3 in the one and 5x3 in the other",
        ),
        (
            {"a.weight": (4, 3), "b.weight": (2, 4)},
            {"num_attention_heads": 4},
            "num_attention_heads is 2 in the one and 4 in the other",
        ),
        (
            {"a.weight": (4, 3), "b.weight": (2, 4)},
            {"model_type": "opt"},
            "model_type is 'llama' in the one and 'opt' in the other",
        ),
    ],
)
def test_models_that_differ_are_refused_by_their_first_difference(
    folder: Writer, tensors: dict[str, tuple[int, ...]], config: dict[str, object], sentence: str
) -> None:
    known = {"model_type": "llama", "num_attention_heads": 2, "vocab_size": 4}
    one = folder("one", {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(2, 4)}, known)
    two = folder("two", {name: torch.ones(shape) for name, shape in tensors.items()}, {**known, **config})
    with pytest.raises(Incompatible, match=sentence):
        Sources([one, two])
    with pytest.raises(Incompatible, match="cannot be merged"):
        Sources([two], base=one)


def test_the_classes_of_models_are_named_where_they_differ(folder: Writer) -> None:
    one = folder("one", {"a": torch.ones(1), "head": torch.ones(1)}, {"architectures": ["BertForMaskedLM"]})
    two = folder("two", {"a": torch.ones(1)}, {"architectures": ["BertModel"]})
    with pytest.raises(Incompatible, match=r"two has no head \(they are BertForMaskedLM and BertModel\)"):
        Sources([one, two])


def test_two_vocabularies_of_one_size_are_told_apart(folder: Writer) -> None:
    one, two = (folder(name, {"a": torch.ones(1)}) for name in ("one", "two"))
    (one / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"the": 0, "cat": 1, "sat": 2}}}))
    (two / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"the": 0, "dog": 1, "sat": 2}}}))
    with pytest.raises(Incompatible, match=r"the token '(cat|dog)' is (number 1|absent) in the one and"):
        Sources([one, two])
    (two / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"the": 0, "sat": 1, "cat": 2}}}))
    with pytest.raises(Incompatible, match=r"is number [12] in the one and number [12] in the other"):
        Sources([one, two])


def test_a_truncated_file_is_named(folder: Writer) -> None:
    path = folder("one", {"a": torch.ones(2), "b": torch.ones(30)}, shards=2)
    shard = next(path.glob("*2-of*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(FormatError, match=r"model-00002-of-00002.safetensors is truncated"):
        Sources([path])


def test_an_index_that_names_what_is_not_there_is_refused(folder: Writer) -> None:
    path = folder("one", {"a": torch.ones(2), "b": torch.ones(2)}, shards=2)
    index = path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**places, "c": places["a"]}}))
    with pytest.raises(FormatError, match="does not hold c"):
        Sources([path])
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(FormatError, match="no file of its folder"):
        Sources([path])
    index.write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(MissingPath, match=r"the shard .*gone.safetensors is missing"):
        Sources([path])


def test_folders_without_a_model_say_what_they_hold_instead(tmp_path: Path) -> None:
    with pytest.raises(MissingPath, match="there is no model folder"):
        Sources([tmp_path / "none"])
    with pytest.raises(MissingPath, match="holds no model"):
        Sources([tmp_path])
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingPath, match="pickled weights only, which are not read"):
        Sources([tmp_path])
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MissingPath, match="holds an adapter, not a model"):
        Sources([tmp_path])


@pytest.mark.parametrize("beside", [0.0, float("inf")])
def test_a_weight_with_nan_is_named(beside: float) -> None:
    one, two = twins(2)
    with torch.no_grad():
        two[0].weight[1, 2] = float("nan")  # type: ignore[index]
        two[0].weight[0, 0] = beside  # type: ignore[index]
    sources = Sources([one, two])
    with pytest.raises(Incompatible, match=r"model 2: 0.weight holds NaN in 1 of 12 entries"):
        sources.parts("0.weight")


def test_mixtures_of_types_are_computed_in_float32_and_float64_stays(folder: Writer) -> None:
    kinds = [torch.bfloat16, torch.float16, torch.float32]
    paths = [folder(str(kind), {"a": torch.ones(2, dtype=kind)}) for kind in kinds]
    double = folder("double", {"a": torch.ones(2, dtype=torch.float64)})
    assert {m.dtype for m in Sources(paths).parts("a").models} == {torch.float32}
    assert {m.dtype for m in Sources([*paths, double]).parts("a").models} == {torch.float64}


def test_integers_are_the_bases_or_alike_or_refused(folder: Writer) -> None:
    one, two = ({"a": torch.ones(1), "ids": torch.arange(3) + n, "seen": torch.tensor(n)} for n in (0, 1))
    paths = [folder("one", one), folder("two", two)]
    assert torch.equal(Sources(paths, base=paths[1]).taken("ids"), two["ids"])
    assert torch.equal(Sources([paths[0], paths[0]]).taken("ids"), one["ids"])
    with pytest.raises(Incompatible, match=r"ids \(int64\) differs between the models"):
        Sources(paths).taken("ids")
    assert Sources(paths).taken("seen") == 0  # a counter is no reason to refuse


def test_weights_are_one_finite_number_for_each_model() -> None:
    assert Sources(twins(2)).weights == (1.0, 1.0)
    assert Sources(twins(2), weights=[1, -0.5]).weights == (1.0, -0.5)
    with pytest.raises(InvalidOption, match="1 weights were given for 2 models"):
        Sources(twins(2), weights=[1.0])
    with pytest.raises(InvalidOption, match="must be finite"):
        Sources(twins(2), weights=[1.0, float("nan")])


def test_an_adapted_module_is_no_model_of_its_own_weights() -> None:
    adapted = rf.adapt(network(), "lora", rank=1, targets="0")
    with pytest.raises(UnsupportedLayer, match="model 1 is adapted; fold its adapter"):
        Sources([adapted])


def test_scratch_is_removed_at_the_end_also_after_an_error() -> None:
    rooms = []

    def fail(sources: Sources) -> None:
        rooms.extend([sources.scratch(), sources.scratch()])
        (rooms[0] / "file").write_text("here")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Sources(twins(1)) as sources:
        fail(sources)
    assert len(set(rooms)) == 2
    assert not any(room.exists() for room in rooms)


def test_a_live_copy_has_new_tensors_in_their_type_and_the_model_keeps_its_own() -> None:
    model = network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = torch.full((3, 4), 2.0, dtype=torch.bfloat16)
    copy = Sources([model]).module({"0.weight": new})
    assert torch.equal(copy.state_dict()["0.weight"], new)
    assert copy.state_dict()["0.weight"].dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_folder_becomes_a_live_model_of_its_own_class(folder: Writer) -> None:
    llama = folder.llama("tiny")
    sources = Sources([llama])
    name = "model.layers.0.mlp.up_proj.weight"
    copy = sources.module({name: torch.zeros(sources.shape(name))})
    state = copy.state_dict()
    assert type(copy).__name__ == "LlamaForCausalLM"
    assert not state[name].any()
    assert torch.equal(state["model.norm.weight"], sources.read(0, "model.norm.weight"))
    nameless = folder("nameless", {"a": torch.ones(1)})
    with pytest.raises(Incompatible, match="names no architecture"):
        Sources([nameless]).module()


@pytest.mark.parametrize("weights", ["ab", 0.5, [None, 1.0], [[1.0], 2.0]])
def test_weights_that_are_no_numbers_are_one_sentence(weights: object) -> None:
    with pytest.raises(InvalidOption, match="weights must be a list of numbers"):
        Sources(twins(2), weights=weights)  # type: ignore[arg-type]
