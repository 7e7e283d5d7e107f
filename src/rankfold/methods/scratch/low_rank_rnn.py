"""Low-rank starts of recurrent weights: how rich a network learns is set by the rank that it begins with.

    W0 = g N / sqrt(n),   N (n, n) normal,   W0 = U S V^T,   W = c U_r S_r V_r^T,   c = |W0|_F / |W0_r|_F

Liu et al. 2023. At equal Frobenius norm, a start of low rank lets learning change weights, representations
and the tangent kernel (rich), one of high rank little (lazy); without c, rank and size could not be told
apart. g = 1.25 is the paper's. Gated cells start every gate's matrix by itself. At equal norm the spectral
radius is not equal: of rank 1 it is the largest; and a low-rank start that is aligned with the task can be
lazy. Compare at equal loss. The measures are `rf.laziness` and what it calls. Start: the matrix above.

Deviations: a rectangular matrix (out, in), of cells with a projection, is divided by sqrt(in).

Use it to begin a recurrent network that is meant to learn features, or to study what the rank does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ...catalogue import not_base, register
from ...errors import InvalidOption, InvalidRank, UnsupportedLayer
from ...linalg import truncated_svd
from ..limits import in_range
from ..site import derived_seed

Target = TypeVar("Target", bound=nn.Module | Tensor)


@register(
    "pretrain",
    "low-rank-rnn",
    title="How connectivity structure shapes rich and lazy learning in neural circuits",
    year=2023,
    arxiv="2310.08513",
    code="Helena-Yuhan-Liu/BioRNN_RichLazy",
    formula="W = c U_r S_r V_r^T of a normal W0 = U S V^T, c = |W0|_F / |W0_r|_F",
    start=not_base("that of recurrent weights of rank r"),
    traits={"cost": "One decomposition of every recurrent matrix, before training; none after it."},
)
@torch.no_grad()
def low_rank_recurrent_(target: Target, rank: int, *, gain: float | None = 1.25, seed: int = 0) -> Target:
    """Start recurrent weights at a rank, in place, with the Frobenius norm of the start of full rank.

    Args:
        target: a model with recurrent layers (`nn.RNN`, `nn.GRU`, `nn.LSTM`, their cells, and modules whose
            recurrent weights are called weight_hh... too), or a matrix.
        rank: r, 1 to min(out, in).
        gain: g of the normal start W0, more than 0; None takes the values that are there for W0.
        seed: of the normal numbers, for every weight by its name.

    Returns:
        What was given.

    Raises:
        UnsupportedLayer: the model has no recurrent weight.
        InvalidRank: a weight cannot have the rank; none is changed then.
        InvalidOption: the gain is impossible, or a tensor is no matrix.

    Example:
        >>> import torch
        >>> network = low_rank_recurrent_(torch.nn.GRU(4, 16), rank=2)
        >>> [int(torch.linalg.matrix_rank(gate)) for gate in network.weight_hh_l0.chunk(3)]
        [2, 2, 2]
    """
    in_range("low-rank-rnn", "(0, inf)", gain=gain)
    blocks = dict(_blocks(target))
    if not blocks:
        raise UnsupportedLayer(f"{type(target).__name__} has no recurrent weight, named weight_hh...")
    for name, block in blocks.items():
        if type(rank) is not int or not 1 <= rank <= min(block.shape):
            raise InvalidRank(f"{name}: rank {rank} is not in 1..min(out, in) = {min(block.shape)}")
    for name, block in blocks.items():
        block.copy_(with_rank(block if gain is None else _normal(name, block, gain, seed), rank))
    return target


def with_rank(matrix: Tensor, rank: int) -> Tensor:
    """Return the best approximation of a rank, scaled to the Frobenius norm of the matrix.

    Args:
        matrix: (out, in).
        rank: 1 to min(out, in).
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    left, values, right = truncated_svd(wide, rank)
    scale = wide.norm() / values.norm().clamp(min=torch.finfo(wide.dtype).tiny)  # zeros stay zeros
    found: Tensor = (left * (scale * values)) @ right
    return found.to(matrix.dtype)


def _normal(name: str, like: Tensor, gain: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, name))
    scale = gain / math.sqrt(like.shape[1])
    drawn = scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return drawn.to(like.device, torch.promote_types(like.dtype, torch.float32))


def _blocks(target: nn.Module | Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrix of every gate of every recurrent weight, or the one matrix there is, as views."""
    if isinstance(target, Tensor):
        if target.dim() != 2 or not target.is_floating_point():
            raise InvalidOption(f"low-rank-rnn starts real matrices, not {target.dtype} {list(target.shape)}")
        yield "[0]", target
        return
    for name, weight in target.named_parameters():
        owner, _, own = name.rpartition(".")
        if own.startswith("weight_hh") and weight.dim() == 2:
            hidden = getattr(target.get_submodule(owner), "hidden_size", None)
            gates = weight.split(hidden if isinstance(hidden, int) else weight.shape[1])
            yield from ((f"{name}[{i}]", gate) for i, gate in enumerate(gates))
