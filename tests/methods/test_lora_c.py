"""LoRA-C and ConvLoRA: a kernel laid out as channels times one window axis."""

import pytest
import torch
from methods._layers import adapted, base, change, convolution, count, disturbed, leaves_of, normal, rank_of
from torch import Tensor, nn

BOTH = pytest.mark.parametrize(("method", "inner"), [("lora-c", 2), ("convlora", 6)])


def kernel_change(model: nn.Module) -> Tensor:
    return change(model).reshape(model[0].weight.shape)


@BOTH
def test_the_change_is_the_product_seen_as_a_kernel(method: str, inner: int) -> None:
    model = disturbed(adapted(method, convolution(8, 5, (3, 3)), rank=2, alpha=6))
    up, down = (leaves_of(model)[name].detach() for name in ("up", "down"))
    assert (up.shape, down.shape) == ((8 * 3, inner), (inner, 5 * 3))
    torch.testing.assert_close(kernel_change(model), 3 * (up @ down).view(8, 5, 3, 3))
    assert count(model) == inner * 3 * (8 + 5)


def test_an_entry_stands_in_the_row_and_column_of_the_plain_view() -> None:
    model = disturbed(adapted("lora-c", convolution(4, 5, (3, 3)), rank=2))
    product = leaves_of(model)["up"].detach() @ leaves_of(model)["down"].detach()
    kernel = kernel_change(model)
    for o, i, h, w in torch.cartesian_prod(*map(torch.arange, kernel.shape)).tolist():
        row, column = o * 3 + (i * 3 + h) // 5, ((i * 3 + h) % 5) * 3 + w
        assert kernel[o, i, h, w].item() == pytest.approx(product[row, column].item())


@BOTH
def test_the_layout_bounds_the_rank_and_the_usual_unfolding_exceeds_it(method: str, inner: int) -> None:
    model = disturbed(adapted(method, convolution(8, 8, (3, 3)), rank=2))
    assert rank_of(change(model).reshape(8 * 3, 8 * 3)) == inner
    assert rank_of(change(model)) == min(8, 3 * inner)


@BOTH
@pytest.mark.parametrize("groups", [1, 2])
def test_the_layer_is_the_convolution_with_the_merged_kernel(method: str, inner: int, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 2), 2, 1, groups=groups)).double()
    disturbed(adapted(method, model, rank=2))
    assert leaves_of(model)["up"].shape == (6 // groups * 3, inner)
    assert leaves_of(model)["down"].shape == (inner, 4 * 2)
    x = normal(2, 4, 7, 6)
    kernel = base(model).reshape(model[0].weight.shape) + kernel_change(model)
    wanted = nn.functional.conv2d(x, kernel, model[0].bias, 2, 1, groups=groups)
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("method", ["lora-c", "convlora"])
def test_a_rank_above_the_sides_reaches_every_kernel(method: str) -> None:
    model = disturbed(adapted(method, convolution(3, 3, (3, 3)), rank=12))
    assert rank_of(change(model).reshape(9, 9)) == 9
