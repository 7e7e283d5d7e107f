"""One map of names and shapes is used for writing and for reading, so that it is its own inverse."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from formats.small import Untouched
from hosts import blocks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import rankfold as rf
from rankfold.errors import RankfoldError
from rankfold.formats import peft
from rankfold.formats.portable import check

sizes, ranks = st.integers(1, 5), st.integers(1, 6)
WINDOWS = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


def numbers(draw: st.DrawFn, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))


@st.composite
def layers(draw: st.DrawFn, dora: bool) -> tuple[str, tuple[int, ...], dict[str, Tensor], float]:
    """Return kind, window, leaves and alpha of a layer."""
    kind = draw(
        st.sampled_from(["linear", "convolution"] if dora else ["linear", "convolution", "embedding"])
    )
    window = draw(WINDOWS) if kind == "convolution" else ()
    out, rank, inputs = draw(sizes), draw(ranks), draw(sizes) * math.prod(window)
    leaves = {"up": numbers(draw, out, rank), "down": numbers(draw, rank, inputs)}
    if dora:
        leaves["magnitude"] = numbers(draw, out)
    return kind, window, leaves, draw(st.sampled_from([1.0, 2.5, 8.0, float(rank)]))


@st.composite
def adapters(draw: st.DrawFn) -> peft.PeftAdapter:
    """Return any adapter that the format can say."""
    word = st.from_regex(r"[a-z][a-z0-9_]{0,3}", fullmatch=True)
    paths = draw(
        st.lists(st.lists(word, min_size=1, max_size=3).map(".".join), min_size=1, max_size=4, unique=True)
    )
    whole = {"head.weight": numbers(draw, 2, 3), "head.bias": numbers(draw, 2)} if draw(st.booleans()) else {}
    paths = [f"body.{path}" for path in paths]
    options = {"modules_to_save": ["head"]} if whole else {}
    if draw(st.booleans()):
        rank = draw(ranks)
        made = {path: {"b": numbers(draw, draw(sizes)), "d": numbers(draw, rank)} for path in paths}
        shared = {"up": numbers(draw, 5, rank), "down": numbers(draw, rank, 5)}
        kinds = dict.fromkeys(paths, "linear")
        return peft.PeftAdapter("VERA", made, kinds, shared=shared, whole=whole, options=options)
    dora = draw(st.booleans())
    drawn = {path: draw(layers(dora)) for path in paths}
    return peft.PeftAdapter(
        "LORA",
        {path: leaves for path, (_, _, leaves, _) in drawn.items()},
        {path: kind for path, (kind, _, _, _) in drawn.items()},
        {path: window for path, (_, window, _, _) in drawn.items() if window},
        {path: alpha for path, (_, _, _, alpha) in drawn.items()},
        whole=whole,
        options=options,
    )


@given(adapter=adapters())
def test_what_is_written_is_what_is_read(adapter: peft.PeftAdapter) -> None:
    settings_on_disk = json.loads(json.dumps(peft.config(adapter)))
    back = peft.assemble(settings_on_disk, peft.tensors(adapter))
    for name in ("kind", "kinds", "windows", "alphas"):
        assert getattr(back, name) == getattr(adapter, name), name
    for name in ("shared", "whole"):
        same_tensors(getattr(back, name), getattr(adapter, name))
    assert set(back.layers) == set(adapter.layers)
    for path, leaves in adapter.layers.items():
        same_tensors(back.layers[path], leaves)


def same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@given(adapter=adapters())
def test_every_name_on_disk_stands_for_one_leaf(adapter: peft.PeftAdapter) -> None:
    names = peft.names(adapter)
    assert len(set(names.values())) == len(names)
    assert set(names.values()) <= set(peft.tensors(adapter))


@given(data=st.data(), kind=st.sampled_from(["linear", "embedding", "convolution"]), window=WINDOWS)
def test_the_shape_on_disk_is_undone(data: st.DataObject, kind: str, window: tuple[int, ...]) -> None:
    shapes = {"up": (4, 2), "down": (2, 3 * math.prod(window)), "magnitude": (4,)}
    leaf = data.draw(st.sampled_from(sorted(shapes)))
    value = torch.randn(shapes[leaf])
    on_disk = peft.to_disk(leaf, value, kind, window if kind == "convolution" else ())
    assert torch.equal(peft.from_disk(leaf, on_disk, kind), value)


@given(adapter=adapters())
def test_patterns_mean_the_ranks_and_alphas_that_peft_reads(adapter: peft.PeftAdapter) -> None:
    if adapter.kind == "VERA":
        return
    config = peft.config(adapter)
    for path in adapter.layers:
        for field, pattern, wanted in (
            ("r", "rank_pattern", adapter.rank(path)), ("lora_alpha", "alpha_pattern", adapter.alphas[path])
        ):  # fmt: skip
            hits = [key for key in config[pattern] if re.match(rf"(.*\.)?({key})$", path)]
            assert len(hits) <= 1
            assert (config[pattern][hits[0]] if hits else config[field]) == wanted


# Whatever stands in a folder --------------------------------------------------------------------------

_VALUES = (
    st.none() | st.booleans() | st.sampled_from([0, -1, 1, 2, 2**63, 10**400, 1e999]) | st.floats()
    | st.sampled_from(["", "(", "lora", "pissa", "q_proj", "\ud800"]) | st.lists(st.integers(), max_size=2)
    | st.dictionaries(st.sampled_from(["(", "up", ".*"]), st.integers() | st.text(max_size=3), max_size=2)
)  # fmt: skip
_PATHS = ["blocks.0.up", "blocks.1.down", "lm_head", "embed", "blocks", "", "nowhere"]
_LEAVES = [
    "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B",
    "base_layer.weight", "vera_lambda_b", "vera_lambda_d", "weight",
]  # fmt: skip
_SHAPES = st.sampled_from(
    [(), (0,), (2,), (12,), (2, 8), (12, 2), (8, 12), (2, 10), (2, 8, 1, 1), (12, 2, 1, 1)]
)


@settings(max_examples=150)
@given(data=st.data())
def test_no_folder_of_peft_raises_anything_else_or_touches_the_model(
    data: st.DataObject, tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    config: dict[str, Any] = {
        "peft_type": data.draw(st.sampled_from(["LORA", "LORA", "VERA", "LOHA"])), "r": 2, "lora_alpha": 4,
        "target_modules": ["up"], "modules_to_save": ["lm_head"],
    }  # fmt: skip
    fields = st.sampled_from(
        [*config, "alpha_pattern", "use_rslora", "use_dora", "bias", "init_lora_weights", "tomorrow"]
    )
    config |= data.draw(st.dictionaries(fields, _VALUES, max_size=2))
    (folder / peft.CONFIG).write_bytes(
        json.dumps(config).replace("Infinity", "1e999").encode("utf-8", "surrogatepass")
    )
    names = st.tuples(st.sampled_from(_PATHS), st.sampled_from(_LEAVES))
    tensors = {
        f"base_model.model.{path}.{leaf}": torch.ones(shape)
        for (path, leaf), shape in data.draw(st.dictionaries(names, _SHAPES, max_size=5)).items()
    }
    good = {"lora_A.weight": (2, 8), "lora_B.weight": (12, 2)}
    tensors |= {f"base_model.model.blocks.0.up.{leaf}": torch.ones(shape) for leaf, shape in good.items()}
    save_file(tensors, folder / peft.TENSORS)
    check_is_quiet(folder)
    base = Untouched(blocks())
    try:
        rf.load(base.model, folder)
    except RankfoldError:
        base.check()


def check_is_quiet(folder: Path) -> None:
    """Assert that the portable rule can be asked of any folder."""
    assert all(isinstance(sentence, str) and sentence for sentence in check(folder))
