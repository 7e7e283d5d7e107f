"""AFM, atomic feature mimicking: what a layer gives is compressed, not its weight.

    linear:  S = Cov(y) = U diag(l) U^T,   y ~ U_r f(U_r^T W x + U_r^T b) + (1 - U_r U_r^T) mean(y)
    table:   m = p^T E,   P^(1/2) (E - 1 m^T) = U' diag(s) U^T,   E ~ (E - 1 m^T) U_r U_r^T + 1 m^T

for outputs y = W x + b, and a table E (vocabulary, d) whose row i is looked up with the frequency p_i in the
calibration data, P = diag(p). Without f (`activation="identity"`) the error of the outputs has the mean zero
and, as mean square, the sum of the eigenvalues that are cut, which is the least. Principal components of the
table itself, all rows alike, are others where some ids are frequent; p counts what is not padding.

Yu et al. 2024, for models that predict clicks. In their models f is the activation of the network itself,
"relu": the layer can express more, but is no longer near what it was, not even with r = out, and is to be
trained further. It has no matrix and cannot be folded; the errors in the report are those without f.

Deviations: a layer without a bias cannot take up the mean error, so there the uncentred Gram matrix of the
inputs is the metric; `add_bias` gives such a layer a bias. The d numbers of m come on top of `keep`. U_r is
not multiplied into a next layer.
"""

from dataclasses import replace

from ...linalg import Diagonal
from ...methods.limits import one_of
from ...weights.activated import ACTIVATIONS
from ..objective import Objective, Site, Solved
from ..registry import compressor
from ._mimicking import mimicked


def _activated(site: Site, found: Solved, *, activation: str, add_bias: bool, damping: float) -> Solved:
    """Move the bias U_r U_r^T b before the activation."""
    if activation == "identity" or site.is_embedding:
        return found
    up = found.leaves["up"]
    inner = up.new_zeros(up.shape[1]) if site.bias is None else up.T @ site.bias.detach().to(up)
    shift = found.shift if site.bias is None or found.shift is None else found.shift - up @ inner
    return replace(found, leaves={**found.leaves, "shift": inner}, shift=shift)


@compressor(
    "afm",
    title="Unified Low-rank Compression Framework for Click-through Rate Prediction",
    year=2024,
    arxiv="2405.18146",
    code="yuhao318/Atomic_Feature_Mimicking",
    formula="y ~ U_r f(U_r^T (W x + b)) + (1 - U_r U_r^T) mean(y), U the eigenvectors of Cov(y)",
    needs=("input_covariance", "input_mean"),
    lookups=("token_frequency",),
    structure=lambda options: ("afm", {"activation": options["activation"]}),
    layers=("linear", "embedding"),
    finish=_activated,
)
def afm(
    site: Site, *, activation: str = "identity", add_bias: bool = False, damping: float = 0.0
) -> Objective:
    """Return the error of the outputs, apart from its mean; of a table, weighted by how often rows are met.

    Args:
        site: the weight.
        activation: f between the factors of linear layers, "identity", "relu", "gelu" or "silu".
        add_bias: linear layers without a bias get one. A class of transformers that makes no bias cannot read
            it from its own files; `rankfold.save` and `load` can.
        damping: d >= 0; Cov + d mean(diag Cov) I also weighs the plain error.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16))
        >>> ids = torch.arange(100).remainder(60).remainder(50)[None]
        >>> rf.compress(model, "afm", keep=0.5, targets="0", data=[ids], progress=False)[0].expression
        (up*[50x6] @ down*[6x16]) + offset(offset*[1x16], 50 rows)
    """
    one_of("afm", ("identity", *sorted(ACTIVATIONS)), activation=activation)
    if not site.is_embedding:
        return mimicked(site, add_bias=add_bias, damping=damping)
    frequency = site.statistic("token_frequency")
    mean = frequency @ site.matrix().to(frequency)
    return Objective(
        left=Diagonal(frequency.sqrt()), offset=mean.to(site.matrix()), split="orthogonal", damping=damping
    )
