import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rankfold.errors import InvalidOption
from rankfold.linalg import NormalFloat, codebook, dequantise, quantise
from rankfold.linalg.normal_float import pack, unpack

BITS = (2, 3, 4, 8)
PAPER = {
    4: (-1, -0.6961929, -0.525073, -0.3949175, -0.2844414, -0.1847734, -0.09105, 0, 0.0795803, 0.1609302,
        0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229567, 1),
    3: (-1, -0.4786292, -0.2171418, 0, 0.1609302, 0.3379152, 0.562617, 1),
    2: (-1, 0, 0.3379152, 1),
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rounded(matrix: Tensor, form: NormalFloat) -> Tensor:
    return dequantise(quantise(matrix, form), form, tuple(matrix.shape), matrix.dtype)


def plain(bits: int, block: int = 16) -> NormalFloat:
    return NormalFloat(bits, block, None)


@pytest.mark.parametrize("bits", PAPER)
def test_the_levels_are_those_of_the_papers(bits: int) -> None:
    assert codebook(bits) == pytest.approx(PAPER[bits], abs=2e-7)


@pytest.mark.parametrize("bits", BITS)
def test_the_levels_rise_from_minus_one_to_one_with_one_more_above_zero_than_below(bits: int) -> None:
    levels = codebook(bits)
    assert len(levels) == 2**bits
    assert all(a < b for a, b in pairwise(levels))
    assert (levels[0], levels[-1]) == (-1, 1)
    assert sum(v < 0 for v in levels) == sum(v > 0 for v in levels) - 1 == levels.index(0)


@pytest.mark.parametrize("bits", BITS)
def test_zero_and_the_largest_number_of_a_block_are_exact_without_a_second_quantisation(bits: int) -> None:
    matrix = normal(6, 16)
    matrix[:, 3] = 0
    found, largest = rounded(matrix, plain(bits)), matrix.abs().argmax(1)
    assert (found[:, 3] == 0).all()
    float32 = matrix.float().double()  # the scales are kept in float32
    assert torch.equal(found.gather(1, largest[:, None]), float32.gather(1, largest[:, None]))


@pytest.mark.parametrize("bits", BITS)
def test_no_number_is_further_away_than_half_the_widest_gap(bits: int) -> None:
    matrix, levels = normal(50, 16), codebook(bits)
    gap = max(b - a for a, b in pairwise(levels)) / 2
    bound = matrix.abs().amax(1, keepdim=True) * gap
    assert ((rounded(matrix, plain(bits)) - matrix).abs() <= bound * (1 + 1e-6)).all()
    assert bits != 4 or gap == pytest.approx(0.152, abs=1e-3)


@given(st.sampled_from(BITS), st.integers(1, 70), st.integers(0, 99))
def test_rounding_twice_is_rounding_once(bits: int, numbers: int, seed: int) -> None:
    once = rounded(normal(numbers, seed=seed).float(), plain(bits))
    assert torch.equal(rounded(once, plain(bits)), once)


def test_the_levels_are_not_symmetric() -> None:
    matrix = normal(8, 16)
    assert not torch.allclose(rounded(-matrix, plain(3)), -rounded(matrix, plain(3)))


@pytest.mark.parametrize("form", [NormalFloat(4, 8, 3, 4, "fp32"), NormalFloat(3, 8, 8, 16, "bf16")])
def test_the_scales_are_read_as_the_equation_says(form: NormalFloat) -> None:
    matrix = normal(9, 24)
    tensors = quantise(matrix, form)
    scales = matrix.view(-1, 8).abs().amax(1)
    offset, steps = scales.min(), 2**form.scale_bits - 1  # type: ignore[operator]
    expected = []
    for group in scales.split(form.scale_block):
        most = (group - offset).max().to(torch.bfloat16 if form.scale_dtype == "bf16" else torch.float32)
        shares = ((group - offset) / most.double() * steps).round().clamp(0, steps) / steps
        expected.append(offset + shares * most.double())
    levels = torch.tensor(codebook(form.bits), dtype=torch.float64)
    read = torch.cat(expected)[:, None]
    nearest = (matrix.view(-1, 8) / read)[..., None].sub(levels).abs().argmin(-1)
    found = dequantise(tensors, form, (9, 24), torch.float64).view(-1, 8)
    assert torch.allclose(found, levels[nearest] * read, atol=1e-6)


def test_a_second_quantisation_of_eight_bits_costs_little() -> None:
    matrix = normal(64, 64)
    form = NormalFloat(4, 64, 8, 256)
    once, twice = (
        float((rounded(matrix, f) - matrix).norm()) for f in (replace(form, scale_bits=None), form)
    )
    assert twice == pytest.approx(once, rel=0.01)


@pytest.mark.parametrize("scale_bits", [None, 4])
def test_blocks_of_zeros_and_tiny_tails_stay_what_they_are(scale_bits: int | None) -> None:
    form = NormalFloat(2, 8, scale_bits, 2)
    for matrix in (
        torch.zeros(3, 5),
        torch.zeros(0, 4),
        torch.zeros(1),
        torch.cat([torch.zeros(8), torch.ones(3)]),
    ):
        found = rounded(matrix, form)
        assert found.shape == matrix.shape
        assert torch.equal(found, matrix)
    zeros = unpack(quantise(torch.zeros(16), form)["codes"], 2)
    assert (zeros == codebook(2).index(0)).all()


@pytest.mark.parametrize(
    "form", [NormalFloat(b, 16, b0, 4, d) for b in BITS for b0, d in ((None, "fp16"), (3, "fp32"))]
)
def test_the_layout_says_what_is_stored(form: NormalFloat) -> None:
    for shape in ((7, 5), (16, 32)):
        tensors = quantise(normal(*shape), form)
        layout = form.layout(math.prod(shape))
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == layout
        assert sum(t.nbytes for t in tensors.values()) == form.bytes(math.prod(shape))


def test_the_bits_of_a_number_are_those_of_the_paper() -> None:
    form = NormalFloat.of("nf4-64-8-256-fp32")
    assert form.bits_per_number == pytest.approx(4.127, abs=5e-4)
    numbers = 1024 * 1024
    assert 8 * form.bytes(numbers) == numbers * form.bits_per_number + 32  # and the one offset


@given(st.sampled_from(BITS), st.integers(0, 40), st.integers(0, 99))
def test_eight_codes_lie_in_as_many_bytes_as_they_have_bits(bits: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert len(packed) == -(-count // 8) * bits
    assert torch.equal(unpack(packed, bits)[:count], codes)


@pytest.mark.parametrize("bits", BITS)
def test_matrices_that_are_read_in_pieces_are_read_whole(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, form = normal(40, 40).float(), NormalFloat(bits, 16, 4, 8)
    whole = rounded(matrix, form)
    monkeypatch.setattr("rankfold.linalg.normal_float._PIECE", 48)
    assert torch.equal(rounded(matrix, form), whole)


def test_four_bits_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = normal(32, 64).float()
    packed, state = functional.quantize_4bit(matrix, quant_type="nf4", blocksize=64)
    assert codebook(4) == pytest.approx(state.code.tolist(), abs=2e-7)
    theirs = functional.dequantize_4bit(packed, state)
    assert torch.allclose(rounded(matrix, plain(4, 64)), theirs, atol=1e-6)


@pytest.mark.parametrize("text", ["nf4-64-8-256-fp32", "nf2-16-3-16-bf16", "nf8-32-fp16"])
def test_a_format_is_read_from_its_text(text: str) -> None:
    assert str(NormalFloat.of(text)) == text


@pytest.mark.parametrize(
    "text",
    ["nf5-64-8-256-fp32", "nf4-12-fp32", "nf4-64-8-256-fp64", "int4", "nf4-64-8-fp32", "nf4-64-8-0-fp32"],
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidOption):
        NormalFloat.of(text)


def test_nan_is_refused() -> None:
    with pytest.raises(InvalidOption, match="NaN"):
        quantise(torch.tensor([[math.nan, 1.0]]), NormalFloat())
