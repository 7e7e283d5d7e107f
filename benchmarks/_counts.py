"""Multiply-adds of one training step, counted: the frozen model's, and a method's own at its cheapest order.

Every product has two orders. Applied: the factors meet the activations. Formed: the weight is formed before
forward and again before backward, so that forward and the gradient to the inputs cost nothing more, and the
factors meet the activations for their own gradients only. Nothing of the size of a weight is kept in between.
"""

from collections.abc import Callable, Iterable

import torch
from _llama import Size
from torch.utils.flop_counter import FlopCounterMode

from rankfold.weights import Base, Sum, Weight

Own = Callable[[int, int, int, int], int]


def shapes(size: Size) -> list[tuple[int, int]]:
    """Return (out, in) of every adapted weight of one layer."""
    h, m = size.hidden, size.intermediate
    return [(h, h)] * 4 + [(m, h)] * 2 + [(h, m)]


def floor(size: Size) -> int:
    """Return forward and gradients to the inputs: linear layers and head twice, attention thrice."""
    linear = size.layers * sum(out * columns for out, columns in shapes(size)) + size.hidden * size.vocabulary
    attention = 2 * size.layers * size.length * size.hidden
    return size.tokens * (2 * linear + 3 * attention)


def lora(tokens: int, out: int, columns: int, rank: int) -> int:
    """Apply in forward, to the gradient, and twice for the factors' gradients; or only the latter."""
    applied, formed = tokens * rank * (out + columns), rank * out * columns
    return min(3 * applied, 2 * applied + 2 * formed)


def dora(tokens: int, out: int, columns: int, rank: int) -> int:
    """As lora, with row norms, scaling, and the gradient of the magnitude read off the output."""
    applied, formed = tokens * rank * (out + columns), rank * out * columns
    norms = out * columns
    return min(
        3 * applied + formed + norms + 3 * tokens * out, 2 * applied + 2 * (formed + 2 * norms) + tokens * out
    )


def hira(tokens: int, out: int, columns: int, rank: int) -> int:
    """Form twice; the gradient of the whole matrix, modulated, then of its two factors."""
    return tokens * out * columns + 4 * rank * out * columns + 3 * out * columns


def gralora(tokens: int, out: int, columns: int, rank: int, blocks: int = 2) -> int:
    """As lora; forming a block takes its own rank only."""
    applied, formed = tokens * rank * (out + columns), rank // blocks * out * columns
    return min(3 * applied, 2 * applied + 2 * formed)


def vera(tokens: int, out: int, columns: int, rank: int) -> int:
    """As lora with a frozen down factor: only `up`'s gradient is formed, both diagonals are read off it."""
    applied, formed = tokens * rank * (out + columns), rank * out * columns
    return min(2 * applied + tokens * rank * out, applied + 2 * formed) + 4 * rank * out


def hra(tokens: int, out: int, columns: int, rank: int) -> int:
    """Reflect the inputs and their gradient; or as lora with up = -W0 V T and its gradient."""
    reflected = 6 * tokens * rank * columns + 2 * tokens * rank * rank
    return min(reflected, lora(tokens, out, columns, rank) + 2 * rank * out * columns)


OWN: dict[str, Own] = {"lora": lora, "dora": dora, "hira": hira, "gralora": gralora, "vera": vera, "hra": hra}


def expression(weight: Weight, tokens: int) -> int:
    """Return the least that an expression costs beside its base, by the orders that any expression has.

    Every factor applied in forward, to the gradient, and once more for its own gradient; the matrix formed,
    and formed again, with a gradient of its size that goes back through the forming; the change as one pair
    of factors, where it is of small rank; and what evaluation really does, counted as it runs.
    """
    out, columns = weight.shape
    plain = tokens * out * columns
    orders = [plain + 4 * weight.dense_macs(), _counted(weight, tokens) - 2 * plain]
    own = weight.macs(tokens) - plain
    if own > weight.macs(0):  # some of it depends on the tokens, so it is not only a matrix that is formed
        orders.append(3 * own)
    if isinstance(weight, Sum):
        ranks = [term.small_rank() for term in weight.terms if not isinstance(term, Base)]
        orders += [lora(tokens, out, columns, sum(map(int, filter(None, ranks))))] * all(ranks)
    return max(0, min(orders))


def _counted(weight: Weight, tokens: int) -> int:
    x = torch.randn(tokens, weight.shape[1], requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        weight(x).sum().backward()
    weight.zero_grad()
    return int(counter.get_total_flops()) // 2


def bound(method: str, rank: int | None, size: Size, weights: Iterable[Weight]) -> float:
    """Return (floor + the method's own multiply-adds) / floor.

    Args:
        method: of the catalogue.
        rank: what it was given.
        size: of the model.
        weights: the expressions of one layer.
    """
    total = 0
    for weight in weights:
        orders = [expression(weight, size.tokens)]
        if method in OWN and rank is not None:
            out, columns = weight.shape
            orders.append(OWN[method](size.tokens, out, columns, rank))
        total += min(orders)
    return 1 + size.layers * total / floor(size)
