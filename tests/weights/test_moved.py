"""A stored weight that training moves is a copy: the layer keeps its own."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankfold as rf
from rankfold.errors import Incompatible, RankfoldError
from rankfold.weights import Moved, trained

POINT = rf.Recipe("lora", dynamics=("relora",))


def adapted(layer: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer.reset_parameters() if hasattr(layer, "reset_parameters") else None
    return rf.adapt(nn.Sequential(layer).to(dtype), POINT, rank=2, targets=["0"])  # type: ignore[return-value]


def leaf_of(model: nn.Sequential) -> Moved:
    return next(leaf for leaf in model[0].expression.leaves() if isinstance(leaf, Moved))


def moved(model: nn.Sequential, size: float = 1.0) -> torch.Tensor:
    """Move the weight; return the change."""
    generator = torch.Generator().manual_seed(1)
    leaf = leaf_of(model)
    change = size * torch.randn(leaf.value.shape, generator=generator)
    leaf.move(change)
    return change


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), lambda: torch.ones(2, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), lambda: torch.arange(7)),
    "convolution": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2), lambda: torch.ones(1, 4, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_move_changes_the_function_as_a_change_of_the_stored_weight_does(kind: str) -> None:
    make, inputs = LAYERS[kind]
    model = adapted(make())
    plain = copy.deepcopy(model[0].original)
    change = moved(model)
    with torch.no_grad():
        plain.weight += change.view(plain.weight.shape)
        torch.testing.assert_close(model(inputs()), plain(inputs()))
        torch.testing.assert_close(
            model.eval()(inputs()), plain(inputs())
        )  # also where derived tensors are kept


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_keeps_its_own_weight_and_removal_brings_it_back(kind: str) -> None:
    make, inputs = LAYERS[kind]
    model = adapted(make())
    before = model[0].weight.detach().clone()
    output = model(inputs())
    moved(model)
    assert torch.equal(model[0].weight, before)
    with rf.disabled(model):
        assert torch.equal(model(inputs()), output)
    rf.remove(model)
    assert torch.equal(model[0].weight, before)
    assert torch.equal(model(inputs()), output)


@pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_the_copy_is_in_float32_or_better_and_the_function_in_the_models_dtype(
    dtype: torch.dtype, held: torch.dtype
) -> None:
    model = adapted(nn.Linear(5, 4), dtype)
    x = torch.ones(2, 5, dtype=dtype)
    moved(model, 1e-6)
    assert leaf_of(model).value.dtype == held
    assert model(x).dtype == dtype
    model(x).sum().backward()
    assert model[0].expression.leaf("up").value.grad is not None


def test_a_thousand_small_moves_of_a_weight_in_bfloat16_are_not_rounded_away() -> None:
    model = adapted(nn.Linear(5, 4), torch.bfloat16)
    leaf = leaf_of(model)
    start = leaf.value.clone()
    for _ in range(1000):
        leaf.move(torch.full((4, 5), 1e-4))
    torch.testing.assert_close(leaf.value - start, torch.full((4, 5), 0.1), atol=1e-4, rtol=0)


def test_what_was_derived_for_inference_follows_a_move() -> None:
    model = adapted(nn.Linear(5, 4)).eval()
    x = torch.ones(2, 5)
    with torch.no_grad():
        before = model(x)
        change = moved(model)
        torch.testing.assert_close(model(x) - before, x @ change.T)


def test_a_copy_of_a_model_moves_on_its_own() -> None:
    model = adapted(nn.Linear(5, 4))
    other = copy.deepcopy(model)
    before = model(torch.ones(2, 5))
    moved(other)
    assert torch.equal(model(torch.ones(2, 5)), before)
    assert not torch.allclose(other(torch.ones(2, 5)), before)


def test_the_copy_is_stored_counted_and_not_trained() -> None:
    expression = adapted(nn.Linear(5, 4))[0].expression
    assert expression.count().stored == 4 * 5 + 2 * (4 + 5)
    assert expression.count().trainable == 2 * (4 + 5)
    assert expression.formula() == "W[4x5] + (up*[4x2] @ down*[2x5])"


@pytest.mark.parametrize("transposed", [False, True])
def test_what_was_moved_is_saved_and_loaded(transposed: bool, tmp_path: Path) -> None:
    def layer() -> nn.Module:
        made = Conv1D(4, 5) if transposed else nn.Linear(5, 4)
        nn.init.constant_(made.weight, 0.5)
        return made

    model = rf.adapt(nn.Sequential(layer()), POINT, rank=2, targets=["0"])
    moved(model)
    model[0].bias.data.zero_()
    rf.save(model, tmp_path / "adapter")
    base = nn.Sequential(layer())
    base[0].bias.data.zero_()
    loaded = rf.load(base, tmp_path / "adapter")
    assert torch.equal(loaded(torch.ones(2, 5)), model(torch.ones(2, 5)))


def test_it_folds_into_the_stored_weight() -> None:
    model = adapted(nn.Linear(5, 4))
    change, before = moved(model), model[0].weight.detach().clone()
    rf.fold(model)
    torch.testing.assert_close(model[0].weight, before + change)


def test_it_stands_on_no_other_adapter() -> None:
    leaf = leaf_of(adapted(nn.Linear(5, 4)))
    with pytest.raises(Incompatible, match="cannot stand on another adapter's change"):
        leaf.stand_on(trained(torch.zeros(4, 5)))
    model = rf.adapt(nn.Sequential(nn.Linear(5, 4)), "lora", rank=2, targets=["0"], name="other")
    rf.adapt(model, POINT, rank=2, targets=["0"])
    with pytest.raises(Incompatible, match="has moved the stored weights themselves"):
        rf.use(model, ["other", "default"])


def test_layers_with_one_tensor_move_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))  # type: ignore[no-any-return]

    model = Tied()
    with pytest.warns(UserWarning, match="shares its tensor"):
        rf.adapt(model, POINT, rank=2, targets=["embed"])
    leaf = next(leaf for leaf in model.embed.expression.leaves() if isinstance(leaf, Moved))
    leaf.move(torch.ones(7, 4))
    weight = leaf.value
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(7)), weight @ weight.T)


@pytest.mark.parametrize("structure", ["lora", "dora"])
def test_a_peft_file_holds_it_only_as_a_change_of_its_full_rank(structure: str, tmp_path: Path) -> None:
    layer = nn.Linear(5, 4)
    point = rf.Recipe(structure, dynamics=("relora",))
    model = rf.adapt(nn.Sequential(copy.deepcopy(layer)), point, rank=2, targets=["0"])
    moved(model)
    with pytest.raises(RankfoldError, match="pass rank= or max_error="):
        rf.export(model, tmp_path / "refused")
    rf.export(model, tmp_path / "peft", rank=4)
    x = torch.ones(2, 5)
    torch.testing.assert_close(rf.load(nn.Sequential(layer), tmp_path / "peft")(x), model(x))
