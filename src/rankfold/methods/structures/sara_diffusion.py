"""SaRA (diffusion): train only the entries that are smallest in magnitude, which do little as they are.

    W = W0 + kept + scatter(v, S),   S = {|W0| < theta},   loss + lambda ||W . mask(S)||_*

Hu et al. 2024. Every step the nuclear norm's gradient, lambda (U V^T)[S] of the singular vectors of W . mask,
is added for one weight, drawn among those whose sides are above 64. After half of the training, entries that
have grown to theta or beyond stay as they are (`kept`), and the others go on from a new optimizer state. Only
v is trained, so gradient, moments and weight decay are packed. theta = 2e-3 (5e-4 to 2e-2 for other budgets),
lambda = 5e-4, AdamW with weight decay 1e-2 and a rate of 1e-3 exp(-350 theta) falling as a cosine are the
paper's; theta has the weight's units, so `share` takes a quantile of every weight instead. SARA, on singular
values, is another method. Start: the base, exactly, v = 0.

Deviations: biases and norms stay frozen; the official code selects in them too, and drops the sign of what is
selected for one step. v is the change, so weight decay pulls towards W0, at most theta from zero.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...errors import InvalidOption
from ...linalg import polar_factor
from ...weights import Weight
from ..limits import in_range
from ..registry import structure
from ..rules import Dynamics
from ..run import Run
from ..selected import scattered, selected_now, selections
from ..sensitivity import add_slope
from ..site import Site


def limit(weight: Tensor, threshold: float, share: float | None) -> float:
    """Return theta: the threshold, or a number just above the given share of all magnitudes, at least one."""
    if share is None:
        return threshold
    magnitudes = weight.detach().abs().flatten()
    largest = magnitudes.kthvalue(max(1, int(share * len(magnitudes)))).values
    return float(largest.nextafter(largest.new_tensor(math.inf)))


@dataclass(kw_only=True)
class SaRA(Dynamics):
    """The nuclear norm of the selected entries, and their adjustment; the options are the structure's."""

    threshold: float = 2e-3
    share: float | None = None
    nuclear: float = 5e-4
    adjust: float = 0.5
    small: ClassVar[int] = 64  # weights with a side of this size or less are not penalised
    needs: ClassVar[tuple[str, ...]] = ("total_steps",)

    def __post_init__(self) -> None:
        in_range("sara-diffusion", "(0, inf)", threshold=self.threshold)
        in_range("sara-diffusion", "(0, 1]", share=self.share, adjust=self.adjust)
        in_range("sara-diffusion", "[0, inf)", nuclear=self.nuclear)

    def gradients_ready(self, run: Run) -> None:
        """Add the gradient of the nuclear norm of one weight."""
        found = {p: s for p, s in selections(run).items() if min(s.shape) > self.small and s.values.shape[0]}
        if not found or not self.nuclear:
            return
        drawn = int(torch.randint(len(found), (), generator=run.generator("weight")))
        path, selection = list(found.items())[drawn]
        positions, values = selection.positions(), selection.values.value
        masked = values.new_zeros(math.prod(selection.shape))
        masked[positions] = selected_now(run, path, selection)
        slope = polar_factor(masked.view(selection.shape)).flatten()[positions]
        add_slope(values, self.nuclear * slope)

    def stepped(self, run: Run) -> None:
        """Leave what has grown to the threshold, once."""
        if run.step != round(self.adjust * (run.total_steps or 0)):
            return
        for path, selection in selections(run).items():
            values, now = selection.values.value, selected_now(run, path, selection).abs()
            base = run.adaptation.layers[path].matrix().detach().to(values.dtype)
            run.optimizer.state.pop(values, None)
            selection.select(selection.positions()[now < limit(base, self.threshold, self.share)])


@structure(
    "sara-diffusion",
    title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
    year=2024,
    arxiv="2409.06633",
    code="sjtuplayer/SaRA",
    formula="W = W0 + v where |W0| < theta, + lambda ||W . mask||_*; what has grown past theta stays",
    rank=None,
    example={"share": 0.2},
    training=SaRA,
)
def sara_diffusion(
    site: Site,
    *,
    threshold: float = 2e-3,
    share: float | None = None,
    nuclear: float = 5e-4,
    adjust: float = 0.5,
) -> Weight:
    """Return W0 and its smallest entries.

    Args:
        site: the weight.
        threshold: theta, positive; entries of a smaller magnitude are trained.
        share: of the entries of every weight, in (0, 1], that are trained instead; None takes the threshold.
        nuclear: lambda, at least 0.
        adjust: share of the training after which entries that have grown are left, in (0, 1].
    """
    weight = site.matrix()
    positions = (weight.abs() < limit(weight, threshold, share)).flatten().nonzero().flatten()
    if not len(positions):
        raise InvalidOption(
            f"{site.path}: sara-diffusion finds no entry below {threshold:g}; choose a higher threshold (the "
            f"smallest magnitude is {float(weight.abs().min()):.2g}), a share=, or other targets"
        )
    return site.base + scattered(site, positions)
