"""LoRD: the outputs of a linear layer, not its weight, are of low rank.

    S = Cov(y) = U diag(l) U^T,   B = U_r,   A = U_r^T W,   b' = U_r U_r^T b + (1 - U_r U_r^T) mean(y)

for outputs y = W x + b. Equal to it, W ~ [W Cov(x)^(1/2)]_r Cov(x)^(-1/2) with b' = b + (W - B A) mean(x),
from the inputs: the covariance in the place of the uncentred Gram matrix of SVD-LLM, and the bias takes the
mean error up. B has orthonormal columns; on the calibration data the error has the mean zero, and its mean
square is the sum of the eigenvalues of S that are cut.

Kaushal et al. 2023, for language models of code, calibrated on text of one programming language. They choose
one rank for each type of layer, a multiple of 64 or 128 that kernels like: `share=("uniform", {"multiple":
128})`.

Deviations: a layer without a bias cannot take up the mean error, so there the uncentred Gram matrix of the
inputs is the metric, which is then the best; `add_bias` gives such a layer a bias.
"""

from ..objective import Objective, Site
from ..registry import compressor
from ._mimicking import mimicked


@compressor(
    "lord",
    title="LORD: Low Rank Decomposition Of Monolingual Code LLMs For One-Shot Compression",
    year=2023,
    arxiv="2309.14021",
    formula="W ~ U_r U_r^T W, U the eigenvectors of Cov(y)",
    needs=("input_covariance", "input_mean"),
)
def lord(site: Site, *, add_bias: bool = False, damping: float = 0.0) -> Objective:
    """Return the error of the outputs, apart from its mean.

    Args:
        site: the weight.
        add_bias: layers without a bias get one. A class of transformers that makes no bias cannot read it
            from its own files; `rankfold.save` and `load` can.
        damping: d >= 0; Cov + d mean(diag Cov) I also weighs the plain error, which helps where calibration
            data are few.

    Example:
        >>> import torch, rankfold as rf
        >>> model, inputs = torch.nn.Sequential(torch.nn.Linear(16, 16)), torch.randn(64, 16)
        >>> up = rf.compress(model, "lord", keep=0.5, data=[inputs], progress=False)[0].expression.leaf("up")
        >>> bool((up.tensor().T @ up.tensor() - torch.eye(4)).abs().max() < 1e-5)
        True
    """
    return mimicked(site, add_bias=add_bias, damping=damping)
