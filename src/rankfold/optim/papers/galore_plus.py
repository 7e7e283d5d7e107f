"""GaLore+: GaLore with one head's basis for all heads, found by iteration, and Adam on a sparse rest.

    R = G Q,   Q (in, r) the leading right singular vectors of G_h, h a head drawn at every refresh
    D = scale adam(R) Q^T + scatter_I adam(E[I]),   E = G - R Q^T,   |I| = density out in

Liao et al. 2024. Rows of query and key weights are heads one below the other, of which one is enough for a
basis of their inputs; other weights are projected as GaLore does, on the shorter side. Both bases come from
randomised subspace iteration that starts from the last one. I, the entries with the largest |E|, is chosen
after every refresh and then fixed. r = 128 and density = 1e-2 are of the paper's sizes; lr, scale and T are
GaLore's. Start: the weights as they are; nothing is added to the model.

Deviations: there is no public code, and how the paper joins the two parts' moments is not certain; here each
has its own Adam and the directions are added. I is chosen by the first step's |E|, or by those of `warmup`
steps. A head of fewer than r rows lowers r to its rows. Fused projections have to be split first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ...errors import InvalidOption, InvalidRank
from ..bases import refresh
from ..inner import Adam
from ..matrices import State, Work, matrix_shape, named
from ..projected import ProjectedOptimizer
from ..projectors import CrossHead, Randomized
from ..recipes import groups, optimizer
from ..residuals import Sparse


class GaLorePlus(ProjectedOptimizer):
    """GaLore whose groups may say of how many heads their weights are; `galore_plus` makes it."""

    def _admit(self, index: int, group: dict[str, Any]) -> None:
        """Refuse what a group's heads cannot hold."""
        super()._admit(index, group)
        heads = group.get("heads", 1)
        for name, parameter in named(index, group) if heads > 1 else ():
            rows, _ = matrix_shape(parameter)
            if rows % heads or group["side"] != "right":
                raise InvalidOption(
                    f"{name}: {rows} rows are not {heads} heads of one size, projected with side='right'"
                )
            if group["rank"] > rows // heads:
                raise InvalidRank(
                    f"{name}: rank {group['rank']} is more than the {rows // heads} rows of a head"
                )

    def _refresh(self, work: Work, oriented: Tensor, state: State) -> None:
        projector = CrossHead(work.group.get("heads", 1), self.projector)
        refresh(projector, self.inner, work, oriented, state, self.staggered)


@optimizer(
    "galore+",
    title="GaLore+: Boosting Low-Rank Adaptation for LLMs with Cross-Head Projection",
    year=2024,
    arxiv="2412.19820",
    formula="D = scale adam(G Q) Q^T + scatter_I adam(E[I]), Q of one head's gradient, E = G - G Q Q^T",
)
def galore_plus(
    params: Any,
    lr: float = 0.01,
    *,
    rank: int = 128,
    refresh: int = 200,
    scale: float = 0.25,
    density: float = 1e-2,
    warmup: int = 1,
    heads: Mapping[str, int] | None = None,
    plain: tuple[str, ...] | None = None,
    **options: Any,
) -> GaLorePlus:
    """Return the optimizer.

    Args:
        params: a model, (name, parameter) pairs, parameters or groups (which may have `heads`).
        lr: learning rate.
        rank: r, of the projected gradients, which moments are kept for.
        refresh: T, steps between two bases.
        scale: of what comes back from the low rank.
        density: share of the entries that Adam moves beside, in [0, 1]; 0 drops the rest.
        warmup: steps after a refresh whose |E| choose them.
        heads: by words in the names of weights, how many heads their rows are; None asks the model's config,
            for queries and keys.
        plain: words in the names of weights that are not projected; None means the tables of a
            model's embeddings and heads, and names with "embed" or "lm_head" where no model is given.
        options: further ones of `ProjectedOptimizer`.

    Example:
        >>> import torch, rankfold as rf
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 16)})
        >>> optimizer = rf.optim.galore_plus(model, rank=4, heads={"q_proj": 2})
        >>> [(group["rank"], group.get("heads")) for group in optimizer.param_groups]
        [(4, 2), (None, None)]
    """
    if not 0 <= density <= 1 or warmup < 1:
        raise InvalidOption(
            f"galore+: density must be in [0, 1] and warmup at least 1, not {density} and {warmup}"
        )
    rest = Sparse(density, Adam(eps=1e-6), warmup) if density else "drop"
    given = {"projector": Randomized(), "inner": Adam(eps=1e-6), "residual": rest, **options}
    known = _heads_of(params) if heads is None else heads
    made = _by_heads(groups(params, rank, plain), known)
    return GaLorePlus(made, lr, rank=rank, refresh=refresh, scale=scale, **given)


def _heads_of(params: Any) -> dict[str, int]:
    """Return the heads of queries and keys that a model's config tells, by words in their names."""
    config = getattr(params, "config", None) if isinstance(params, nn.Module) else None
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return {}
    keys = getattr(config, "num_key_value_heads", None) or queries
    return {"q_proj": queries, ".query.": queries, "k_proj": keys, ".key.": keys}


def _by_heads(made: list[dict[str, Any]], heads: Mapping[str, int]) -> list[dict[str, Any]]:
    """Give projected weights whose names have one of the words groups of their own."""
    found: list[dict[str, Any]] = []
    for group in made:
        if group.get("rank") is None or not all(isinstance(pair, tuple) for pair in group["params"]):
            found.append(group)
            continue
        parts: dict[tuple[int, int], list[tuple[str, Tensor]]] = {}
        for name, parameter in group["params"]:
            count = next((heads[word] for word in heads if word in name), 1)
            rank = min(group["rank"], max(1, len(parameter) // count)) if count > 1 else group["rank"]
            parts.setdefault((count, rank), []).append((name, parameter))
        for (count, rank), pairs in parts.items():
            shared = {"heads": count, "side": "right"} if count > 1 else {}
            found.append({"params": pairs, "rank": rank, **shared})
    return found
