"""Quantised weights: reading their matrix, and putting a new one where it stood, in the same form."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedLayer


@torch.no_grad()
def dequantised(module: Any) -> Tensor:
    """Return the matrix (out, in) that a linear module applies, whatever form its weight is kept in.

    A known form is read without calling the module, whose own state may depend on its first call; of any
    other module the matrix is read off from the identity.
    """
    weight = module.weight
    if _is_four_bit(weight) and weight.quant_state is not None:
        return _from_four_bit(weight)
    if _is_torchao(weight):
        matrix: Tensor = weight.dequantize()
        return matrix.detach()
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    columns: Tensor = module.forward(torch.eye(module.in_features, dtype=dtype, device=weight.device))
    return (columns if module.bias is None else columns - module.bias).T.contiguous()


def requantised(old: Any, matrix: Tensor) -> nn.Parameter:
    """Quantise a matrix (out, in) in the way that the old weight was.

    Raises:
        UnsupportedLayer: the old weight's form is not known.
    """
    check_known(old)
    return _four_bit(old, matrix) if _is_four_bit(old) else _int8(old, matrix)


def check_known(old: Any) -> None:
    """Refuse a weight in a form in which no matrix can be written.

    Raises:
        UnsupportedLayer: the form is not known.
    """
    rows = _is_torchao(old) and type(old.data).__name__ == "Int8Tensor" and old.act_quant_kwargs is None
    if not (_is_four_bit(old) or (rows and list(old.block_size) == [1, old.shape[1]])):
        raise UnsupportedLayer(
            f"no way is known to write a matrix as {type(getattr(old, 'data', old)).__name__}; "
            "fold before quantising"
        )


def identifying(weight: Tensor) -> Tensor:
    """Return a plain tensor whose memory and version tell whether a weight in any form has changed."""
    flatten = getattr(weight, "__tensor_flatten__", None)
    if flatten is None:
        return weight
    inner: Tensor = getattr(weight, flatten()[0][0])
    return identifying(inner)


def _is_four_bit(weight: Any) -> bool:
    return type(weight).__name__ == "Params4bit"


def _is_torchao(weight: Any) -> bool:
    return type(getattr(weight, "data", weight)).__module__.startswith("torchao.")


def _from_four_bit(weight: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # the layout of its fast product on some processors
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.deepcopy(state))
    return functional.dequantize_4bit(data, state)


def _four_bit(old: Any, matrix: Tensor) -> nn.Parameter:
    fresh = type(old)(
        matrix.detach().to(old.quant_state.dtype).cpu(),
        requires_grad=False,
        quant_type=old.quant_type,
        blocksize=old.blocksize,
        compress_statistics=old.compress_statistics,
        quant_storage=old.quant_storage,
        module=old.module,
    )
    return fresh.to(old.device)  # type: ignore[no-any-return]


def _int8(old: Any, matrix: Tensor) -> nn.Parameter:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=old.dtype, device=old.device)
    holder.weight = nn.Parameter(matrix.detach().to(old.dtype), requires_grad=False)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder.weight
