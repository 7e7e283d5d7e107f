"""NormalFloat: numbers in blocks, each a quantile of the normal distribution times the block's scale.

    o = 1 - (1/32 + 1/30) / 2,   p = (1 - o ... 1/2 in 2^(b-1) steps, 1/2 ... o in 2^(b-1) + 1), 1/2 once
    v = Phi^-1(p) / Phi^-1(o),   2^b levels from -1 to 1, 0 exactly among them, one more above it than below
    block of B0 numbers w:   c = max |w|,   code = index of the v nearest to w / c,   w ~ v[code] c

Dettmers et al. 2023 (QLoRA, b = 4). The scales are quantised too, as in LQ-LoRA (Guo et al. 2023), in groups
of B1 with the smallest scale of all as offset and the group's largest excess m as the scale of scales:

    c ~ offset + round((c - offset) / m (2^b0 - 1)) / (2^b0 - 1) m
    bits per number:   b + b0 / B0 + b1 / (B0 B1),   b1 the bits of an m

Codes are then chosen with the scale as it will be read. Eight codes of b bits lie in b bytes. No well-kept
library has these formats below four bits, nor that second quantisation.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidOption
from .checks import require_finite

BITS = (2, 3, 4, 8)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXT = re.compile(r"nf(\d+)-(\d+)(?:-(\d+)-(\d+))?-(\w+)")
_PIECE = 2**18  # numbers that are coded at a time, so that the eight bytes each takes meanwhile are few
_WORD = 8  # codes that are packed together


@dataclass(frozen=True)
class NormalFloat:
    """A format of numbers; its text is `nf<b>-<B0>-<b0>-<B1>-<b1>`, or `nf<b>-<B0>-<b1>` with plain scales.

    Args:
        bits: b of a number: 2, 3, 4 or 8.
        block: B0, numbers that share a scale, a multiple of 8.
        scale_bits: b0 of a scale: 2, 3, 4 or 8; None keeps the scales in `scale_dtype`.
        scale_block: B1, scales that share a scale of their own; read with `scale_bits` only.
        scale_dtype: "fp32", "fp16" or "bf16" (b1 bits), of what stays a floating-point number.

    Raises:
        InvalidOption: an argument is none of these.

    Example:
        >>> form = NormalFloat(4, 64, 8, 256)
        >>> str(form), round(form.bits_per_number, 3)
        ('nf4-64-8-256-fp32', 4.127)
        >>> NormalFloat.of("nf3-32-bf16").bits_per_number
        3.5
    """

    bits: int = 4
    block: int = 64
    scale_bits: int | None = 8
    scale_block: int = 256
    scale_dtype: str = "fp32"

    def __post_init__(self) -> None:
        if self.bits not in BITS or self.scale_bits not in (None, *BITS) or self.scale_dtype not in DTYPES:
            raise InvalidOption(
                f"a NormalFloat format has 2, 3, 4 or 8 bits and scales in fp32, fp16 or bf16, not {self}"
            )
        if self.block < _WORD or self.block % _WORD or self.scale_block < 1:
            raise InvalidOption(
                f"blocks of a NormalFloat format are a multiple of {_WORD} numbers, or at least one scale, "
                f"not {self}"
            )

    @classmethod
    def of(cls, text: str) -> NormalFloat:
        """Return the format of a text.

        Raises:
            InvalidOption: it is none.
        """
        found = _TEXT.fullmatch(text)
        if found is None:
            raise InvalidOption(
                f"a format is written like nf4-64-8-256-fp32, or nf4-64-fp32 with plain scales, not {text!r}"
            )
        bits, block, scale_bits, scale_block, dtype = found.groups()
        if scale_bits is None:
            return cls(int(bits), int(block), None, scale_dtype=dtype)
        return cls(int(bits), int(block), int(scale_bits), int(scale_block), dtype)

    def __str__(self) -> str:
        """Return the text of the format."""
        second = "" if self.scale_bits is None else f"-{self.scale_bits}-{self.scale_block}"
        return f"nf{self.bits}-{self.block}{second}-{self.scale_dtype}"

    @property
    def bits_per_number(self) -> float:
        """Bits that a number takes, its share of the scales included; of matrices that blocks divide."""
        wide = DTYPES[self.scale_dtype].itemsize * 8
        if self.scale_bits is None:
            return self.bits + wide / self.block
        return self.bits + self.scale_bits / self.block + wide / (self.block * self.scale_block)

    def layout(self, numbers: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return shape and dtype of every tensor that so many numbers become, by name.

        They are codes (bytes,) and scales (blocks,), or where the scales have codes too, scales (bytes,),
        maxima (groups,) and offset ().
        """
        blocks, wide = -(-numbers // self.block), DTYPES[self.scale_dtype]
        codes = {"codes": ((_packed(numbers, self.bits),), torch.uint8)}
        if self.scale_bits is None:
            return {**codes, "scales": ((blocks,), wide)}
        return {
            **codes,
            "scales": ((_packed(blocks, self.scale_bits),), torch.uint8),
            "maxima": ((-(-blocks // self.scale_block),), wide),
            "offset": ((), torch.float32),
        }

    def bytes(self, numbers: int) -> int:
        """Return the bytes that so many numbers take, filled up to whole blocks and bytes."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(numbers).values())


def _packed(numbers: int, bits: int) -> int:
    return -(-numbers // _WORD) * bits


def _levels(bits: int) -> tuple[float, ...]:
    most, half = 1 - (1 / 32 + 1 / 30) / 2, 2 ** (bits - 1)
    below = torch.linspace(1 - most, 0.5, half, dtype=torch.float64, device="cpu")
    above = torch.linspace(0.5, most, half + 1, dtype=torch.float64, device="cpu")
    levels = torch.special.ndtri(torch.cat([below[:-1], above]))
    levels = levels / levels[-1]
    levels[0], levels[half - 1] = -1, 0  # which rounding may have missed
    return tuple(levels.tolist())


LEVELS = {bits: _levels(bits) for bits in BITS}


_TABLES: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}


def codebook(bits: int) -> tuple[float, ...]:
    """Return the 2^b levels of NormalFloat, rising from -1 to 1, with an exact 0.

    Args:
        bits: b of a number: 2, 3, 4 or 8.

    Example:
        >>> [round(level, 4) for level in codebook(2)]
        [-1.0, 0.0, 0.3379, 1.0]
    """
    return LEVELS[bits]


@torch.no_grad()
def quantise(matrix: Tensor, form: NormalFloat) -> dict[str, Tensor]:
    """Return the tensors of `form.layout` for a matrix.

    Args:
        matrix: of any shape, read row by row; the last block is filled up with zeros.
        form: the format.

    Raises:
        InvalidOption: the matrix holds NaN or infinite entries.

    Example:
        >>> form = NormalFloat(2, 8, None)
        >>> tensors = quantise(torch.tensor([[4.0, -4.0, 1.0, 0.5]]), form)
        >>> dequantise(tensors, form, (1, 4))
        tensor([[ 4.0000, -4.0000,  1.3517,  0.0000]])
    """
    require_finite(matrix, "the matrix")
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    blocks = F.pad(wide.flatten(), (0, -wide.numel() % form.block)).view(-1, form.block)
    scales = _coded_scales(torch.maximum(blocks.amax(1), -blocks.amin(1)), form)
    read = _scales(scales, form, len(blocks)).to(wide.dtype)
    read = torch.where(read == 0, 1, read)  # whatever the codes of such a block are, it is read as zeros
    edges = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(LEVELS[form.bits])]).to(wide)
    step = max(1, _PIECE // form.block)
    pieces = [
        pack(torch.bucketize(block / scale[:, None], edges, out_int32=True).flatten(), form.bits)
        for block, scale in zip(blocks.split(step), read.split(step), strict=True)
    ]
    size = _packed(matrix.numel(), form.bits)
    return {"codes": torch.cat(pieces)[:size] if pieces else matrix.new_zeros(0, dtype=torch.uint8), **scales}


def _coded_scales(scales: Tensor, form: NormalFloat) -> dict[str, Tensor]:
    """Return what is kept of the scales (blocks,)."""
    wide = DTYPES[form.scale_dtype]
    most = torch.finfo(wide).max
    if form.scale_bits is None:
        return {"scales": scales.clamp(max=most).to(wide)}
    offset = (scales.min() if len(scales) else scales.sum()).float()
    over = F.pad(scales - offset, (0, -len(scales) % form.scale_block)).view(-1, form.scale_block)
    maxima = over.amax(1).clamp(0, most).to(wide)
    steps, divisor = 2**form.scale_bits - 1, torch.where(maxima == 0, 1, maxima.to(over.dtype))
    codes = (over / divisor[:, None] * steps).round().clamp(0, steps).long().flatten()[: len(scales)]
    return {"scales": pack(codes, form.scale_bits), "maxima": maxima, "offset": offset}


def _scales(tensors: Mapping[str, Tensor], form: NormalFloat, blocks: int) -> Tensor:
    """Return the scales (blocks,) as they are read, float32 or better."""
    scales = tensors["scales"]
    if form.scale_bits is None:
        return scales.to(torch.promote_types(scales.dtype, torch.float32))
    maxima = tensors["maxima"]
    wide = maxima.to(torch.promote_types(maxima.dtype, torch.float32))
    steps, each = 2**form.scale_bits - 1, wide.repeat_interleave(form.scale_block)[:blocks]
    shares = unpack(scales, form.scale_bits)[:blocks] / steps
    return torch.addcmul(tensors["offset"].to(wide.dtype), shares.to(wide.dtype), each)


def dequantise(
    tensors: Mapping[str, Tensor],
    form: NormalFloat,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the matrix that tensors of `quantise` stand for.

    Args:
        tensors: by name, as `form.layout` says.
        form: the format.
        shape: of the matrix.
        dtype: of the matrix, at least that of its scales.
    """
    numbers = math.prod(shape)
    blocks = -(-numbers // form.block)
    scales = _scales(tensors, form, blocks)
    scales = scales.to(torch.promote_types(scales.dtype, dtype))
    bytes_of_block = form.block // _WORD * form.bits
    codes = F.pad(tensors["codes"], (0, blocks * bytes_of_block - len(tensors["codes"])))
    table = _table(form.bits, scales)
    step = blocks if torch.compiler.is_compiling() else max(1, _PIECE // form.block)
    found: Tensor = scales.new_empty(blocks, form.block)
    for at in range(0, blocks, max(step, 1)):
        part = codes[at * bytes_of_block : (at + step) * bytes_of_block]
        levels = F.embedding(_lines(part, form.bits), table).view(-1, form.block)
        found[at : at + step] = levels * scales[at : at + step, None]
    return found.flatten()[:numbers].reshape(shape)


def _table(bits: int, like: Tensor) -> Tensor:
    """Return the levels of several codes at once: line i has those whose bits are the number i."""
    key, plain = (bits, like.dtype, like.device), not torch.compiler.is_compiling() and type(like) is Tensor
    if plain and key in _TABLES:
        return _TABLES[key]
    together = 4 if bits == 3 else _WORD // bits
    with torch.inference_mode(False):  # what is kept serves training too
        lines = torch.arange(2 ** (bits * together), device=like.device)[:, None]
        codes = lines >> bits * torch.arange(together, device=like.device) & 2**bits - 1
        table: Tensor = torch.tensor(LEVELS[bits], dtype=like.dtype, device=like.device)[codes]
    if plain:
        _TABLES[key] = table
    return table


def _lines(packed: Tensor, bits: int) -> Tensor:
    """Return which lines of the table packed codes are: bytes, or halves of three bytes."""
    if bits != 3:
        return packed.int()
    first, second, third = packed.view(-1, 3).int().unbind(1)
    return torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], 1).flatten()


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes of so many bits, eight of them in as many bytes, the first in the lowest bits.

    Args:
        codes: (n,), whole numbers below 2^b; filled up with zeros to a multiple of eight.
        bits: b, from 1 to 8.

    Example:
        >>> pack(torch.tensor([1, 2, 3]), 2)
        tensor([57,  0], dtype=torch.uint8)
        >>> unpack(pack(torch.tensor([1, 2, 3]), 2), 2)
        tensor([1, 2, 3, 0, 0, 0, 0, 0])
    """
    groups = F.pad(codes.long(), (0, -len(codes) % _WORD)).view(-1, _WORD)
    words = (groups << bits * torch.arange(_WORD, device=codes.device)).sum(1)  # the bits do not meet
    return (words[:, None] >> 8 * torch.arange(bits, device=codes.device)).bitwise_and(255).byte().flatten()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Return the codes of `pack`, a multiple of eight.

    Args:
        packed: bytes, a multiple of `bits`.
        bits: b.
    """
    groups = packed.view(-1, bits).long()
    words = (groups << 8 * torch.arange(bits, device=packed.device)).sum(1)
    shifts = bits * torch.arange(_WORD, device=packed.device)
    return (words[:, None] >> shifts).bitwise_and(2**bits - 1).flatten()
