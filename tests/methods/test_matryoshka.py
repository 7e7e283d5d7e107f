"""Matryoshka: every prefix of an embedding is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from methods._layers import normal
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, InvalidOption
from rankfold.methods.nested import nested_sizes, prefix

WIDTH, CLASSES, NESTING = 12, 5, (2, 5, 12)
TARGET = torch.tensor([0, 3, 1, 4, 4, 2, 0])


def embedding(seed: int = 1) -> Tensor:
    return normal(7, WIDTH, seed=seed).requires_grad_()


def head(**options: Any) -> rf.MatryoshkaHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return rf.MatryoshkaHead(WIDTH, CLASSES, **{"nesting": NESTING, **options}).double()


def test_the_loss_is_the_sum_of_the_prefixes_own() -> None:
    z, mrl, weights = embedding(), head(), (1.0, 0.5, 2.0)
    wanted = sum(
        c * F.cross_entropy(z[:, :m] @ linear.weight.T + linear.bias, TARGET)  # type: ignore[operator,union-attr]
        for c, m, linear in zip(weights, NESTING, mrl.heads, strict=True)
    )
    torch.testing.assert_close(rf.matryoshka_loss(mrl(z), TARGET, weights=weights), wanted)
    assert [tuple(each.weight.shape) for each in mrl.heads] == [(5, 2), (5, 5), (5, 12)]


def test_efficient_logits_are_the_full_ones_of_an_embedding_that_is_zero_beyond_the_prefix() -> None:
    z, mrl = embedding(), head(efficient=True)
    assert sum(p.numel() for p in mrl.parameters()) == CLASSES * WIDTH + CLASSES
    for m, logits in zip(NESTING, mrl(z), strict=True):
        cut = z.clone()
        cut[:, m:] = 0
        torch.testing.assert_close(logits, mrl(cut)[-1])


@pytest.mark.parametrize("efficient", [False, True])
def test_with_one_prefix_as_long_as_the_embedding_it_is_plain_cross_entropy(efficient: bool) -> None:
    z, mrl = embedding(), head(nesting=[WIDTH], efficient=efficient)
    plain = nn.Linear(WIDTH, CLASSES).double()
    plain.load_state_dict(mrl.heads[0].state_dict())
    torch.testing.assert_close(rf.matryoshka_loss(mrl(z), TARGET), F.cross_entropy(plain(z), TARGET))


@pytest.mark.parametrize("efficient", [False, True])
def test_a_coordinate_learns_from_the_prefixes_that_hold_it_and_no_others(efficient: bool) -> None:
    z, mrl = embedding(), head(efficient=efficient)
    (whole,) = torch.autograd.grad(rf.matryoshka_loss(mrl(z), TARGET), z)
    for start, end in ((0, 2), (2, 5), (5, 12)):
        parts = [F.cross_entropy(y, TARGET) for m, y in zip(NESTING, mrl(z), strict=True) if m > start]
        (own,) = torch.autograd.grad(torch.stack(parts).sum(), z)
        torch.testing.assert_close(whole[:, start:end], own[:, start:end])
    (longest,) = torch.autograd.grad(F.cross_entropy(mrl(z)[-1], TARGET), z)
    torch.testing.assert_close(whole[:, 5:], longest[:, 5:])


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("point", ["lora", "low-rank"])
def test_heads_may_be_adapted(point: str, efficient: bool) -> None:
    model, z = nn.Sequential(head(efficient=efficient)), embedding()
    start = rf.matryoshka_loss(model(z), TARGET)
    rf.adapt(model, point, rank=2)
    optimizer = torch.optim.Adam(rf.param_groups(model, lr=0.05))
    for _ in range(5):
        optimizer.zero_grad()
        rf.matryoshka_loss(model(z), TARGET).backward()
        optimizer.step()
    adapted = model(z)
    assert rf.matryoshka_loss(adapted, TARGET) < start
    for found, wanted in zip(rf.fold(model)(z), adapted, strict=True):
        torch.testing.assert_close(found, wanted)


def test_an_embedding_of_another_width_is_refused() -> None:
    for width in (11, 13):
        with pytest.raises(InvalidOption, match=f"the embedding must be 12 wide, not {width}"):
            head()(normal(7, width))


def contrastive(questions: Tensor, answers: Tensor) -> Tensor:
    return F.cross_entropy(questions @ answers.T / 0.1, torch.arange(len(questions)))


def test_a_loss_of_embeddings_is_summed_over_prefixes_of_length_one() -> None:
    first, second = embedding(1), embedding(2)
    found = rf.nested_loss(first, second, loss=contrastive, nesting=NESTING, weights=(1.0, 2.0, 0.0))
    wanted = torch.zeros((), dtype=torch.float64)
    for c, m in ((1.0, 2), (2.0, 5)):
        a, b = (each[:, :m] / each[:, :m].norm(dim=1, keepdim=True) for each in (first, second))
        wanted = wanted + c * contrastive(a, b)
    torch.testing.assert_close(found, wanted)
    plain = rf.nested_loss(first, loss=lambda z: z.square().sum(), nesting=[WIDTH], normalise=False)
    torch.testing.assert_close(plain, first.square().sum())


def test_the_usual_nesting_halves_the_width() -> None:
    assert nested_sizes(2048) == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert nested_sizes(6) == (6,)
    assert rf.MatryoshkaHead(64, 2).nesting == (8, 16, 32, 64)


@pytest.mark.parametrize("nesting", [(), (2, 5), (5, 2, 12), (2, 2, 12), (0, 12), (2, 12, 13)], ids=str)
def test_lengths_that_do_not_ascend_to_the_width_are_refused(nesting: Sequence[int]) -> None:
    with pytest.raises(InvalidOption, match="nesting must ascend to the width 12"):
        head(nesting=nesting)
    with pytest.raises(InvalidOption, match="nesting must ascend to the width 12"):
        rf.nested_loss(embedding(), loss=torch.sum, nesting=nesting)


def test_weights_that_are_not_as_many_as_prefixes_are_refused() -> None:
    with pytest.raises(InvalidOption, match="3 prefixes need as many weights, not 2"):
        rf.matryoshka_loss(head()(embedding()), TARGET, weights=(1, 2))
    with pytest.raises(InvalidOption, match="at least one prefix"):
        rf.matryoshka_loss([], TARGET)


def test_it_is_a_function_and_no_part_of_a_point() -> None:
    with pytest.raises(Incompatible, match=r"matryoshka is no part of a point; call rankfold\.methods"):
        rf.adapt(nn.Sequential(nn.Linear(4, 4)), "matryoshka")


def test_short_prefixes_of_digits_are_better_embeddings_than_those_of_a_plain_training() -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, digits = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)

    def accuracies(nesting: Sequence[int]) -> list[float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
            heads = rf.MatryoshkaHead(16, 10, nesting=nesting)
        model = nn.Sequential(encoder, heads)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            rf.matryoshka_loss(model(pixels[:600]), digits[:600]).backward()
            optimizer.step()
        with torch.no_grad():
            return [_of_neighbours(encoder(pixels), digits, m) for m in (2, 4, 16)]

    nested, plain = accuracies((2, 4, 16)), accuracies((16,))
    assert nested == sorted(nested)
    assert nested[0] > plain[0] + 0.05
    assert nested[1] > plain[1]
    assert nested[2] > plain[2] - 0.05


def _of_neighbours(embeddings: Tensor, digits: Tensor, length: int) -> float:
    """Return how often the nearest of the first 600 has the same digit."""
    cut = prefix(embeddings, length)
    nearest = (cut[600:] @ cut[:600].T).argmax(1)
    return float((digits[:600][nearest] == digits[600:]).float().mean())
