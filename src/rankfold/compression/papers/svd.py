"""Plain truncated singular value decomposition, the baseline of every method of compression.

    W ~ B A,   W = U diag(s) V^T,   B = U_r diag(s_r)^(1/2),   A = diag(s_r)^(1/2) V_r^T

Eckart and Young 1936: no product of rank r has a smaller error ||W - B A||_F, which is the root of the sum of
the squares of the singular values that are cut. The inputs that the weight meets are not asked.
"""

from ..objective import Objective, Site
from ..registry import compressor


@compressor(
    "svd",
    title="The Approximation of One Matrix by Another of Lower Rank",
    year=1936,
    formula="W ~ [W]_r",
    layers=("linear", "attention", "convolution"),
)
def svd(site: Site) -> Objective:
    """Return the plain error.

    Args:
        site: the weight.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16))
        >>> rf.compress(model, "svd", keep=0.5, progress=False)[0].expression
        (up*[16x4] @ down*[4x16])
    """
    return Objective()
