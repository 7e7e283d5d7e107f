"""FWSVD: singular value decomposition with rows weighted by their Fisher information.

    F = 1/N sum_n (dL(x_n, y_n) / dW)^2,   f_i = sum_j F_ij,   g_j = sum_i F_ij
    out:   D W = U S V^T,     B = D^-1 U_r S_r^(1/2),   A = S_r^(1/2) V_r^T,        D = diag(f)^(1/2)
    both:  D W E = U S V^T,   B = D^-1 U_r S_r^(1/2),   A = S_r^(1/2) V_r^T E^-1,   E = diag(g)^(1/2)

The error sum_ij F_ij (W - B A)_ij^2 has no closed form, so one weight stands for a whole row: minimal is
||D (W - B A)||_F. Hsu et al. 2022 write W for x W; which of its axes a row is, is open in `y = W x`, hence
`axis`. "out" weighs the outputs and is the default; "both" is the form of LQ-LoRA. A positive factor before F
changes nothing.

The squares are of the gradients of single examples: a batch's mean gradient has cross terms, and its square
is not F. Calibration therefore runs the examples of every batch one by one, unless `per_sample` is false.
Examples count by their label tokens. A row that no loss depends on has the weight 1e-3 of the largest (its
square 1e-6), so that it still counts, next to nothing.

Deviations: the paper puts all of S into B; here it is split evenly. Its finetuning before and after is the
caller's.
"""

from ...linalg import Diagonal
from ...methods.limits import one_of
from ..objective import Objective, Site, floored
from ..registry import compressor

_ROWS, _COLUMNS = "squared_gradient_rows", "squared_gradient_columns"
_READ = {"out": (_ROWS,), "in": (_COLUMNS,), "both": (_ROWS, _COLUMNS)}


@compressor(
    "fwsvd",
    title="Language model compression with weighted low-rank factorization",
    year=2022,
    arxiv="2207.00112",
    formula="W ~ D^-1 [D W]_r, D the root of the Fisher information of the rows",
    needs=lambda options: _READ.get(options["axis"], ()),
    per_sample=lambda options: options["per_sample"],
    layers=("linear", "attention", "convolution"),
)
def fwsvd(site: Site, *, axis: str = "out", per_sample: bool = True) -> Objective:
    """Return the error weighted by Fisher information.

    Args:
        site: the weight.
        axis: "out" weighs output neurons, "in" input channels, "both" either.
        per_sample: run the examples of a batch one by one; false squares the mean gradient of every batch.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> batch, loss = torch.randn(8, 16), lambda model, x: model(x).square().mean()
        >>> model = rf.compress(model, "fwsvd", keep=0.5, data=[batch], loss=loss, progress=False)
        >>> model[0].expression
        (up*[16x4] @ down*[4x16])
    """
    one_of("fwsvd", tuple(_READ), axis=axis)
    return Objective(
        left=_root(site, _ROWS) if axis != "in" else None,
        right=_root(site, _COLUMNS) if axis != "out" else None,
    )


def _root(site: Site, name: str) -> Diagonal | None:
    """Return the metric of one axis; None, which weighs all alike, where no loss depends on the weight."""
    fisher = site.statistic(name)
    return floored(fisher.sqrt(), 1e-3) if bool(fisher.any()) else None
