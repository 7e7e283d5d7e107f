"""Masks, losses, the forms of batches, and what is refused."""

from __future__ import annotations

from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankfold.errors import Incompatible, InvalidOption, RankfoldError, UnknownTarget, UnsupportedLayer
from rankfold.statistics import collect

PATH = "blocks.0.q"
Batches = list[dict[str, Tensor]]


def mean(net: nn.Module, batches: Any, **options: Any) -> Tensor:
    found: Tensor = collect(net, batches, "input_mean", **options)[PATH].get("input_mean")
    return found


def expected(batches: Batches, keep: list[Tensor]) -> Tensor:
    return torch.cat([batch["x"][mask] for batch, mask in zip(batches, keep, strict=True)]).mean(0)


def test_masks_decide_which_tokens_count(net: nn.Module, batches: Batches) -> None:
    padding = [batch["attention_mask"].bool() for batch in batches]
    for batch, mask in zip(batches, padding, strict=True):
        batch["labels"][~mask] = 1  # padding does not count whatever its label
    labels = [(b["labels"] != -100) & mask for b, mask in zip(batches, padding, strict=True)]
    everything = [torch.ones_like(mask) for mask in padding]
    first = [torch.arange(5).expand_as(mask) == 0 for mask in padding]
    close = torch.testing.assert_close
    close(mean(net, batches), expected(batches, padding))
    close(mean(net, batches, mask="labels"), expected(batches, labels))
    close(mean(net, batches, mask=None), expected(batches, everything))
    close(
        mean(net, batches, mask=lambda batch: torch.arange(5).expand_as(batch["labels"]) == 0),
        expected(batches, first),
    )


@pytest.mark.parametrize(
    "what", ["input_mean", ("input_gram", {"per_sample": "max"}), "output_mean"], ids=str
)
def test_activations_with_tokens_before_the_batch_have_the_statistics_of_those_behind_it(what: Any) -> None:
    class Laid(nn.Module):
        def __init__(self, tokens_first: bool) -> None:
            super().__init__()
            self.inner, self.tokens_first = nn.Linear(3, 2, bias=False), tokens_first
            self.inner.weight.data.fill_(0.5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1) if self.tokens_first else x)  # type: ignore[no-any-return]

    batch = {"x": torch.randn(2, 4, 3), "attention_mask": torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])}
    name, options = (what, {}) if isinstance(what, str) else what
    found = [collect(Laid(first), [batch], [what])["inner"] for first in (True, False)]
    assert found[0].tokens == found[1].tokens == 4
    torch.testing.assert_close(found[0].get(name, **options), found[1].get(name, **options))


def test_activations_in_which_batch_and_tokens_are_one_axis_are_masked_too() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.pooled = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.pooled(self.inner(x.flatten(0, 1)).view_as(x)[:, 0])  # type: ignore[no-any-return]

    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    x = torch.randn(2, 3, 3)
    found = collect(Flat(), [{"x": x, "attention_mask": mask}], "input_mean")
    torch.testing.assert_close(found["inner"].get("input_mean"), x[mask.bool()].mean(0))
    assert (found["inner"].tokens, found["pooled"].tokens) == (3, 2)


def test_batches_may_be_tuples_mappings_or_lone_tensors() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
            return self.layer(x + shift)  # type: ignore[no-any-return]

    x, pair = torch.randn(4, 3), namedtuple("pair", "x shift")

    def found(batch: Any) -> Tensor:
        value: Tensor = collect(Two(), iter([batch]), "input_mean")["layer"].get("input_mean")
        return value

    for batch in ((x, 1.0), [x, 1.0], pair(x, torch.tensor(1.0)), {"x": x, "shift": 1.0}):
        torch.testing.assert_close(found(batch), x.mean(0) + 1)
    torch.testing.assert_close(found(UserDict(x=x)), x.mean(0))
    torch.testing.assert_close(found(x), x.mean(0))


def test_a_tokenizers_batch_stays_as_it_is_given() -> None:
    from transformers import BatchEncoding

    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    seen: list[Any] = []

    def loss(m: nn.Module, batch: Any) -> Tensor:
        seen.append(batch)
        return m(batch.values_of).sum()  # type: ignore[no-any-return]

    collect(model, [BatchEncoding({"values_of": x})], "gradient", loss=loss)
    assert isinstance(seen[0], BatchEncoding)


