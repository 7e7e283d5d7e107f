"""Selections: packed entries at a stored support meet the input in one product and keep an input only."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from rankfold.errors import FormatError
from rankfold.weights import (
    Dense,
    Rectangle,
    Scattered,
    Selection,
    ThinRectangle,
    adopt_selections,
    frozen,
    trained,
)

OUT, IN, TOKENS = 8, 6, 5
KEPT = torch.tensor([1, 40])  # positions that neither support below has
ROWS, COLUMNS = torch.tensor([2, 3, 7]), torch.tensor([0, 5])


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def index(positions: Tensor, name: str) -> Dense:
    return Dense(positions, name, trainable=False)


def kept() -> tuple[Dense, Dense]:
    return frozen(draw(2, seed=9), "kept"), index(KEPT, "kept.index")


def scattered() -> Selection:
    places = index(torch.tensor([0, 7, 13, 30, 47], dtype=torch.int32), "index")
    return Scattered(trained(draw(5), "values"), [places], *kept(), (OUT, IN))


def rectangle(kind: type[Rectangle] = Rectangle) -> Selection:
    support = [index(ROWS, "rows"), index(COLUMNS, "columns")]
    return kind(trained(draw(3, 2), "values"), support, *kept(), (OUT, IN))


def thin() -> Selection:
    return rectangle(ThinRectangle)


KINDS = pytest.mark.parametrize("make", [scattered, rectangle, thin])


@KINDS
def test_the_matrix_has_the_values_at_the_support_and_what_is_kept_elsewhere(
    make: Callable[[], Selection],
) -> None:
    selection = make()
    flat = selection.dense().flatten()
    assert torch.equal(flat[selection.positions()], selection.values.value.flatten())
    assert torch.equal(flat[KEPT], selection.kept.value)
    assert int((flat != 0).sum()) == selection.values.value.numel() + 2


@KINDS
@pytest.mark.parametrize("on_base", [True, False])
def test_first_and_second_derivatives_are_those_of_finite_differences(
    make: Callable[[], Selection], on_base: bool
) -> None:
    selection = make()
    weight = draw(OUT, IN, seed=1) if on_base else None
    x, bias = draw(TOKENS, IN, seed=2).requires_grad_(), draw(OUT, seed=3).requires_grad_()

    def applied(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        selection.values.substitute = values
        try:
            return selection.added(x, weight, bias)
        finally:
            selection.values.substitute = None

    given = (x, bias, selection.values.value.detach().clone().requires_grad_())
    assert gradcheck(applied, given)
    assert gradgradcheck(applied, given)


def kept_numbers(selection: Selection) -> int:
    """Numbers kept for backward whose memory is neither the weight's nor a leaf's; the input counts."""
    weight = draw(OUT, IN, seed=1)
    known = {
        t.untyped_storage().data_ptr() for t in (weight, *(leaf.tensor() for leaf in selection.leaves()))
    }
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            found[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = selection.added(draw(TOKENS, IN, seed=2).requires_grad_(), weight, None)
    del y
    return sum(found.values())


def test_only_the_input_is_kept_for_backward_and_of_a_thin_rectangle_only_its_columns() -> None:
    assert kept_numbers(scattered()) == kept_numbers(rectangle()) == TOKENS * IN
    assert kept_numbers(thin()) == TOKENS * len(COLUMNS)


def test_nothing_is_kept_where_nothing_trains() -> None:
    selection = rectangle()
    selection.values.value.requires_grad_(False)
    assert kept_numbers(selection) == 0


def test_a_thin_rectangle_multiplies_its_rows_and_columns_only() -> None:
    counted = []
    for selection in (rectangle(), thin()):
        y = selection.added(draw(TOKENS, IN, seed=2), draw(OUT, IN, seed=1), None)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counted.append(int(counter.get_total_flops()) // 2)
    assert counted == [TOKENS * OUT * IN, TOKENS * len(ROWS) * len(COLUMNS)]


def test_a_small_change_is_not_rounded_away_in_half_precision() -> None:
    selection = Scattered(
        trained(torch.full((OUT * IN,), 2.0**-12), "values"),
        [index(torch.arange(OUT * IN), "index")],
        frozen(torch.zeros(0), "kept"),
        index(torch.zeros(0, dtype=torch.long), "kept.index"),
        (OUT, IN),
    )
    x = torch.zeros(2, IN, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([1.0, -1.0], dtype=torch.bfloat16).repeat(OUT, IN // 2)  # rows that sum to zero
    y = selection.added(x + 1, weight, None)
    assert torch.equal(y, torch.full_like(y, IN * 2.0**-12))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@KINDS
def test_selecting_anew_leaves_the_matrix_bit_for_bit(make: Callable[[], Selection]) -> None:
    selection = make()
    before = selection.dense().detach()
    parameter = selection.values.value
    held = (selection.added(draw(TOKENS, IN), None, None)).sum()  # a graph of the old support
    if isinstance(selection, Rectangle):
        selection.select(torch.tensor([0, 3]), torch.tensor([1, 5]))
    else:
        selection.select(torch.tensor([1, 13, 20]))  # one that was kept, one that stays, one that is new
    assert selection.values.value is parameter
    assert torch.equal(selection.dense(), before)
    positions = selection.positions()
    assert torch.equal(parameter.flatten(), before.flatten()[positions])
    assert not set(positions.tolist()) & set(selection.kept_index.value.tolist())
    assert selection.kept.value.all()
    selection.added(draw(TOKENS, IN), None, None).sum().backward()
    assert parameter.grad is not None
    assert parameter.grad.shape == parameter.shape
    assert held.isfinite()


def stored(selection: Selection, **others: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a file that holds the selection, with some replaced."""
    return {leaf.name: others.get(leaf.name.replace(".", "_"), leaf.tensor()) for leaf in selection.leaves()}


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (scattered, {"index": torch.tensor([0, 1, 2, 3, OUT * IN])}),
        (scattered, {"kept_index": torch.tensor([-1, 0])}),
        (rectangle, {"columns": torch.tensor([0, IN])}),
        (rectangle, {"rows": torch.tensor([0, 1, OUT])}),
    ],
)
def test_a_file_with_positions_outside_of_the_weight_is_refused(
    make: Callable[[], Selection], wrong: dict[str, Tensor]
) -> None:
    selection = make()
    with pytest.raises(FormatError, match="positions lie outside of a weight 8x6"):
        adopt_selections(selection, stored(selection, **wrong))


def test_a_file_whose_sizes_do_not_belong_together_is_refused_and_nothing_is_changed() -> None:
    selection = scattered()
    with pytest.raises(FormatError, match="their positions differ"):
        adopt_selections(selection, stored(selection, values=torch.zeros(4)))
    adopt_selections(selection, {"values": torch.zeros(4)})  # a file without the others is refused elsewhere
    assert selection.values.shape == (5,)


def test_the_sizes_of_a_file_are_taken() -> None:
    selection = scattered()
    nothing = torch.zeros(0)
    file = stored(
        selection, values=torch.zeros(3), index=torch.arange(3), kept=nothing, kept_index=nothing.long()
    )
    adopt_selections(selection, file)
    assert selection.values.shape == selection.support[0].shape == (3,)
    assert selection.kept.shape == selection.kept_index.shape == (0,)
