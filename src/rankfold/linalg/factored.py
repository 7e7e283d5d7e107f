"""Products of two factors, decomposed and recompressed through the QR decompositions of the factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidOption
from .checks import exact_dtype, null_level, require_finite, require_rank
from .svd import column_signs, fixed_signs


def factored_svd(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triplets of a product that is never formed, `up down = U diag(S) V^T`.

        up = Q_B R_B,   down^T = Q_A R_A,   R_B R_A^T = u S v^T,   U = Q_B u,   V = Q_A v

    The decomposition in the middle has the size of the inner dimension only.

    Args:
        up: (..., m, k), float32 or better.
        down: (..., k, n), with the same leading dimensions.

    Returns:
        U (..., m, c), S (..., c), V^T (..., c, n) with c = min(m, k, n) and the signs of `truncated_svd`.

    Raises:
        InvalidOption: the factors do not multiply, or hold NaN or infinite entries.

    Example:
        >>> import torch
        >>> up, down = torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> factored_svd(up, down)[1]
        tensor([10.])
    """
    _require_product(up, down)
    (basis, triangle), (cobasis, cotriangle) = _qr(up, down)
    inner, values, outer = torch.linalg.svd(triangle @ cotriangle.mT, full_matrices=False)
    left, right = fixed_signs(basis @ inner, outer @ cobasis.mT)
    return left, values, right


@dataclass(frozen=True, eq=False)
class Squeezed:
    """A product recompressed to a smaller rank, and how it came from the old factors.

        scale_out B' A' = best approximation of scale_in B A,   B' = B M,   A' = N A

    Attributes:
        up: B' (..., m, r).
        down: A' (..., r, n), with B'^T B' = A' A'^T.
        up_map: M (..., k, r).
        down_map: N (..., r, k).
        values: all singular values of scale_in B A (..., c).
        gradient_scale: scale_out / scale_in.
    """

    up: Tensor
    down: Tensor
    up_map: Tensor
    down_map: Tensor
    values: Tensor
    gradient_scale: float

    @property
    def error(self) -> Tensor:
        """Return the Frobenius norm (...) of what was dropped."""
        dropped: Tensor = torch.linalg.vector_norm(self.values[..., self.up.shape[-1] :], dim=-1)
        return dropped

    def moved_up(self, moment: Tensor) -> Tensor:
        """Return a first moment of B (..., m, k) as one of B' (..., m, r)."""
        return self.gradient_scale * (moment @ self.down_map.mT)

    def moved_down(self, moment: Tensor) -> Tensor:
        """Return a first moment of A (..., k, n) as one of A' (..., r, n)."""
        return self.gradient_scale * (self.up_map.mT @ moment)


def squeeze_factors(
    up: Tensor, down: Tensor, rank: int, scale_in: float = 1.0, scale_out: float = 1.0
) -> Squeezed:
    """Return the best approximation of `scale_in B A` of a smaller rank, as balanced factors.

        B = Q_B R_B,   A^T = Q_A R_A,   K = scale_in R_B R_A^T = u S v^T,   D = diag(S_r scale_out)^(-1/2)
        B' = Q_B u_r (S_r/scale_out)^(1/2) = B M,   M = scale_in R_A^T v_r D
        A' = (S_r/scale_out)^(1/2) v_r^T Q_A^T = N A,   N = scale_in D u_r^T R_B

    LoRA-Squeeze (2026). For a gradient G of the sum `W0 + scale B A`, dB = scale_in G A^T and dA =
    scale_in B^T G, so that dB' = (scale_out/scale_in) dB N^T and dA' = (scale_out/scale_in) M^T dA exactly,
    for factors of any rank: M and N divide by kept singular values only, never by a triangle of a factor.
    What is not exact: a term whose singular value is zero to rounding is dropped (its rows and columns of
    B', A', M, N are zero, so that nothing moves along it); and a moment mixes gradients taken at earlier
    factors, of which the map holds for the present ones.

    Args:
        up: B (..., m, k), float32 or better.
        down: A (..., k, n).
        rank: r, at most min(m, k, n).
        scale_in: the constant before B A.
        scale_out: the constant before B' A'.

    Raises:
        InvalidRank: the rank is not in 1..min(m, k, n).
        InvalidOption: the factors do not multiply or hold NaN, or a scale is not positive.

    Example:
        >>> import torch
        >>> up, down = torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([3.0, 1.0]))
        >>> squeezed = squeeze_factors(up, down, 1, scale_in=2.0)
        >>> (squeezed.up @ squeezed.down).round().tolist()
        [[18.0, 0.0], [0.0, 0.0]]
        >>> squeezed.error
        tensor(2.)
    """
    _require_product(up, down)
    require_rank(rank, min(*up.shape[-2:], *down.shape[-2:]), "min(m, k, n)")
    if not (scale_in > 0 and scale_out > 0):
        raise InvalidOption(f"the scales must be positive, not {scale_in} and {scale_out}")
    (basis, triangle), (cobasis, cotriangle) = _qr(up, down)
    inner, values, outer = torch.linalg.svd(scale_in * triangle @ cotriangle.mT, full_matrices=False)
    inner, outer, kept = inner[..., :rank], outer[..., :rank, :], values[..., :rank]
    signs = column_signs(basis @ inner)
    inner, outer = inner * signs, outer * signs.mT
    root, inverse = _roots(kept, null_level(values, max(triangle.shape[-2], cotriangle.shape[-2])), scale_out)
    return Squeezed(
        up=basis @ (inner * root),
        down=(root.mT * outer) @ cobasis.mT,
        up_map=scale_in * cotriangle.mT @ outer.mT * inverse,
        down_map=scale_in * inverse.mT * inner.mT @ triangle,
        values=values,
        gradient_scale=scale_out / scale_in,
    )


def _roots(values: Tensor, level: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return (S/scale)^(1/2) and (S scale)^(-1/2), each (..., 1, r), zero up to the level."""
    alive = values > level
    root = torch.where(alive, values / scale, 0).sqrt()
    inverse = torch.where(alive, values * scale, torch.inf).rsqrt()
    return root[..., None, :], inverse[..., None, :]


def _qr(up: Tensor, down: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (Q_B, R_B) and (Q_A, R_A)."""
    dtype = exact_dtype(up, down)
    left, right = torch.linalg.qr(up.to(dtype)), torch.linalg.qr(down.to(dtype).mT)
    return (left.Q, left.R), (right.Q, right.R)


def _require_product(up: Tensor, down: Tensor) -> None:
    if up.shape[-1] != down.shape[-2] or up.shape[:-2] != down.shape[:-2]:
        raise InvalidOption(f"factors of shapes {tuple(up.shape)} and {tuple(down.shape)} do not multiply")
    require_finite(up, "the up factor")
    require_finite(down, "the down factor")
