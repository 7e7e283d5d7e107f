"""SLoRA, NLoRA and IntTune: three factors, from noise or from blocks of the weight, all trained or one."""

import pytest
import torch
from methods._layers import (
    adapted,
    backward,
    base,
    change,
    count,
    disturbed,
    leaves_of,
    normal,
    rank_of,
    sgd_step,
)  # fmt: skip

from rankfold.errors import InvalidOption


def test_slora_begins_with_a_gradient_on_the_left_factor_only() -> None:
    leaves = leaves_of(model := adapted("slora", rank=3))
    assert count(model) == 3 * (6 + 8) + 9
    assert not change(model).any()
    backward(model, normal(5, 8))
    assert leaves["up"].grad.any()
    assert not leaves["core"].grad.any()
    assert not leaves["down"].grad.any()


@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_the_official_start_multiplies_three_blocks_of_the_weight(method: str) -> None:
    model = adapted(method, rank=3, core="block")
    weight = base(model)
    torch.testing.assert_close(change(model), weight[:, :3] @ weight[:3, :3] @ weight[:3])


@pytest.mark.parametrize("method", ["nlora", "inttune"])
@pytest.mark.parametrize("alpha", [None, 6])
def test_the_inverse_holds_the_first_rows_and_columns_and_errs_by_the_schur_complement(
    method: str, alpha: float | None
) -> None:
    model = adapted(method, rank=3, core="inverse", alpha=alpha)
    weight, approximation = base(model), change(model)
    torch.testing.assert_close(approximation[:3], weight[:3])
    torch.testing.assert_close(approximation[:, :3], weight[:, :3])
    schur = weight[3:, 3:] - weight[3:, :3] @ torch.linalg.inv(weight[:3, :3]) @ weight[:3, 3:]
    torch.testing.assert_close((weight - approximation)[3:, 3:], schur)


@pytest.mark.parametrize("method", ["nlora", "inttune"])
def test_the_residual_form_starts_at_the_base_and_moves_along_the_inverse_forms_gradient(method: str) -> None:
    models = [adapted(method, rank=3, core=core) for core in ("inverse", "residual")]
    starts = [change(model) for model in models]
    assert starts[1].abs().max() < 1e-12
    for model in models:
        backward(model, normal(5, 8))
        sgd_step(model, 0.01)
    moved = [change(model) - start for model, start in zip(models, starts, strict=True)]
    assert moved[0].abs().max() > 1e-3
    torch.testing.assert_close(*moved)


def test_inttune_keeps_slices_of_the_weight_and_trains_what_is_between() -> None:
    model = disturbed(adapted("inttune", rank=3))
    leaves = leaves_of(model)
    assert count(model) == 9
    assert torch.equal(leaves["left"], base(model)[:, :3])
    assert torch.equal(leaves["right"], base(model)[:3])
    assert rank_of(change(model)) == 3


def test_training_the_factors_does_not_reach_the_weight_that_they_were_cut_from() -> None:
    model = adapted("nlora", rank=3, core="block")
    before, core = base(model).clone(), leaves_of(model)["core"].detach().clone()
    leaves_of(model)["up"].data.zero_()
    leaves_of(model)["down"].data.zero_()
    assert torch.equal(base(model), before)
    assert torch.equal(leaves_of(model)["core"], core)


def test_an_unknown_start_of_the_core_is_refused() -> None:
    with pytest.raises(InvalidOption, match="block, inverse or residual"):
        adapted("nlora", rank=3, core="identity")
