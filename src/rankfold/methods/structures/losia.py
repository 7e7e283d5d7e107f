"""LoSiA and LoSiA-Pro: train a sub-matrix of every weight, found again and again by smoothed sensitivity.

    W = W0 + kept + v at rows X and columns Y,   |X| = int(p out),   |Y| = int(p in)

Wang et al. 2025. Time has slots of T steps; in slot s the weights of block s mod D, of D, record the score
Q = E U, E and U the averages of I = |W G - (W G)^2 / 2| and of |I - E|, and their whole gradient G is formed
for that alone. At the slot's end X and Y become the best of three greedy choices by the sum of Q[X, Y],
Adam's moments (not its step count) and Q start again, and the rate of these weights climbs to the scheduled
one over T steps, of which the first two move nothing. What was learnt outside of the new X and Y stays
(`kept`). Only v is trained, so gradient, moments and weight decay are packed. `losia-pro` takes the same
steps: it keeps x[:, Y] for backward and not x, and multiplies dy[:, X]^T x[:, Y] and not dy^T x.
p = 1/8, T = 100 (of 50 to 150) and 0.85 for both averages are the paper's; X and Y are drawn at random to
begin with. Start: the base, exactly, v = 0.

Deviations: weight decay pulls v, not W, to zero. An output head is sub-selected like any other weight. G is
scaled as the optimizer gets it, after a clip. The rate of one weight is lowered by shortening the step that
the optimizer has taken, which is the same for every optimizer whose step is its rate times something. An
attention's own projections are no modules, so their gradients are not seen, and they are refused.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...weights import Weight
from ..limits import in_range
from ..localise import Localisation
from ..registry import structure
from ..selected import rectangle
from ..site import Site

_ABOUT: dict[str, Any] = {
    "title": "LoSiA: Efficient High-Rank Fine-Tuning via Subnet Localization and Optimization",
    "year": 2025,
    "arxiv": "2507.04487",
    "code": "KlozeWang/LoSiA",
    "rank": None,
    "layers": ("linear", "embedding", "convolution"),
}


class Packed(Localisation):
    """The localisation of losia-pro, which is that of losia."""

    owner = "losia-pro"


def sub_matrix(name: str, *, thin: bool) -> Callable[..., Weight]:
    """Return the structure of a name; it keeps and multiplies less where it is thin."""

    def build(
        site: Site,
        *,
        factor: float = 0.125,
        interval: int = 100,
        beta1: float = 0.85,
        beta2: float = 0.85,
        importance: str = "mixed",
        asynchronous: bool = True,
    ) -> Weight:
        """Return W0 and a trained sub-matrix.

        Args:
            site: the weight.
            factor: p, the share of rows and of columns that are trained, in (0, 1].
            interval: T, steps of a slot, at least 1.
            beta1: of the average of the sensitivity, in [0, 1).
            beta2: of the average of its spread, in [0, 1).
            importance: "mixed" as above, "first" for |W G|, or "second" for (W G)^2 / 2.
            asynchronous: localise one block after the other; else all in the first of every D slots.
        """
        in_range(name, "(0, 1]", factor=factor)
        chosen = []
        for side, size in zip(("rows", "columns"), site.shape, strict=True):
            drawn = (
                range(size) if site.blank else torch.randperm(size, generator=site.generator(side)).tolist()
            )
            chosen.append(torch.tensor(sorted(drawn[: max(1, int(factor * size))])))
        return site.base + rectangle(site, *chosen, thin=thin)

    return build


losia = structure(
    "losia",
    formula="W = W0 + v at rows X, columns Y, found again by the smoothed |W G|",
    training=Localisation,
    **_ABOUT,
)(sub_matrix("losia", thin=False))

losia_pro = structure(
    "losia-pro",
    formula="as losia, from dv = dy[:, X]^T x[:, Y]; of x only x[:, Y] is kept",
    training=Packed,
    **_ABOUT,
)(sub_matrix("losia-pro", thin=True))
