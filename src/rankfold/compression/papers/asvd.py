"""ASVD: the columns of a weight are scaled by the size of what they meet, and then decomposed.

    d_j = (1/n sum_t |x_tj|)^alpha,   W diag(d) = U S V^T
    B = U_r S_r^(1/2),   A = S_r^(1/2) V_r^T diag(d)^-1

Yuan et al. 2023; alpha = 0.5 and the mean absolute input are theirs. Channels with outliers then lose less.
The error of the outputs is not made smallest: inputs are weighed one by one, not together (see svd-llm).
A channel that is never used weighs 1e-6 of the largest.

Ranks: the paper measures the perplexity with one layer cut to every ratio of a ladder, and searches one bound
on it for all layers: `share="sensitivity"`. The usual share here is uniform, as of the other methods.
"""

from ...methods.limits import in_range, one_of
from ..objective import Objective, Site, floored
from ..registry import compressor


@compressor(
    "asvd",
    title="ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models",
    year=2023,
    arxiv="2312.05821",
    code="hahnyuan/ASVD4LLM",
    formula="W ~ [W diag(d)]_r diag(d)^-1, d = mean |x|^alpha",
    needs=lambda options: (
        ("input_absolute_mean",) if options["statistic"] == "absolute mean" else ("column_norm",)
    ),
)
def asvd(site: Site, *, alpha: float = 0.5, statistic: str = "absolute mean") -> Objective:
    """Return the error of the scaled weight.

    Args:
        site: the weight.
        alpha: how far channels are told apart, at least 0; 0 is the plain error.
        statistic: of a channel, "absolute mean" or "norm".

    Example:
        >>> import torch, rankfold as rf
        >>> model, inputs = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(64, 16)
        >>> rf.compress(model, "asvd", keep=0.5, data=[inputs], progress=False)[0].expression
        (up*[16x4] @ down*[4x16])
    """
    in_range("asvd", "[0, inf)", alpha=alpha)
    one_of("asvd", ("absolute mean", "norm"), statistic=statistic)
    size = site.statistic("input_absolute_mean" if statistic == "absolute mean" else "column_norm")
    return Objective(right=floored((size / size.max().clamp(min=1e-30)) ** alpha))
