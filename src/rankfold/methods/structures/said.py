"""SAID: fine-tuning in one random subspace of all weights, with a trained scale for every layer.

    theta_i = theta_0,i + lambda_i P(theta_d)_i,   i = 1..m,   d - m numbers theta_d and m numbers lambda_i

Aghajanyan et al. 2020. P is the Fastfood projection of all weights together that `intrinsic-dimension` has,
cut into the layers' parts; without the scales this is their DID, which is that method. Exactly d numbers
train. theta_d = 0 and lambda_i = 1, as implementations have it, so that lambda_i has no gradient at first.
Start: the base, exactly.

Deviations: a layer is an adapted weight. A classification head is trained whole beside the d, as everywhere
here. d = 1000 lies on the paper's grid of 10 to 10,000; more than all entries and scales means those.

Use it where the question is how many numbers a task needs of a pretrained model.
"""

from collections.abc import Mapping

from ...errors import InvalidOption
from ...weights import Scaled, Weight
from ..registry import structure
from ..site import Planned, Site
from ..subspaces import projected, random_subspace


def subspace_beside_scales(
    sites: Mapping[str, Site], ranks: Mapping[str, int], *, seed: int, dimension: int, projection: str
) -> Planned:
    """Draw P for what the scales leave of d."""
    if dimension <= len(sites):
        raise InvalidOption(
            f"said: dimension {dimension} leaves nothing beside a scale for each of {len(sites)} layers; "
            f"choose at least {len(sites) + 1}"
        )
    return random_subspace("said", sites, seed, dimension - len(sites), projection)


@structure(
    "said",
    title="Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning",
    year=2020,
    arxiv="2012.13255",
    formula="theta_i = theta_0,i + lambda_i P(theta_d)_i for every layer i",
    rank=None,
    limit=None,
    plan=subspace_beside_scales,
)
def said(site: Site, *, dimension: int = 1000, projection: str = "fastfood") -> Weight:
    """Return W0 and the scaled part of P theta_d.

    Args:
        site: the weight.
        dimension: d, numbers that train in the whole model, scales included.
        projection: fastfood, sparse or dense.
    """
    return site.base + Scaled(site.trained(site.zeros() + 1, "scale"), projected(site))
