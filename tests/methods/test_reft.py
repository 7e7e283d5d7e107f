"""LoReFT: hidden states edited inside a trained subspace."""

from typing import Any

import pytest
import torch
from methods._layers import count, disturbed, trained
from methods._peft import HOSTS
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption

WIDTH = 16


def llama(dtype: torch.dtype = torch.float64) -> Any:
    return HOSTS["llama"].model(dtype)


def adapted(positions: str = "f2+l1", rank: int = 3) -> tuple[Any, Any]:
    """Return a model whose first block is edited, away from its start, and the edit."""
    model = rf.adapt(llama(), "reft", rank=rank, targets="model.layers.0", positions=positions)
    disturbed(model)
    return model, model.model.layers[0].rankfold_default_branch


def ids(tokens: int = 9) -> Tensor:
    return torch.randint(7, 19, (2, tokens), generator=torch.Generator().manual_seed(1))


def hidden(model: Any, tokens: Tensor, **inputs: Tensor) -> Tensor:
    """Return what the first block hands on."""
    states: Tensor = model(tokens, output_hidden_states=True, **inputs).hidden_states[1]
    return states


def edited(before: Tensor, after: Tensor) -> list[list[int]]:
    """Return the positions of every row that are not equal bit for bit."""
    moved = (before != after).any(-1)
    return [row.nonzero().flatten().tolist() for row in moved]


def test_inside_the_subspace_the_edit_replaces_and_outside_it_nothing_moves() -> None:
    model, branch = adapted("f5+l5")
    before, after, rotation = hidden(llama(), ids(8)), hidden(model, ids(8)), branch.rotation()
    torch.testing.assert_close(after @ rotation.T, before @ branch.weight.T + branch.bias)
    outside = torch.eye(WIDTH, dtype=torch.float64) - rotation.T @ rotation
    torch.testing.assert_close(after @ outside, before @ outside)
    assert (after - before).norm() > 0.1 * before.norm()


def test_the_rows_of_the_rotation_stay_orthonormal_while_training() -> None:
    model, branch = adapted()
    before = branch.rotation().detach()
    for _ in range(3):
        model.zero_grad()
        model(ids()).logits.square().sum().backward()
        for parameter in trained(model).values():
            parameter.data -= 0.01 * parameter.grad
    torch.testing.assert_close(branch.rotation() @ branch.rotation().T, torch.eye(3, dtype=torch.float64))
    assert not torch.allclose(branch.rotation(), before)


def test_a_rotation_given_as_the_frame_is_returned_as_it_is() -> None:
    # What is saved is the frame; reading it back must not turn the subspace.
    _, branch = adapted()
    rotation = branch.rotation().detach()
    for turned in (rotation, -rotation):
        branch.frame.data = turned.T.clone()
        torch.testing.assert_close(branch.rotation(), turned)


@pytest.mark.parametrize(
    ("positions", "tokens", "expected"),
    [("f2+l1", 9, [0, 1, 8]), ("f0+l2", 9, [7, 8]), ("f1+l0", 9, [0]), ("f0+l0", 9, []),
     # Clipped to half of the prompt each; the middle of an odd one is in neither half.
     ("f7+l7", 6, [0, 1, 2, 3, 4, 5]), ("f7+l7", 5, [0, 1, 3, 4]), ("f0+l7", 6, [3, 4, 5])],
)  # fmt: skip
def test_only_the_first_and_last_positions_are_edited(
    positions: str, tokens: int, expected: list[int]
) -> None:
    model, _ = adapted(positions)
    assert edited(hidden(llama(), ids(tokens)), hidden(model, ids(tokens))) == [expected, expected]


def test_with_no_position_the_output_is_the_bases() -> None:
    model, _ = adapted("f0+l0")
    assert torch.equal(model(ids()).logits, llama()(ids()).logits)


def test_positions_are_counted_in_the_prompt_and_not_in_its_padding_or_its_answer() -> None:
    model, _ = adapted("f1+l1")
    mask, labels = torch.ones(2, 9, dtype=torch.long), torch.full((2, 9), -100)
    mask[0, :3] = 0
    labels[1, 6:] = 8
    before = hidden(llama(), ids(), attention_mask=mask)
    after = hidden(model, ids(), attention_mask=mask, labels=labels)
    assert edited(before, after) == [[3, 8], [0, 5]]


def test_a_rows_positions_do_not_depend_on_the_rows_beside_it() -> None:
    model, _ = adapted("f1+l1")
    mask, labels = torch.ones(2, 9, dtype=torch.long), ids()
    mask[0, 7:], labels[0, 7:] = 0, -100  # padding on the right, and no prompt of its own
    before = hidden(llama(), ids(), attention_mask=mask)
    assert edited(before, hidden(model, ids(), attention_mask=mask, labels=labels)) == [[0, 6], [0, 8]]
    labels[1, :4] = -100
    assert edited(before, hidden(model, ids(), attention_mask=mask, labels=labels)) == [[0, 6], [0, 3]]


def test_a_prompt_that_was_cached_without_the_edits_is_refused() -> None:
    model, _ = adapted()
    with rf.disabled(model):
        cache = model(ids()[:, :6], use_cache=True).past_key_values
    with pytest.raises(Incompatible, match="this key-value cache was not seen by 'default'; pass a cache"):
        model(ids()[:, 6:], past_key_values=cache)
    cache = model(ids()[:, :6], use_cache=True).past_key_values
    assert model(ids()[:, 6:], past_key_values=cache).logits.shape[1] == 3


def test_the_count_is_that_of_the_paper() -> None:
    assert count(adapted(rank=3)[0]) == 2 * 3 * WIDTH + 3


def test_it_starts_as_a_linear_layer_would_and_so_not_at_the_base() -> None:
    model = rf.adapt(llama(), "reft", rank=4, targets="model.layers.0")
    branch = model.model.layers[0].rankfold_default_branch
    for parameter in (branch.weight, branch.bias):
        assert 0 < parameter.abs().max() <= 1 / WIDTH**0.5
    assert not torch.allclose(model(ids()).logits, llama()(ids()).logits, atol=1e-4)


def test_every_block_is_edited_by_default() -> None:
    model = rf.adapt(llama(), "reft")
    assert [name for name, module in model.named_modules() if name.endswith("branch")] == [
        f"model.layers.{i}.rankfold_default_branch" for i in range(2)
    ]
    assert isinstance(model, nn.Module)


@pytest.mark.parametrize("positions", ["", "f7", "l7+f7", "f-1+l7", "7+7"])
def test_positions_of_another_form_are_refused(positions: str) -> None:
    with pytest.raises(InvalidOption, match="positions must read like 'f7\\+l7'"):
        rf.adapt(llama(), "reft", positions=positions)
