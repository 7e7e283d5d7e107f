"""Quantised weights: putting a new matrix where a quantised one stood, in the same form."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedLayer


def requantised(old: Any, matrix: Tensor) -> nn.Parameter:
    """Quantise a matrix (out, in) in the way that the old weight was.

    Raises:
        UnsupportedLayer: the old weight's form is not known.
    """
    if type(old).__name__ == "Params4bit":
        return _four_bit(old, matrix)
    if type(getattr(old, "data", old)).__module__.startswith("torchao."):
        return _torchao(old, matrix)
    raise UnsupportedLayer(
        f"no way is known to quantise a matrix as {type(old).__name__}; fold before quantising"
    )


def _four_bit(old: Any, matrix: Tensor) -> nn.Parameter:
    fresh = type(old)(
        matrix.detach().cpu(),
        requires_grad=False,
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_storage=old.quant_storage,
    )
    return fresh.to(old.device)  # type: ignore[no-any-return]


def _torchao(old: Any, matrix: Tensor) -> nn.Parameter:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if "Int8" not in type(old.data).__name__ and "Affine" not in type(old.data).__name__:
        raise UnsupportedLayer(
            f"cannot quantise a matrix as {type(old.data).__name__}; fold before quantising"
        )
    holder = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=old.dtype, device=old.device)
    holder.weight = nn.Parameter(matrix.detach().to(old.dtype), requires_grad=False)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder.weight
