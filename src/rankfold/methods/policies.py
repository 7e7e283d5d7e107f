"""How routers make gates of what a layer reads: a softmax over experts, or a draw among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import Incompatible
from ..weights import Router
from .routing import log_probability


@dataclass(frozen=True)
class Softmax:
    """Mixes experts by a softmax of the router's logits.

    Args:
        top_k: how many are kept, or None for all.
        balance: weight of the balance loss.
    """

    top_k: int | None
    balance: float

    def __call__(self, router: Router, x: Tensor) -> Tensor:
        """Return the gates of x (batch, ..., in), (batch, ..., expert)."""
        shares = router.logits(x).softmax(-1)
        if self.balance and router.training:
            self._leave(router, shares, x)
        if self.top_k is None:
            return shares
        kept = shares.topk(self.top_k, -1)
        return torch.zeros_like(shares).scatter(-1, kept.indices, kept.values / kept.values.sum(-1, True))

    def _leave(self, router: Router, shares: Tensor, x: Tensor) -> None:
        if not torch.is_grad_enabled():
            if router.gates.recording:
                raise Incompatible(
                    f"{router.layer_name}: a mixture's balance loss gets no gradient under reentrant "
                    "checkpointing; checkpoint with use_reentrant=False, or set balance=0"
                )
            return
        counted = router.counted(x)[..., None]
        count, experts = counted.sum().clamp_min(1), shares.shape[-1]
        first = torch.nn.functional.one_hot(shares.argmax(-1), experts) * counted
        frequency, mean = (part.flatten(0, -2).sum(0) / count for part in (first, shares * counted))
        loss = self.balance * experts * (frequency * mean).sum()
        router.gates.collect(router.place, lambda: loss)


@dataclass(frozen=True)
class Drawn:
    """Draws k experts in training and takes the top k otherwise; `per` is "sequence" or "token".

    Args:
        top_k: k.
        per: what draws its own.
        weight: the gate of every chosen expert; None for 1 / k.
    """

    top_k: int
    per: str
    weight: float | None = None
    draws: ClassVar[bool] = True

    @torch.no_grad()
    def __call__(self, router: Router, x: Tensor) -> Tensor:
        """Return the gates, the weight at the chosen experts and 0 elsewhere."""
        read = self._read(router, x)
        chosen = self._chosen(router, router.logits(read))
        if router.training:
            counted = router.counted(read) if self.per == "token" else 1.0
            router.gates.draw(
                router.place,
                lambda: (log_probability(router.logits(read), chosen) * counted).flatten(1).sum(1),
            )
        gates = torch.zeros(*read.shape[:-1], router.shape[0], device=x.device)
        gates.scatter_(-1, chosen, 1 / self.top_k if self.weight is None else self.weight)
        places = x.shape[1:-1] if self.per == "token" else [1] * (x.dim() - 2)
        return gates.reshape(x.shape[0], *places, -1)

    def _read(self, router: Router, x: Tensor) -> Tensor:
        """Return x (batch, token, in), or its mean over the prompt, (batch, 1, in)."""
        x = x.detach().reshape(x.shape[0], -1, x.shape[-1])
        if self.per == "token":
            return x
        counted = router.counted(x)[..., None].to(x.dtype)
        return (x * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)

    def _chosen(self, router: Router, logits: Tensor) -> Tensor:
        if router.training:
            noise = -torch.empty_like(logits).exponential_().log()  # Gumbel: the k largest are such a draw
            return (logits + noise).topk(self.top_k, -1).indices
        kept, name = router.gates.kept, router.place
        if self.per != "token" and router.gates.past and name not in kept:
            raise Incompatible(
                f"{router.layer_name}: remix does not know which experts the prompt in this key-value cache "
                "was given; pass a cache that this adapter has filled, or none, or adapt with per='token'"
            )
        if self.per == "token" or not router.gates.past:
            kept[name] = logits.topk(self.top_k, -1).indices
        chosen: Tensor = kept[name]
        return chosen
