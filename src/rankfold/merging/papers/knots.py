"""KnOTS: the tasks' changes are written in one basis of outputs, and merged there by another rule.

    [dW_1 | ... | dW_T] = U diag(S) [V_1^T | ... | V_T^T],   dW_t = th_t - th0 (m, n), U (m, k), V_t^T (k, n)
    th* = th0 + U rule_t(diag(S) V_t^T)

Stoica et al. 2024. Changes of low rank that speak of the same outputs by different factors become comparable
entry by entry, which is what rules such as TIES need. Components of singular values below 1e-4 are left out.
With a linear rule the result is that rule without the basis; every difference comes of what the rule does to
single entries. Tensors that are no matrices, and those named by `plain`, are merged by the rule as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import catalogue
from ...errors import InvalidOption
from ..parts import Parts
from ..registry import merger
from ..spectra import has_spectrum


@merger(
    "knots",
    title="Model merging with SVD to tie the Knots",
    year=2024,
    arxiv="2410.19735",
    code="gstoica27/KnOTS",
    formula="th0 + U rule_t(S V_t^T), [dW_1 .. dW_T] = U S [V_1^T .. V_T^T]",
)
def knots(
    parts: Parts,
    *,
    rule: str = "ties",
    rule_options: Mapping[str, Any] | None = None,
    floor: float = 1e-4,
    plain: Sequence[str] = (),
) -> Tensor:
    """Return the base and the changes, merged in their common basis.

    Args:
        parts: one tensor of all models.
        rule: any method of merging that works tensor by tensor, such as "ties" or "task-arithmetic".
        rule_options: options of that method.
        floor: components of smaller singular values are left out, 0 or more.
        plain: patterns of names of matrices that are merged by the rule as they are.

    Raises:
        InvalidOption: the rule needs whole models, cannot take as many, or is this one; or its options or
            the floor are impossible.
        UnknownMethod: there is no such rule.

    Example:
        >>> models = torch.eye(2), torch.ones(2, 2)
        >>> knots(Parts("w", models, (1.0, 1.0), torch.zeros(2, 2)), rule="task-arithmetic")
        tensor([[2.0, 1.0],
                [1.0, 2.0]])
    """
    if floor < 0:
        raise InvalidOption(f"knots: floor={floor:g} must be 0 or more")
    method = _inner(rule, len(parts.models))
    options = method.checked(rule_options or {})
    if not has_spectrum(parts.name, parts.models[0].shape, plain):
        result: Tensor = method.build(parts, **options)
        return result
    basis, aligned = common_basis(parts.deltas, floor)
    inside = replace(parts, models=tuple(aligned), base=torch.zeros_like(aligned[0]))
    merged: Tensor = basis @ method.build(inside, **options)
    return parts.origin + merged


def common_basis(deltas: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Return U (m, k) and the aligned changes diag(S) V_t^T, stacked (T, k, n), of changes (T, m, n).

    Example:
        >>> deltas = torch.stack([torch.eye(2), torch.ones(2, 2)])
        >>> basis, aligned = common_basis(deltas, 0.0)
        >>> bool(torch.allclose(basis @ aligned, deltas, atol=1e-6))
        True
    """
    tasks, _, inputs = deltas.shape
    left, values, right = torch.linalg.svd(torch.cat([*deltas], 1), full_matrices=False)
    kept = int((values >= floor).sum())
    scaled = values[:kept, None] * right[:kept]
    return left[:, :kept], scaled.reshape(kept, tasks, inputs).transpose(0, 1)


def _inner(rule: str, models: int) -> catalogue.Method:
    method = catalogue.get("merge", rule)
    most = method.traits["most"]
    if method.name == "knots" or method.traits["whole"]:
        raise InvalidOption(f"knots cannot use the rule {rule!r}; it needs one that works tensor by tensor")
    if most is not None and models > most:
        raise InvalidOption(f"knots: the rule {rule!r} merges {most} models, not {models}")
    return method
