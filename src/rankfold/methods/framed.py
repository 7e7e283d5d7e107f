"""Changes between two frozen factors that are read off the weight: what the structures with a frame share.

    W = W0 + s L C R,   L (out, r), R (r, in) frozen, C (r, r) trained

An initialiser gives the frame (`Site.basis`): singular vectors (svd, pissa, milora), pivots (qr, lu), columns
and rows of the weight (skeleton, nystrom). A structure chooses the core, diagonal (svfit, vectorfit, loldu,
qr-lora), dense (lora-xs, pmss, inttune), of low rank (nora) or in blocks (salt), and where the values go that
stand between the two factors. Leaves: `left` and `right`, beside those of the core.
"""

from __future__ import annotations

from ..weights import Weight
from .limits import one_of
from .site import Basis, Site

SPLITS = ("none", "left", "right", "sqrt")


def framed(site: Site, basis: Basis, core: Weight, *, values: str = "none", prefix: str = "") -> Weight:
    """Return `left @ core @ right`, the two outer factors frozen.

    Args:
        site: the weight.
        basis: its frame of rank r.
        core: (r, r).
        values: which factor the frame's values multiply: "none", "left", "right", or "sqrt", which splits
            them evenly, signs to the left.
        prefix: of the frozen leaves' names, where a structure has several frames.

    Raises:
        InvalidOption: there is no such split.
    """
    one_of(site.path, SPLITS, values=values)
    left, right = basis.left, basis.right
    if values == "sqrt":
        root = basis.values.abs().sqrt()
        left, right = left * (root * basis.values.sign()), root[:, None] * right
    elif values == "left":
        left = left * basis.values
    elif values == "right":
        right = basis.values[:, None] * right
    return site.frozen(left, f"{prefix}left") @ core @ site.frozen(right, f"{prefix}right")
