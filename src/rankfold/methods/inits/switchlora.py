"""The start of SwitchLoRA: factors uniform at the scales at which the product is of the weight's own size.

    B ~ U(-sqrt(3) std_B, sqrt(3) std_B),   std_B = (r / sqrt(m n))^(1/4) gain^(1/2) (r s)^(-1/2)
    A ~ U(-sqrt(3) std_A, sqrt(3) std_A),   std_A = (sqrt(m) r / n^(3/2))^(1/4) gain^(1/2) (r s)^(-1/2)
    W = W0 + s (B A - B0 A0),   gain = sqrt(1/3)

Zhou et al. 2024. B (m, r), A (r, n), s the scaling. s B0 A0 has entries of standard deviation gain / sqrt(n),
those of a linear layer as PyTorch starts it, and the updates of both factors weigh the same. The paper has s
= 1/r, where the last factor is 1; here it makes that deviation the same for every s. The vectors are the
first r of the two pools of candidates from which the dynamics `switchlora` takes the next ones.

Deviation: the paper starts both W and B A at random, for pretraining; here the start is subtracted, so that a
trained model keeps its function. For a random W the two are alike, because W0 - s B0 A0 is random too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import init, near_base
from ..site import Factors, Site, derived_seed

GAIN = math.sqrt(1 / 3)


@init(
    "switchlora",
    gives="residual",
    title="SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information",
    year=2024,
    arxiv="2406.06564",
    formula="B ~ U(+-sqrt 3 std_B), A ~ U(+-sqrt 3 std_A), std(B A / r) = sqrt(1/3) / sqrt(in)",
    start=near_base(1e-5),
)
def switchlora(site: Site, rank: int, scaling: float) -> Factors:
    """Return the first candidates of both pools.

    Args:
        site: the weight.
        rank: number of candidates of each.
        scaling: the constant before the product.
    """
    up_std, down_std = deviations(site.shape, rank, scaling)
    key = site.path + site.block_name
    first = range(rank)
    up = candidates(site.seed, key, "up", first, site.shape[0], up_std).T
    down = candidates(site.seed, key, "down", first, site.shape[1], down_std)
    return Factors(up, down, "residual")


def deviations(shape: tuple[int, int], rank: int, scaling: float) -> tuple[float, float]:
    """Return the standard deviations of the entries of B (m, r) and of A (r, n).

    Example:
        >>> up, down = deviations((64, 64), 16, 1 / 16)
        >>> round((16 * up**2 * down**2) ** 0.5 / 16, 4), round(GAIN / 64**0.5, 4)
        (0.0722, 0.0722)
    """
    out, columns = shape
    common = math.sqrt(GAIN / (rank * abs(scaling)))
    up = (rank / math.sqrt(out * columns)) ** 0.25
    return common * up, common * (math.sqrt(out) * rank / columns**1.5) ** 0.25


def candidates(seed: int, key: str, side: str, numbers: Sequence[int], length: int, std: float) -> Tensor:
    """Return candidates of a pool, (k, length) in float32 on the CPU; each is drawn from its own seed.

    Args:
        seed: of the adapter.
        key: path of the weight.
        side: "up" for columns of B, "down" for rows of A.
        numbers: which ones, k of them.
        length: of a vector.
        std: standard deviation of its entries.
    """
    bound = math.sqrt(3) * std
    drawn = torch.empty(len(numbers), length)
    for row, number in zip(drawn, numbers, strict=True):
        generator = torch.Generator().manual_seed(derived_seed(seed, "switchlora", key, side, str(number)))
        row.uniform_(-bound, bound, generator=generator)
    return drawn
