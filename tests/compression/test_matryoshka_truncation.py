"""Embeddings cut to their leading dimensions keep the most of their cosines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compression._calibrated import normal
from torch import nn

import rankfold as rf
from rankfold.compression.papers.matryoshka_truncation import cosines_kept, truncate_embeddings
from rankfold.errors import Incompatible, InvalidOption
from rankfold.statistics.finite import NotFinite


def embeddings(count: int = 80, width: int = 16) -> torch.Tensor:
    """Return embeddings with a spectrum, far from the origin, of different lengths."""
    sizes = torch.logspace(0, -1.5, width, dtype=torch.float64)
    mixed = normal(count, width, seed=1) * sizes @ normal(width, width, seed=2)
    return (mixed + normal(width, seed=3)) * (1 + normal(count, 1, seed=4).abs())


def test_all_dimensions_keep_everything() -> None:
    z = embeddings()
    cut = truncate_embeddings(z, keep=1)
    assert cut.to_dict() == pytest.approx({"kept": 1, "length": 1, "correlation": 1, "change": 0}, abs=1e-9)
    torch.testing.assert_close(cut.projection(z).norm(dim=1), z.norm(dim=1))


def test_what_is_kept_of_the_length_is_the_sum_of_the_leading_eigenvalues() -> None:
    z = embeddings()
    unit = F.normalize(z, dim=1)
    values = torch.linalg.eigvalsh(unit.T @ unit / len(z)).flip(0)
    for width in (1, 5, 12):
        cut = truncate_embeddings(z, width=width)
        assert cut.length == pytest.approx(float(values[:width].sum()))
        gram = cut.projection.weight @ cut.projection.weight.T
        torch.testing.assert_close(gram, torch.eye(width, dtype=torch.float64))


def test_no_other_projection_of_that_width_keeps_the_inner_products_better() -> None:
    z = F.normalize(embeddings(), dim=1)
    cut = truncate_embeddings(z, width=4).projection(z).detach()
    singular = torch.linalg.svdvals(z @ z.T)
    assert float((z @ z.T - cut @ cut.T).norm()) == pytest.approx(float(singular[4:].norm()))


def test_rotated_dimensions_keep_more_than_the_first_ones_and_a_prefix_is_a_shorter_cut() -> None:
    z = embeddings()
    rotated, plain = (truncate_embeddings(z, rotate=rotate) for rotate in (True, False))
    assert rotated.length > plain.length
    assert rotated.change < plain.change
    assert torch.equal(plain.projection(z), z[:, :8])
    shorter = truncate_embeddings(z, width=3)
    torch.testing.assert_close(shorter.projection.weight, rotated.projection.weight[:3])


def test_cosines_are_compared_pair_by_pair() -> None:
    before, after = normal(6, 5), normal(6, 3, seed=1)
    first, second = (F.cosine_similarity(z[:, None], z[None], dim=-1) for z in (before, after))
    upper = torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    both = torch.stack([first[upper], second[upper]])
    correlation, change = cosines_kept(before, after)
    assert correlation == pytest.approx(float(torch.corrcoef(both)[0, 1]))
    assert change == pytest.approx(float((both[0] - both[1]).abs().mean()))


def test_the_projection_has_the_precision_of_the_embeddings_and_trains() -> None:
    cut = truncate_embeddings(embeddings().float())
    assert cut.projection.weight.dtype == torch.float32
    assert isinstance(cut.projection, nn.Linear)
    assert cut.projection.weight.requires_grad


@pytest.mark.parametrize(
    "options", [{"keep": 0.0}, {"keep": 1.5}, {"width": 0}, {"width": 17}], ids=lambda given: str(given)
)
def test_what_is_out_of_range_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOption, match="matryoshka-truncation"):
        truncate_embeddings(embeddings(), **options)


def test_what_is_no_set_of_embeddings_is_refused() -> None:
    with pytest.raises(InvalidOption, match="n at least 2"):
        truncate_embeddings(torch.zeros(1, 4))
    with pytest.raises(NotFinite, match="embeddings"):
        truncate_embeddings(torch.full((3, 4), torch.nan))


def test_it_is_called_by_its_own_name() -> None:
    with pytest.raises(Incompatible, match="truncate_embeddings"):
        rf.compress(nn.Linear(3, 3), "matryoshka-truncation", progress=False)
    assert rf.find_method("matryoshka-truncation").options == {"keep": 0.5, "width": None, "rotate": True}