def test_the_loss_is_an_attribute_an_entry_or_a_function() -> None:
    class Model(nn.Module):
        def __init__(self, wrap: Any) -> None:
            super().__init__()
            self.layer, self.wrap = nn.Linear(3, 2), wrap

        def forward(self, x: Tensor) -> Any:
            return self.wrap(self.layer(x).sum())

    x = torch.randn(4, 3)
    wraps: list[Any] = [lambda v: SimpleNamespace(loss=v), lambda v: {"loss": v}]
    for wrap in wraps:
        found = collect(Model(wrap), [x], "gradient")["layer"].get("gradient")
        torch.testing.assert_close(found, x.sum(0).expand(2, 3))
    found = collect(Model(lambda v: v), [x], "gradient", loss=lambda m, b: 2 * m(b))["layer"].get("gradient")
    torch.testing.assert_close(found, 2 * x.sum(0).expand(2, 3))


def test_batches_without_labels_are_refused_where_gradients_are_asked_for(
    net: nn.Module, batches: Batches
) -> None:
    without = [{"x": batch["x"]} for batch in batches]
    with pytest.raises(Incompatible, match=r"batch 0: Net gives no loss and the batch has no labels"):
        collect(net, without, "gradient")
    collect(net, without, "input_gram")


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"what": "input_grams"}, InvalidOption, "did you mean input_gram"),
        ({"what": []}, InvalidOption, "no statistic was asked for"),
        ({"what": ["gradient", "gradient"]}, InvalidOption, "asked for twice"),
        ({"what": [("input_gram", 3)]}, InvalidOption, "a name or a pair"),
        ({"what": 3}, InvalidOption, "must be a sequence"),
        ({"what": [("input_gram", {"per_sample": "min"})]}, InvalidOption, "per_sample must be"),
        ({"what": [("hessian_diagonal", {"samples": 0})]}, InvalidOption, "samples must be"),
        ({"mask": "paddings"}, InvalidOption, "mask must be"),
        ({"mask": lambda batch: batch["x"]}, InvalidOption, r"mask\(batch\) is \(2, 5, 6\)"),
        ({"mask": lambda batch: 3}, InvalidOption, r"mask\(batch\) is int"),
        ({"nan": "ignore"}, InvalidOption, "nan must be"),
        ({"every": 0}, InvalidOption, "every must be"),
        ({"targets": "nothing"}, UnknownTarget, "matches nothing"),
        ({"targets": "blocks"}, UnsupportedLayer, r"blocks\.0: Block holds no single weight"),
        ({"batches": []}, InvalidOption, "no batches"),
        ({"batches": iter(())}, InvalidOption, "no batches"),
        ({"batches": {"x": torch.ones(1, 5, 6)}}, InvalidOption, "put it in a list"),
        ({"batches": 3}, InvalidOption, "iterable of batches"),
        ({"loss": lambda m, b: 3.0, "what": "gradient"}, Incompatible, "returned no tensor"),
        ({"loss": lambda m, b: m(**b)["logits"], "what": "gradient"}, Incompatible, "must be one number"),
        ({"loss": lambda m, b: m(**b)["loss"].detach(), "what": "gradient"}, Incompatible, "depends on none"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    net: nn.Module, batches: Batches, options: dict[str, Any], kind: type[Exception], sentence: str
) -> None:
    given = {"batches": batches, "what": "input_mean", **options}
    with pytest.raises(kind, match=sentence) as caught:
        collect(net, given.pop("batches"), given.pop("what"), **given)
    assert isinstance(caught.value, RankfoldError)


def test_masks_of_a_shape_without_meaning_are_refused(net: nn.Module, batches: Batches) -> None:
    square = [{**batches[0], "attention_mask": torch.ones(2, 1, 5, 5)}]
    with pytest.raises(InvalidOption, match=r"attention_mask is \(2, 1, 5, 5\)"):
        mean(net, square)
    with pytest.raises(InvalidOption, match="has no labels"):
        mean(net, [{"x": batches[0]["x"]}], mask="labels")
    with pytest.raises(InvalidOption, match="no axes"):
        mean(net, [{**batches[0], "labels": torch.ones(2)}], mask="labels")
    with pytest.raises(InvalidOption, match="differ in shape"):
        mean(net, [{**batches[0], "attention_mask": torch.ones(2, 4)}], mask="labels")
    mean(net, [{"x": batches[0]["x"]}], mask="padding")


def test_an_iterator_that_was_used_up_is_an_error(net: nn.Module, batches: Batches) -> None:
    once = iter(batches)
    mean(net, once)
    with pytest.raises(InvalidOption, match="used up before"):
        mean(net, once)
