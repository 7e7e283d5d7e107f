import copy
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold as rf
from rankfold.compression.papers.lq_lora import GRIDS, best_formats
from rankfold.errors import Incompatible, InvalidOption
from rankfold.linalg import NormalFloat, dequantise, quantise
from rankfold.weights import Quantised

FORMS = [NormalFloat(b, size, 8, 16) for b in (2, 3, 4) for size in (16, 64)]
COARSE = GRIDS["coarse"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model() -> nn.Sequential:
    """Return two layers, the weights with a low-rank part that stands out."""
    layers = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    for seed, layer in enumerate((layers[0], layers[2])):
        out, columns = layer.weight.shape
        low = normal(out, 4, seed=seed) @ normal(4, columns, seed=seed + 2)
        layer.weight.data = (low + normal(out, columns, seed=seed + 4)) / columns**0.5
        layer.bias.data = normal(out, seed=seed + 6)
    return layers


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().sum()


def done(given: nn.Module | None = None, **options: Any) -> nn.Module:
    options = {"rank": 4, "progress": False, **options}
    return rf.compress(given or model(), "lq-lora", **options)


def form_of(layer: nn.Module) -> NormalFloat:
    return layer.expression.terms[0].form


def error(compressed: nn.Module, weighed: Tensor | float = 1.0) -> float:
    rest = compressed[0].expression.dense().detach() - model()[0].weight.detach()
    return float((rest * weighed).norm())


# The choice of formats --------------------------------------------------------------------------------


def errors(sizes: list[int], seed: int = 0) -> list[list[float]]:
    noise = normal(len(sizes), len(FORMS), seed=seed).exp()
    return [
        [float(noise[i, j]) * size**0.5 * 2.0**-form.bits for j, form in enumerate(FORMS)]
        for i, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [2.8, 3.3, 4.1])
def test_the_formats_are_the_best_that_fit(bits: float, seed: int) -> None:
    sizes = [64 * 64, 64 * 128, 100 * 7]
    table = errors(sizes, seed)
    picked = best_formats(sizes, FORMS, table, bits)

    def total(picks: tuple[NormalFloat, ...]) -> float:
        return sum(row[FORMS.index(form)] ** 2 for row, form in zip(table, picks, strict=True))

    def fits(picks: tuple[NormalFloat, ...]) -> bool:
        return sum(8 * f.bytes(n) for f, n in zip(picks, sizes, strict=True)) <= bits * sum(sizes)

    best = min(total(picks) for picks in product(FORMS, repeat=3) if fits(picks))
    assert fits(tuple(picked))
    assert total(tuple(picked)) == pytest.approx(best, rel=1e-6)


def test_large_weights_in_the_grid_of_the_paper_fit_the_budget() -> None:
    sizes, forms = [4096 * 4096, 4096 * 11008, 4096 * 4096], GRIDS["paper"]
    assert len(forms) == len(set(forms)) == 432
    table = [[2.0**-f.bits_per_number * n**0.5 * (1 + i) for f in forms] for i, n in enumerate(sizes)]
    picked = best_formats(sizes, forms, table, 2.75)
    used = sum(8 * f.bytes(n) for f, n in zip(picked, sizes, strict=True)) / sum(sizes)
    assert 2.74 < used <= 2.75


def test_a_budget_for_all_takes_the_best_and_one_for_none_is_refused() -> None:
    sizes = [64 * 64, 64 * 128]
    table = errors(sizes)
    best = [FORMS[row.index(min(row))] for row in table]
    assert best_formats(sizes, FORMS, table, 16.0) == best
    with pytest.raises(InvalidOption, match=r"bits=1\.5 is below"):
        best_formats(sizes, FORMS, table, 1.5)


# The model --------------------------------------------------------------------------------------------


def test_the_formats_that_are_chosen_stay_within_the_bits() -> None:
    reports: list[Any] = []
    for bits in (2.5, 3.0, 4.2):
        small = done(bits=bits, report=reports.append)
        held = [layer.expression.terms[0].count().bytes for layer in (small[0], small[2])]
        assert reports[-1].facts["bits"] <= bits
        assert 8 * sum(held) == pytest.approx(reports[-1].facts["bits"] * (64 * 48 + 48 * 32))
    rows = [report.rows[0] for report in reports]
    assert rows[0].error > rows[1].error > rows[2].error
    assert "bits a number of 4.2 asked for" in str(reports[-1])
    assert reports[-1].kept == sum(row.kept for row in reports[-1].rows) / (64 * 48 + 48 * 32)


def test_a_budget_above_all_takes_the_least_error_everywhere() -> None:
    small = done(bits=12.0, search_iterations=3)
    assert form_of(small[0]).bits == form_of(small[2]).bits == 8
    assert error(small) < 0.01 * float(model()[0].weight.detach().norm())


def coarse_model(form: str) -> nn.Module:
    """Return the model with its weights rounded."""
    small, kind = model(), NormalFloat.of(form)
    for layer in (small[0], small[2]):
        layer.weight.data = dequantise(quantise(layer.weight.data, kind), kind, tuple(layer.weight.shape))
    return small


def test_the_weight_is_nearer_than_its_quantised_self_and_so_is_the_output() -> None:
    whole, form = model(), "nf3-64-8-256-fp32"
    small, coarse, x = done(formats=form, alpha=2.0), coarse_model(form), normal(100, 64, seed=9)
    with torch.no_grad():
        wanted, ours, theirs = whole(x), small(x), coarse(x)
        lost = float((coarse[0].weight - whole[0].weight).norm())
    assert 0 < float((ours - wanted).norm()) < 0.8 * float((theirs - wanted).norm())
    assert error(small) < 0.8 * lost


def test_after_the_same_training_it_is_ahead_of_a_product_that_starts_at_zero() -> None:
    form, target = "nf3-64-8-256-fp32", model()
    torch.manual_seed(0)
    zero = rf.adapt(coarse_model(form), "lora", rank=4, alpha=16.0, targets="all-linear")
    losses = []
    for small in (done(formats=form), zero):
        optimizer = torch.optim.Adam([p for p in small.parameters() if p.requires_grad], lr=1e-3)
        for step in range(30):
            x = normal(64, 64, seed=100 + step)
            optimizer.zero_grad()
            loss = (small(x) - target(x).detach()).square().mean()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.8 * losses[1]


def test_the_scaling_of_alpha_is_taken_off_the_factors() -> None:
    one, other = done(formats="nf4-16-fp32", alpha=4.0), done(formats="nf4-16-fp32", alpha=64.0)
    assert torch.allclose(one[0].expression.dense(), other[0].expression.dense(), atol=1e-6)
    up = [m[0].expression.leaf("up").tensor().norm().item() for m in (one, other)]
    assert up[0] == pytest.approx(4 * up[1], rel=1e-5)


def test_only_the_factors_train_and_they_learn() -> None:
    small, x, y = done(bits=3.0), normal(64, 64, seed=9), normal(64, 32, seed=10)
    names = {name.rsplit(".", 2)[-2] for name, p in small.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in small.parameters() if p.requires_grad) == 4 * (64 + 48 + 48 + 32)
    assert "bias" not in names
    before = small[0].expression.terms[0].dense()
    optimizer = torch.optim.Adam([p for p in small.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append((small(x) - y).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(small[0].expression.terms[0].dense(), before)


def test_it_is_saved_and_loaded_with_a_format_for_every_weight(tmp_path: Path) -> None:
    formats = {"0": "nf2-16-4-16-bf16", "2": "nf3-32-fp16"}
    small, x = done(formats=formats), normal(7, 64)
    assert [str(form_of(layer)) for layer in (small[0], small[2])] == list(formats.values())
    rf.save(small, tmp_path / "small")
    again = rf.load(model(), tmp_path / "small")
    assert torch.equal(again(x), small(x))
    assert rf.count(again) == rf.count(small)
    folded = rf.fold(copy.deepcopy(small))
    assert torch.allclose(folded(x), small(x), atol=1e-5)


def test_factors_have_the_precision_of_the_weight_and_codes_are_bytes() -> None:
    small = done(model().bfloat16(), formats="nf4-64-8-256-fp32")
    expression = small[0].expression
    assert expression.leaf("up").tensor().dtype == torch.bfloat16
    assert expression.leaf("codes").tensor().dtype == torch.uint8
    assert small(normal(3, 64).bfloat16()).dtype == torch.bfloat16


def test_the_paper_s_order_is_better_than_loftq_s_where_a_low_rank_part_stands_out() -> None:
    for form in ("nf2-64-fp32", "nf4-64-fp32"):
        lq, loftq = (error(done(formats=form, order=order)) for order in ("lq", "loftq"))
        assert lq < loftq


def test_fisher_information_lowers_the_error_that_it_weighs() -> None:
    spread = torch.logspace(0, -2, 64)
    data = [normal(32, 64, seed=i) * spread for i in range(8)]
    seen = rf.collect(model(), [b[i : i + 1] for b in data for i in range(32)], "squared_gradient",
                      targets="0", loss=squares, progress=False)  # fmt: skip
    root = seen["0"].get("squared_gradient").sqrt()
    options: dict[str, Any] = {"formats": "nf2-64-fp32", "targets": "0"}
    reports: list[Any] = []
    weighed = done(fisher=True, data=data, loss=squares, report=reports.append, **options)
    assert error(weighed, root) < 0.9 * error(done(**options), root)
    scale = float((model()[0].weight.detach() * root).norm())
    assert reports[0].rows[0].error == pytest.approx(error(weighed, root) / scale, rel=1e-4)


def test_weights_that_the_loss_reacts_to_get_the_bits() -> None:
    class Gained(nn.Module):
        """Two maps of which the outputs count differently."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 32, bias=False), nn.Linear(64, 32, bias=False)
            for layer in (self.first, self.second):
                layer.weight.data = normal(32, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + 0.01 * self.second(x)

    small = done(Gained(), fisher=True, data=[normal(16, 64, seed=3)], loss=squares, bits=3.2)
    assert form_of(small.first).bits_per_number > form_of(small.second).bits_per_number


def test_the_same_seed_finds_the_same() -> None:
    first, second = done(bits=3.0), done(bits=3.0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_an_exact_decomposition_is_no_worse() -> None:
    options: dict[str, Any] = {"formats": "nf3-64-fp32", "iterations": 1}
    assert error(done(randomised=False, **options)) <= error(done(**options)) * 1.001


def test_eora_gives_back_what_was_lost(tmp_path: Path) -> None:
    whole, small, x = model(), done(formats="nf2-64-8-256-fp32"), normal(200, 64, seed=9)
    with torch.no_grad():
        before = float((small(x) - whole(x)).norm())
    rf.compress(small, "eora", original=whole, data=[x], rank=8, progress=False)
    with torch.no_grad():
        assert float((small(x) - whole(x)).norm()) < 0.9 * before
    assert isinstance(small[0].expression.terms[0], Quantised)
    rf.save(small, tmp_path / "small")
    assert torch.equal(rf.load(model(), tmp_path / "small")(x), small(x))


def test_what_it_does_not_read_and_what_cannot_be_is_refused() -> None:
    for wrong, sentence in (
        ({"keep": 0.5}, "keeps no share"),
        ({"solver": "exact"}, "leave solver= away"),
        ({"bits": 1.0}, "the fewest that its formats take"),
        ({"formats": {"0": "nf4-64-fp32"}}, "2: formats says nothing"),
        ({"formats": "int4"}, "is written like"),
        ({"order": "qlora"}, "order must be one of"),
        ({"grid": "fine"}, "grid must be one of"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"fisher": True}, "pass data="),
    ):
        given = model()
        with pytest.raises(InvalidOption, match=sentence):
            done(given, **wrong)
        assert isinstance(given[0], nn.Linear)
    with pytest.raises(Incompatible, match="fold"):
        done(done())
