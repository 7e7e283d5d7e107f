"""Break-for-Make: halves of both factors, frozen for good, and the joining of content and style."""

from pathlib import Path
from typing import Any

import pytest
import torch
from methods._layers import adapted, change, count, disturbed, leaves_of, linear, normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.join import join

SIDE, HALF, RANK = 8, 4, 2


def square(**arguments: Any) -> Any:
    return adapted("break-for-make", linear(SIDE, SIDE), **{"rank": RANK, **arguments})


def step(model: Any, steps: int = 5) -> None:
    """Train with strong weight decay on a fixed task."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    x = normal(20, SIDE)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - normal(20, SIDE, seed=2)).square().mean().backward()
        optimizer.step()


def blocks(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four quarters, row by row."""
    top, bottom = matrix[:HALF], matrix[HALF:]
    return top[:, :HALF], top[:, HALF:], bottom[:, :HALF], bottom[:, HALF:]


def test_the_change_has_the_four_blocks_of_the_paper() -> None:
    model = disturbed(square(alpha=3.0))
    leaf = leaves_of(model)
    a, b, c, d = (leaf[name] for name in ("up.frozen", "up.half", "down.frozen", "down.half"))
    for block, wanted in zip(blocks(change(model)), (a @ c, a @ d, b @ c, b @ d), strict=True):
        torch.testing.assert_close(block, 3 / RANK * wanted)


def test_the_prior_is_orthonormal_with_disjoint_halves() -> None:
    model = adapted("break-for-make", linear(1280, 1280), rank=6)
    leaf = leaves_of(model)
    a, c = leaf["up.frozen"], leaf["down.frozen"]
    torch.testing.assert_close(a.T @ a + c @ c.T, torch.eye(6, dtype=torch.float64))  # all 1,280 rows of Q
    assert (a.T @ a - torch.eye(6)).abs().max() > 0.1
    small = leaves_of(square())
    assert not torch.equal(small["up.frozen"], small["down.frozen"].T)


@pytest.mark.parametrize("part", ["content", "style", "both"])
def test_frozen_halves_stay_bit_for_bit_under_weight_decay(part: str) -> None:
    model = square(part=part)
    before = {name: value.clone() for name, value in leaves_of(model).items()}
    corner = blocks(change(model))
    step(model)
    moved = {name for name, value in leaves_of(model).items() if not torch.equal(value, before[name])}
    assert moved == {"content": {"down.half"}, "style": {"up.half"}}.get(part, {"down.half", "up.half"})
    after = blocks(change(model))
    assert torch.allclose(after[0], corner[0], atol=1e-14)
    assert torch.allclose(after[1], corner[1], atol=1e-14) is (part == "style")
    assert torch.allclose(after[2], corner[2], atol=1e-14) is (part == "content")


def test_half_of_a_square_weights_factors_train() -> None:
    assert count(square()) == RANK * SIDE
    assert count(square(part="content")) == count(square(part="style")) == RANK * HALF


def test_oblong_weights_and_outputs_of_attention_have_no_prior_and_start_at_the_base() -> None:
    oblong = adapted("break-for-make", linear(6, 8), rank=RANK)
    assert torch.equal(oblong(normal(3, 8)), linear(6, 8)(normal(3, 8)))
    model = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_out": nn.ModuleList([nn.Linear(8, 8)])})
    rf.adapt(model, "break-for-make", rank=RANK, targets="all-linear")
    assert leaves_of(model, "to_q")["up.frozen"].any()
    output = leaves_of(model, "to_out.0")
    assert not output["up.frozen"].any()
    assert output["down.frozen"].any()
    assert output["down.frozen"].shape == (RANK, 4)


def test_the_free_half_of_down_has_a_standard_deviation_of_one_over_the_rank() -> None:
    leaf = leaves_of(adapted("break-for-make", linear(512, 512), rank=16))
    assert abs(leaf["down.half"].std() * 16 - 1) < 0.05
    assert not leaf["up.half"].any()


def test_odd_sides_freeze_the_smaller_half() -> None:
    leaf = leaves_of(adapted("break-for-make", linear(5, 7), rank=RANK))
    assert leaf["up.frozen"].shape == (2, RANK)
    assert leaf["down.half"].shape == (RANK, 4)


# Two stages -------------------------------------------------------------------------------------------


