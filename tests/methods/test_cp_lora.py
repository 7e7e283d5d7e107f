"""CP-LoRA, and the normalised changes of a kernel; all of them on digits that are turned."""

import pytest
import torch
from methods._layers import (
    adapted,
    base,
    change,
    convolution,
    count,
    disturbed,
    expression_of,
    leaves_of,
    normal,
    rank_of,
)  # fmt: skip
from torch import nn

NORMALISED = {"dora-c": "lora-c", "convdora": "convlora", "cp-dora": "cp-lora"}


def test_a_kernel_changes_by_a_sum_of_outer_products() -> None:
    model = disturbed(adapted("cp-lora", convolution(), rank=3, alpha=6))
    leaves = [leaves_of(model)[name].detach() for name in ("out", "in", "window1", "window2")]
    expected = 2 * torch.einsum("ot,it,ht,wt->oihw", *leaves)
    torch.testing.assert_close(change(model).reshape(6, 4, 3, 2), expected)
    assert count(model) == 3 * (6 + 4 + 3 + 2)
    x = normal(2, 4, 7, 6)
    kernel = base(model).reshape(6, 4, 3, 2) + expected
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, kernel, model[0].bias))


def test_every_unfolding_has_the_rank_and_every_slice_is_a_sum_of_separable_filters() -> None:
    model = disturbed(adapted("cp-lora", convolution(8, 6, (5, 4)), rank=2))
    kernel = change(model).reshape(8, 6, 5, 4)
    assert [rank_of(kernel.movedim(mode, 0).flatten(1)) for mode in range(4)] == [2, 2, 2, 2]
    assert all(rank_of(each) <= 2 for each in kernel.flatten(0, 1))


def test_at_the_start_only_the_output_factor_is_zero_and_only_it_has_a_gradient() -> None:
    model, x = adapted("cp-lora", convolution(), rank=3), normal(2, 4, 7, 6)
    assert torch.equal(model(x), convolution()(x))
    (model(x) * normal(2, 6, 5, 5, seed=3)).sum().backward()
    empty = [name for name, leaf in leaves_of(model).items() if not leaf.any()]
    moved = [name for name, leaf in leaves_of(model).items() if leaf.grad.any()]
    assert empty == moved == ["out"]


def test_the_other_factors_start_uniform_by_their_rows() -> None:
    leaves = leaves_of(adapted("cp-lora", convolution(6, 64, (5, 4)), rank=100))
    for name, size in (("in", 64), ("window1", 5), ("window2", 4)):
        assert leaves[name].shape == (size, 100)
        assert 0.97 / size**0.5 < leaves[name].abs().max() <= 1 / size**0.5


@pytest.mark.parametrize("method", NORMALISED)
def test_every_output_channel_has_the_length_of_its_magnitude(method: str) -> None:
    model = adapted(method, convolution(), rank=2)
    torch.testing.assert_close(leaves_of(model)["magnitude"].detach(), base(model).norm(dim=1))
    disturbed(model, 1.0)
    lengths = expression_of(model).dense().detach().norm(dim=1)
    torch.testing.assert_close(lengths, leaves_of(model)["magnitude"].detach().abs())


@pytest.mark.parametrize("method", NORMALISED)
def test_the_direction_is_that_of_the_plain_change(method: str) -> None:
    plain = adapted(NORMALISED[method], convolution(), rank=2, alpha=3)
    model = adapted(method, convolution(), rank=2, alpha=3)
    for name, leaf in leaves_of(plain).items():
        assert torch.equal(leaf, leaves_of(model)[name])
        leaf.data += 0.3
        leaves_of(model)[name].data += 0.3
    direction = nn.functional.normalize(base(plain) + change(plain), dim=1)
    expected = leaves_of(model)["magnitude"].detach()[:, None] * direction
    torch.testing.assert_close(expression_of(model).dense().detach(), expected)
    x = normal(2, 4, 7, 6)
    wanted = nn.functional.conv2d(x, expected.reshape(6, 4, 3, 2), model[0].bias)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("method", NORMALISED)
@pytest.mark.parametrize("detach", [True, False])
def test_the_length_takes_part_in_the_gradient_on_request_only(method: str, detach: bool) -> None:
    model, x = adapted(method, convolution(), rank=2, detach=detach), normal(2, 4, 7, 6)
    disturbed(model)
    (model(x) * normal(2, 6, 5, 5, seed=3)).sum().backward()
    leaves = leaves_of(model)
    got = leaves["out" if method == "cp-dora" else "up"].grad
    expression = expression_of(model)
    direction = expression.direction.dense()
    norm = direction.norm(dim=1, keepdim=True)
    matrix = leaves["magnitude"].detach()[:, None] * direction / (norm.detach() if detach else norm)
    y = nn.functional.conv2d(x, matrix.reshape(6, 4, 3, 2))
    leaf = leaves["out" if method == "cp-dora" else "up"]
    wanted = torch.autograd.grad((y * normal(2, 6, 5, 5, seed=3)).sum(), leaf)[0]
    torch.testing.assert_close(got, wanted)
