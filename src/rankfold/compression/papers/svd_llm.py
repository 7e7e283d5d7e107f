"""SVD-LLM: truncation-aware whitening, so that the singular values are the loss of the outputs.

    C = X^T X / n,   W C^(1/2) = U S V^T,   W ~ [W C^(1/2)]_r C^(-1/2)

for inputs X (n, in). Cutting the singular value S_i raises the squared error of the calibration outputs by
n S_i^2 exactly, so no product of rank r has a smaller one. No inverse and no Cholesky factor of C is taken,
which a dead channel or fewer tokens than inputs would break.

`update` is the second stage: one weight after another, with X' what the layers before it give now that they
are compressed, and A of the first stage fixed,

    B = argmin ||X' W^T - X' A^T B^T||_F = W C' A^T (A C' A^T)^-1,   C' = X'^T X' / n

The target is what the original weight makes of X'. Where X' = X the first stage was the best already, and
nothing changes; so it is with sequential calibration, whose first stage reads X'.

Wang et al. 2024. The share of the paper is uniform; its calibration are 256 sequences of 2048 tokens. Its
ratio is what is removed, `keep` here what remains. Directions that X' does not have keep their B.
"""

from dataclasses import replace

import torch

from ...linalg import RootGram
from ...linalg.checks import precise_dtype
from ..objective import Objective, Site, Solved
from ..registry import compressor


@torch.no_grad()
def updated(site: Site, found: Solved) -> Solved:
    """Return the second stage: B by least squares on the inputs as they are now.

    Args:
        site: the weight, with the statistics of X'.
        found: the first stage.
    """
    matrix = site.matrix()
    wide = precise_dtype(matrix)
    gram, matrix = site.statistic("input_gram").to(wide), matrix.to(wide)
    up, down = found.leaves["up"].to(wide), found.leaves["down"].to(wide)
    met = down @ gram @ down.T
    up = up + (matrix - up @ down) @ gram @ down.T @ torch.linalg.pinv(met, hermitian=True)
    rest = matrix - up @ down
    before, after = ((m @ gram * m).sum().clamp(min=0).sqrt() for m in (matrix, rest))
    return replace(
        found,
        leaves={"up": up.to(site.matrix()), "down": found.leaves["down"]},
        error=float(after / before.clamp(min=1e-300)),
        plain_error=float(rest.norm() / matrix.norm().clamp(min=1e-300)),
    )


@compressor(
    "svd-llm",
    title="SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
    year=2024,
    arxiv="2403.07378",
    code="AIoT-MLSys-Lab/SVD-LLM",
    formula="W ~ [W C^(1/2)]_r C^(-1/2)",
    needs=("input_gram",),
    update=lambda options: updated if options["update"] else None,
)
def svd_llm(site: Site, *, update: bool = False, damping: float = 0.0) -> Objective:
    """Return the error of the outputs.

    Args:
        site: the weight.
        update: run the second stage, which takes one more pass over the data for every group of weights.
        damping: d >= 0; C + d mean(diag C) I also weighs the plain error, which helps where calibration data
            are few. It is no part of the second stage.

    Example:
        >>> import torch, rankfold as rf
        >>> model, inputs = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(64, 16)
        >>> rf.compress(model, "svd-llm", keep=0.5, data=[inputs], progress=False)[0].expression
        (up*[16x4] @ down*[4x16])
    """
    return Objective(right=RootGram(site.statistic("input_gram")), damping=damping)