def stages(seed: int = 0) -> Any:
    """Return a model with a trained adapter of content and one of style, and what they hold."""
    model = square(part="content", name="content")
    step(model)
    content = {name: value.clone() for name, value in leaves_of(model).items()}
    rf.adapt(model, "break-for-make", rank=RANK, targets=["0"], part="style", name="style", seed=seed)
    step(model)
    return model, content, {name: value.clone() for name, value in leaves_of(model).items()}


def test_the_same_seed_freezes_the_same_halves() -> None:
    _, content, style = stages()
    for name in ("up.frozen", "down.frozen"):
        assert torch.equal(content[name], style[name])
    assert not torch.equal(content["down.half"], style["down.half"])


def test_joining_takes_content_in_the_right_columns_and_style_in_the_bottom_rows() -> None:
    model, content, style = stages()
    assert join(model, "content", "style") is model
    leaf = leaves_of(model)
    assert torch.equal(leaf["down.half"], content["down.half"])
    for name in ("up.frozen", "up.half", "down.frozen"):
        assert torch.equal(leaf[name], style[name])
    a, b, c, d = style["up.frozen"], style["up.half"], style["down.frozen"], content["down.half"]
    for block, wanted in zip(blocks(change(model)), (a @ c, a @ d, b @ c, b @ d), strict=True):
        torch.testing.assert_close(block, wanted)
    assert count(model) == RANK * SIDE
    step(model)
    after = leaves_of(model)
    assert torch.equal(after["up.frozen"], style["up.frozen"])
    assert not torch.equal(after["up.half"], style["up.half"])
    assert not torch.equal(after["down.half"], content["down.half"])


def test_saved_adapters_are_joined_after_loading_and_the_joined_one_is_saved(tmp_path: Path) -> None:
    model, _, _ = stages()
    folders = [rf.save(model, tmp_path / name, name) for name in ("content", "style")]
    wanted = change(join(model, "content", "style"))
    other = linear(SIDE, SIDE)
    for folder in folders:
        rf.load(other, folder)
    assert torch.equal(change(join(other, "content", "style", "both")), wanted)
    loaded = rf.load(linear(SIDE, SIDE), rf.save(other, tmp_path / "both", "both"))
    assert torch.equal(change(loaded), wanted)


def test_adapters_that_do_not_fit_are_not_joined() -> None:
    sentence = "'content' and 'style' cannot be joined: both have to be of break-for-make, with the same seed"
    model, _, _ = stages(seed=1)
    with pytest.raises(Incompatible, match=sentence):
        join(model, "content", "style")
    model = square(part="content", name="content")
    rf.adapt(model, "lora", rank=RANK, targets=["0"], name="style")
    with pytest.raises(Incompatible, match=sentence):
        join(model, "content", "style")
    assert set(model.__dict__["_rankfold"].adapters) == {"content", "style"}
    rf.remove(model, "style")
    rf.adapt(model, "break-for-make", rank=RANK + 1, targets=["0"], name="style")
    with pytest.raises(Incompatible, match=sentence):
        join(model, "content", "style")


def test_joining_keeps_the_blocks_that_one_of_the_two_has_learnt_alone() -> None:
    """Content alone decides the top right block, style alone the bottom left one, as before joining."""
    model, _, _ = stages()
    apart = {name: blocks(change(rf.use(model, name))) for name in ("content", "style")}
    joined = blocks(change(join(model, "content", "style")))
    torch.testing.assert_close(joined[1], apart["content"][1])
    torch.testing.assert_close(joined[2], apart["style"][2])
    assert not torch.allclose(joined[1], apart["style"][1])


def test_another_part_is_refused() -> None:
    with pytest.raises(InvalidOption, match="part must be content, style or both, not 'neither'"):
        square(part="neither")


def test_an_adapter_is_joined_only_for_the_half_that_it_has_trained() -> None:
    model, _, _ = stages()
    with pytest.raises(Incompatible, match=r"'style' has trained B alone, with part='style'.*D of content"):
        join(model, "style", "content")
    with pytest.raises(Incompatible, match=r"'content' has trained D alone, with part='content'.*B of style"):
        join(model, "content", "content")
    assert set(model.__dict__["_rankfold"].adapters) == {"content", "style"}
    both = square(name="content")
    rf.adapt(both, "break-for-make", rank=RANK, targets=["0"], name="style")
    assert join(both, "content", "style") is both
