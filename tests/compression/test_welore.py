import copy

import pytest
import torch
from torch import nn

import rankfold as rf
from rankfold.compression.papers.welore import threshold
from rankfold.compression.shares import Unit
from rankfold.errors import InvalidOption


def _unit(path: str, shape: tuple[int, int], decay: float, scale: float = 1.0) -> Unit:
    return Unit(path, shape, scale * torch.exp(-decay * torch.arange(min(shape), dtype=torch.float64)))


UNITS = [_unit("steep", (40, 40), 0.4), _unit("flat", (40, 60), 0.02), _unit("middle", (30, 40), 0.1)]
DENSE = sum(unit.dense for unit in UNITS)


def _numbers(units: list[Unit], ranks: dict[str, int | None]) -> int:
    return sum(u.dense if (r := ranks[u.path]) is None else r * u.per_rank for u in units)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_one_threshold_on_normalised_spectra_gives_all_ranks(keep: float) -> None:
    ranks = threshold(UNITS, int(keep * DENSE), min_ratio=0.0)
    assert _numbers(UNITS, ranks) <= keep * DENSE
    normal = {u.path: (u.singular() - u.singular()[-1]) / (u.singular()[0] - u.singular()[-1]) for u in UNITS}
    below = [normal[p][r].item() for p, r in ranks.items() if r is not None and r < len(normal[p])]
    above = [normal[p][r - 1].item() for p, r in ranks.items() if r is not None]
    assert max(below) < min(above)
    assert len(set(ranks.values())) > 1


def test_ranks_do_not_depend_on_the_scale_of_a_weight() -> None:
    scaled = [_unit("steep", (40, 40), 0.4, 100.0), *UNITS[1:]]
    assert threshold(scaled, DENSE // 2) == threshold(UNITS, DENSE // 2)


def test_a_weight_that_loses_less_than_half_its_ranks_stays_as_it_is() -> None:
    ranks = threshold(UNITS, int(0.7 * DENSE))
    assert ranks["flat"] is None or ranks["flat"] < 20
    assert all(r is None or 1 - r / min(u.shape) > 0.5 for u, r in zip(UNITS, ranks.values(), strict=True))


def test_of_ranks_keeps_that_share_of_all_ranks() -> None:
    units = [_unit("steep", (40, 40), 0.4), _unit("middle", (30, 40), 0.2)]
    ranks = threshold(units, int(0.3 * sum(u.dense for u in units)), min_ratio=0.0, of="ranks")
    assert sum(rank for rank in ranks.values() if rank is not None) == round(0.3 * 70)


def test_only_the_factors_train_and_the_rest_is_bit_for_bit_what_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32))
    model[0].weight.data = torch.randn(32, 2) @ torch.randn(2, 32)
    before = copy.deepcopy(model)
    rf.compress(model, "welore", keep=0.7, progress=False)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("0.adapters") for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 32)).square().mean().backward()
    optimizer.step()
    assert torch.equal(model[2].weight, before[2].weight)
    assert torch.equal(model[1].weight, before[1].weight)


def test_what_only_the_factors_train_survives_saving(tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    fresh = copy.deepcopy(model)
    rf.compress(model, "welore", keep=0.5, progress=False)
    rf.save(model, tmp_path / "small")
    rf.load(fresh, tmp_path / "small")
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in fresh.named_parameters()} == flags
    assert not all(flags.values())


def test_impossible_options_are_refused_in_a_sentence() -> None:
    with pytest.raises(InvalidOption, match="min_ratio must be in"):
        threshold(UNITS, DENSE, min_ratio=1.0)
