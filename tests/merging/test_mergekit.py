"""The rules and the files of mergekit, side by side with mergekit itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from model_folders import Writer
from safetensors.torch import load_file
from torch import Tensor

import rankfold as rf
from rankfold.errors import FormatError, Incompatible, InvalidOption, MissingPath
from rankfold.merging.mergekit import read_mergekit
from rankfold.merging.papers.breadcrumbs import breadcrumbs
from rankfold.merging.papers.dare import dare_linear, dare_ties, mask
from rankfold.merging.papers.linear import linear
from rankfold.merging.papers.slerp import slerp
from rankfold.merging.papers.task_arithmetic import task_arithmetic
from rankfold.merging.papers.ties import ties
from rankfold.merging.parts import Parts

WEIGHTS = (0.3, 0.5, -0.2)
SHAPES = [(20, 30), (100,), (4, 5, 10)]


def parts(count: int = 3, shape: tuple[int, ...] = (20, 30), dtype: torch.dtype = torch.float32) -> Parts:
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(shape, generator=draw).to(dtype) for _ in range(count + 1)]
    return Parts("w", tuple(tensors[1:]), WEIGHTS[:count], tensors[0])


def theirs(method: str, given: Parts, base: bool = True, **parameters: Any) -> Tensor:
    """Return what mergekit makes of the same tensors; the base is its first."""
    tensors = [given.origin, *given.models] if base else list(given.models)
    group = TensorGroup.from_tensors(tensors, base_index=0 if base else None, name="w")
    return registry.get(method)([group], parameters=parameters)[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear(shape: tuple[int, ...], normalize: bool) -> None:
    some = parts(shape=shape)
    expected = theirs("linear", some, base=False, weight=list(WEIGHTS), normalize=normalize)
    torch.testing.assert_close(linear(some, normalize=normalize), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic(shape: tuple[int, ...]) -> None:
    some = parts(shape=shape)
    expected = theirs("task_arithmetic", some, weight=list(WEIGHTS), **{"lambda": 0.7})
    torch.testing.assert_close(task_arithmetic(some, scale=0.7), expected)


@pytest.mark.parametrize("shape", [*SHAPES, (3,)])
@pytest.mark.parametrize("density", [0.2, 0.33, 1.0])
@pytest.mark.parametrize(("normalize", "mean"), [(True, "weighted"), (False, "sum")])
def test_ties(shape: tuple[int, ...], density: float, normalize: bool, mean: str) -> None:
    some = parts(shape=shape)
    settings = {"density": [density, 0.5, density], "normalize": normalize, "lambda": 0.6}
    expected = theirs("ties", some, weight=list(WEIGHTS), **settings)
    merged = ties(some, density=(density, 0.5, density), mean=mean, scale=0.6)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, False])
def test_dare_with_the_same_random_masks(method: str, rescale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    some = parts()
    drawn = iter([mask(some, number, 0.4) for number in range(3)])
    monkeypatch.setattr(torch, "bernoulli", lambda chance: next(drawn).to(chance.dtype))
    expected = theirs(method, some, weight=list(WEIGHTS), density=0.4, rescale=rescale)
    options: dict[str, Any] = {"density": 0.4, "rescale": "l1" if rescale else "none"}
    merged = (
        dare_linear(some, **options) if method == "dare_linear" else dare_ties(some, mean="sum", **options)
    )
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("shape", SHAPES)  # of sizes that the parts divide, so that both round alike
@pytest.mark.parametrize(("density", "gamma"), [(0.5, 0.1), (0.9, 0.01), (0.9, 0.2), (1.0, 0.01)])
def test_breadcrumbs(shape: tuple[int, ...], density: float, gamma: float) -> None:
    some = parts(shape=shape)
    expected = theirs("breadcrumbs", some, weight=list(WEIGHTS), density=density, gamma=gamma)
    top = min(gamma, 1 - density)
    merged = breadcrumbs(some, drop_smallest=1 - density - top, drop_largest=top, scale=1.0)
    torch.testing.assert_close(merged, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("nearness", [0.0, 1e-4, 1.0])  # from independent to parallel tensors
def test_slerp(shape: tuple[int, ...], t: float, nearness: float) -> None:
    first, other = parts(2, shape).models
    second = torch.lerp(other, first, 1 - nearness) if nearness else other
    group = TensorGroup.from_tensors([first, second], base_index=0)
    expected = registry.get("slerp")([group], parameters={"t": t})[0]
    torch.testing.assert_close(slerp(Parts("w", (first, second), (1.0, 1.0)), t=t), expected)


# files

FILES = {
    "linear": {"weight": [0.3, 0.5]},
    "task_arithmetic": {"weight": [0.3, 0.5], "lambda": 0.9, "normalize": True},
    "ties": {"weight": [0.3, 0.5], "density": [0.2, 0.6], "normalize": False, "int8_mask": True},
    "breadcrumbs": {"weight": [0.3, 0.5], "density": [0.5, 0.75], "gamma": [0.125, 0.25]},
    "slerp": {"t": 0.3},
}


def config_of(method: str, folders: list[Path], **top: Any) -> dict[str, Any]:
    """Return a mergekit configuration: lists of parameters are of each model."""
    base, *models = map(str, folders)
    weighted = {"parameters": {"weight": 0.1}} if method == "linear" else {}
    entries: list[dict[str, Any]] = [{"model": base, **weighted}]
    for number, model in enumerate(models):
        own = {key: value[number] for key, value in FILES[method].items() if isinstance(value, list)}
        entries.append({"model": model, "parameters": own})
    shared = {key: value for key, value in FILES[method].items() if not isinstance(value, list)}
    return {"merge_method": method, "base_model": base, "models": entries, "parameters": shared, **top}


@pytest.mark.parametrize("method", list(FILES))
def test_a_file_of_mergekit_gives_the_model_that_mergekit_gives(method: str, tmp_path: Path) -> None:
    write = Writer(tmp_path)
    folders = [write.llama(name, seed) for seed, name in enumerate(("base", "one", "two"))]
    config = config_of(method, folders[:2] if method == "slerp" else folders, dtype="float32")
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    read = read_mergekit(tmp_path / "merge.yml").arguments()
    ours = rf.merge(out=tmp_path / "ours", progress=False, **read)
    run_merge(
        MergeConfiguration.model_validate(config),
        str(tmp_path / "theirs"),
        MergeOptions(copy_tokenizer=False, quiet=True),
    )
    expected = load_file(next((tmp_path / "theirs").glob("*.safetensors")))
    merged = load_file(ours / "model.safetensors")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_file_keeps_what_mergekit_means_by_default(tmp_path: Path) -> None:
    def read(text: str) -> dict[str, Any]:
        (tmp_path / "merge.yml").write_text(text)
        return read_mergekit(tmp_path / "merge.yml").arguments()

    models = "base_model: b\nmodels:\n- model: b\n- {model: x, parameters: {weight: 1}}\n"
    dare = read(f"merge_method: dare_ties\n{models}parameters: {{density: 0.5}}\nout_dtype: bfloat16\n")
    assert dare == {
        "models": ["x"], "method": "dare-ties", "base": "b", "weights": [1.0], "dtype": "bfloat16",
        "density": [0.5], "rescale": "l1", "mean": "sum", "scale": 1.0,
    }  # fmt: skip
    crumbs = read(f"merge_method: breadcrumbs\n{models}parameters: {{density: 0.5, gamma: 0.8}}\n")
    assert (crumbs["drop_smallest"], crumbs["drop_largest"]) == ([0.0], [0.5])
    plain = read(f"merge_method: linear\n{models}parameters: {{weight: 2}}\n")
    assert plain["models"] == ["b", "x"]  # the base is averaged like the others
    assert plain["weights"] == [2.0, 1.0]
    unlisted = read(f"merge_method: linear\n{BASED}parameters: {{weight: 2}}\n")
    assert (unlisted["models"], unlisted["weights"]) == (["b", "x"], [2.0, 1.0])


MODELS = "models: [{model: x, parameters: {weight: 1}}]\n"
BASED = f"base_model: b\n{MODELS}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("merge_method: linear\nslices: []\n", "slices is not read"),
        (f"merge_method: linear\n{MODELS}tokenizer_source: union\n", "tokenizer_source is not read"),
        (f"merge_method: linear\n{MODELS}modules: {{}}\n", "modules is not read"),
        (f"merge_method: model_stock\n{BASED}", "merge_method 'model_stock' is none of those that mean"),
        (f"merge_method: ties\n{BASED}parameters: {{density: [0, 1]}}\n", "density has values by layer"),
        (
            "merge_method: linear\nmodels: [{model: x, parameters: {weight: [{filter: mlp, value: 1}]}}]\n",
            "weight has values by layer or tensor",
        ),
        (f"merge_method: ties\n{BASED}parameters: {{epsilon: 1}}\n", "the parameter epsilon of ties"),
        (f"merge_method: breadcrumbs\n{BASED}parameters: {{rescale: true}}\n", "does not rescale"),
        ("merge_method: linear\nmodels: [{model: x+lora, parameters: {weight: 1}}]\n", "fold it first"),
    ],
)
def test_what_a_file_means_differently_is_refused(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_text(text)
    with pytest.raises(Incompatible, match=sentence):
        read_mergekit(tmp_path / "merge.yml")


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("- 1\n", FormatError, "is not a table"),
        ("a: [", FormatError, "cannot be read as YAML"),
        ("merge_method: linear\n", FormatError, "lists no models"),
        ("merge_method: linear\nmodels: [x]\n", FormatError, "each of the models has a model and parameters"),
        (
            f"merge_method: linear\n{MODELS}".replace("x,", "1,"),
            FormatError,
            "a model is the path of a folder",
        ),
        ("merge_method: linear\nmodels: [{model: x}, {model: x}]\n", FormatError, "lists the model x twice"),
        ("merge_method: linear\nmodels: [{model: x}]\n", InvalidOption, "x has no weight"),
        (
            f"merge_method: linear\n{MODELS}parameters: {{normalize: 1}}\n",
            InvalidOption,
            "must be true or false",
        ),
        (f"merge_method: linear\n{MODELS}dtype: 16\n", InvalidOption, "dtype must be a name"),
        ("merge_method: linear\nmodels: [{model: x, parameters: {weight: a}}]\n", InvalidOption, "a number"),
        (f"merge_method: slerp\n{BASED}".replace("weight", "t"), InvalidOption, ""),
    ],
)
def test_a_file_that_says_nothing_sensible_is_refused(
    text: str, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    file = tmp_path / "merge.yml"
    file.write_text(text)
    if not sentence:  # slerp between the base and one other is sensible; without a base it is not
        assert read_mergekit(file).models == ["b", "x"]
        file.write_text(text.replace("base_model: b\n", ""))
        sentence = "slerp goes from base_model"
    with pytest.raises(error, match=sentence):
        read_mergekit(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingPath, match="there is no file"):
        read_mergekit(tmp_path / "none.yml")
