"""Matryoshka: an embedding of which every prefix of a list of lengths is an embedding itself.

    L = sum_{m in M} c_m CE(W^(m) z_{1:m}, y),   z = F(x) in R^d,   M = {m_1 < ... < m_k = d},   c_m = 1

Kusupati et al. 2022 (MRL). F is any encoder. Every prefix has a head of its own, W^(m) in R^{C x m}, or all
read one, W^(m) = W[:, :m] with one bias (MRL-E, `efficient`). M halves d down to 8, as the paper's does for
2048. Heads start as `nn.Linear` does. The loss is a sum, so its size grows with k: tune the learning rate
again. For losses of embeddings, such as contrastive ones, `nested_loss` sums the same way over prefixes,
which are divided by their length there; after a cut, divide by the length again before comparing. Start: as
the encoder's, and a head's.

Deviations: none in the loss; M is here for any d.

Use it where embeddings are stored or compared in several lengths, one training serving all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ...catalogue import not_base, register
from ...errors import InvalidOption
from ..nested import checked_nesting, nested_sizes


@register(
    "pretrain",
    "matryoshka",
    title="Matryoshka Representation Learning",
    year=2022,
    arxiv="2205.13147",
    code="RAIVNLab/MRL",
    formula="L = sum_{m in M} c_m CE(W^(m) z_{1:m}, y)",
    start=not_base("that of the encoder and of heads that start as any linear layer's"),
    traits={
        "cost": "In training one small product for every prefix, and C numbers per entry of all prefixes "
        "together (C d if efficient); none where embeddings are used."
    },
)
class MatryoshkaHead(nn.Module):
    """One classification head for every prefix of an embedding.

    Args:
        width: d, entries of the embedding.
        classes: C.
        nesting: M, ascending lengths that end with the width; None halves the width down to 8.
        efficient: all prefixes read one head, W^(m) = W[:, :m], instead of one each.
        bias: heads have a bias; an efficient one has one for all prefixes.

    Raises:
        InvalidOption: the lengths do not ascend to the width.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8), rf.MatryoshkaHead(8, 3, nesting=(2, 8)))
        >>> logits = model(torch.ones(5, 16))
        >>> rf.matryoshka_loss(logits, torch.zeros(5, dtype=torch.long)).backward()
        >>> [tuple(each.shape) for each in logits]
        [(5, 3), (5, 3)]
    """

    def __init__(
        self,
        width: int,
        classes: int,
        *,
        nesting: Sequence[int] | None = None,
        efficient: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.nesting = checked_nesting(nested_sizes(width) if nesting is None else nesting, width)
        sizes = [width] if efficient else self.nesting
        self.heads = nn.ModuleList(nn.Linear(size, classes, bias=bias) for size in sizes)

    def forward(self, embedding: Tensor) -> list[Tensor]:
        """Return the logits of every prefix, (..., C) each, of an embedding (..., d).

        Raises:
            InvalidOption: the embedding is not d wide.
        """
        width = self.nesting[-1]
        if embedding.shape[-1] != width:
            raise InvalidOption(f"matryoshka: the embedding must be {width} wide, not {embedding.shape[-1]}")
        prefixes = [embedding[..., :m] for m in self.nesting]
        if len(self.heads) == len(prefixes):
            return [head(z) for head, z in zip(self.heads, prefixes, strict=True)]
        return [_first_columns(self.heads[0], z, width) for z in prefixes]


def _first_columns(head: nn.Module, prefix: Tensor, width: int) -> Tensor:
    """Return W[:, :m] z + b; a head that is adapted is given the prefix with zeros after it instead."""
    if isinstance(head, nn.Linear):
        return F.linear(prefix, head.weight[:, : prefix.shape[-1]], head.bias)
    logits: Tensor = head(F.pad(prefix, (0, width - prefix.shape[-1])))
    return logits
