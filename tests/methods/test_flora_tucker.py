"""FLoRA: a Tucker change in the kernel's own dimensions."""

import math

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    convolution,
    count,
    disturbed,
    expression_of,
    leaves_of,
    linear,
    normal,
    rank_of,
)  # fmt: skip
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankfold.errors import InvalidOption


def test_a_kernel_changes_by_the_tucker_product() -> None:
    model = disturbed(adapted("flora-tucker", convolution(), rank=3, window_rank=2, alpha=6))
    leaves = {name: leaf.detach() for name, leaf in leaves_of(model).items()}
    expected = 2 * torch.einsum(
        "abcd,oa,ib,hc,wd->oihw",
        leaves["core"],
        leaves["out"],
        leaves["in"],
        leaves["window1"],
        leaves["window2"],
    )
    torch.testing.assert_close(change(model).reshape(6, 4, 3, 2), expected)
    x = normal(2, 4, 7, 6)
    kernel = base(model).reshape(6, 4, 3, 2) + expected
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, kernel, model[0].bias))


def unfolded_ranks(kernel: Tensor) -> list[int]:
    return [rank_of(kernel.movedim(mode, 0).flatten(1)) for mode in range(kernel.dim())]


def test_every_mode_keeps_its_rank() -> None:
    model = disturbed(adapted("flora-tucker", convolution(8, 6, (5, 4)), rank=3, window_rank=2))
    assert unfolded_ranks(change(model).reshape(8, 6, 5, 4)) == [3, 3, 2, 2]


def test_full_window_ranks_leave_the_window_free() -> None:
    model = adapted("flora-tucker", convolution(8, 8, (3, 2)), rank=1, window_rank=9)
    assert leaves_of(model)["core"].shape == (1, 1, 3, 2)


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
def test_a_matrix_changes_by_up_core_down(shape: tuple[int, int]) -> None:
    model = disturbed(adapted("flora-tucker", linear(*shape), rank=3))
    leaves = {name: leaf.detach() for name, leaf in leaves_of(model).items()}
    torch.testing.assert_close(change(model), leaves["out"] @ leaves["core"] @ leaves["in"].T)
    assert rank_of(change(model)) == 3
    assert count(model) == 3 * 3 + 3 * (6 + 8)


def test_at_the_start_only_the_core_has_a_gradient() -> None:
    model, x = adapted("flora-tucker", rank=3, alpha=6), normal(5, 8)
    assert torch.equal(model(x), linear()(x))
    dense, leaves = backward(model, x), leaves_of(model)
    torch.testing.assert_close(leaves["core"].grad, 2 * leaves["out"].T @ dense @ leaves["in"])
    assert not leaves["out"].grad.any()
    assert not leaves["in"].grad.any()


def test_at_the_start_a_kernels_core_takes_the_gradient_through_every_mode() -> None:
    model, x = adapted("flora-tucker", convolution(), rank=3), normal(2, 4, 7, 6)
    plain = convolution()
    weights = normal(2, 6, 5, 5, seed=3)
    (model(x) * weights).sum().backward()
    (plain(x) * weights).sum().backward()
    leaves = leaves_of(model)
    expected = torch.einsum(
        "oihw,oa,ib,hc,wd->abcd",
        plain[0].weight.grad,
        leaves["out"],
        leaves["in"],
        leaves["window1"],
        leaves["window2"],
    )
    torch.testing.assert_close(leaves["core"].grad, expected)


def test_factors_are_kaiming_normal() -> None:
    leaves = leaves_of(adapted("flora-tucker", linear(300, 400), rank=20))
    for name in ("out", "in"):
        assert leaves[name].std().item() == pytest.approx(math.sqrt(0.5 / 20), rel=0.05)


def test_a_kernel_is_applied_as_two_mixes_of_channels_around_a_small_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(12, 16, 3, padding=1)).double()
    adapted("flora-tucker", model, rank=3, window_rank=2)
    with FlopCounterMode(display=False) as counter:
        model(normal(2, 12, 7, 7))
    tokens = 2 * 7 * 7
    change = 12 * 3 + 3 * 3 * 9 + 3 * 16
    making = 3 * 3 * 2 * 3 * 2 + 3 * 3 * 3 * 2 * 3  # the kernel, one window axis after the other
    assert counter.get_total_flops() == 2 * (tokens * (12 * 16 * 9 + change) + making)
    assert expression_of(model).macs(tokens) == tokens * (12 * 16 * 9 + change)


def test_a_group_of_channels_is_the_input_mode_of_a_grouped_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(8, 6, 3, groups=2)).double()
    disturbed(adapted("flora-tucker", model, rank=3))
    assert leaves_of(model)["in"].shape == (4, 3)
    x = normal(2, 8, 5, 5)
    kernel = (base(model) + change(model)).reshape(6, 4, 3, 3)
    torch.testing.assert_close(model(x), nn.functional.conv2d(x, kernel, model[0].bias, groups=2))


def test_a_window_rank_below_one_is_refused() -> None:
    with pytest.raises(InvalidOption, match="window_rank must be at least 1"):
        adapted("flora-tucker", convolution(), rank=2, window_rank=0)
