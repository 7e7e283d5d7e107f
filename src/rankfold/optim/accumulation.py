"""Gradients of micro batches, added up as a random projection instead of in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import Incompatible, InvalidRank
from .matrices import floating, is_left, matrix_shape, named
from .seeds import hashed


def gaussian(like: Tensor, rank: int, *seeds: object) -> Tensor:
    """Return A (rank, d) for gradients like (d, n): normal numbers of variance 1 / rank, drawn on the CPU.

    Example:
        >>> gaussian(torch.zeros(6, 9), 4, 0, "weight").shape
        torch.Size([4, 6])
    """
    generator = torch.Generator().manual_seed(hashed("gaussian", *seeds))
    drawn: Tensor = torch.randn(rank, len(like), generator=generator) / rank**0.5
    return drawn.to(like)


class CompressedAccumulation:
    """Keeps the sum of gradients between two steps of any optimizer as C, at a fraction of its size (Flora).

        C <- C + A G   after every backward,      G^ = A^T C   before the step, which empties C

    A (r, d) has normal entries of variance 1 / r and d is the shorter side, so that G^ is the sum of the
    gradients in the mean, with an error of (d + 1) / r times its squared norm. A is drawn anew for every
    step, from the seed, the weight's name and the number of the step, and is not stored. A gradient is
    compressed and freed as soon as it is there, so that one is alive at a time. Parameters that are vectors
    or whose shorter side is at most r are added up as usual. Steps with a closure are not served: their
    gradients come after C was read.

    Args:
        optimizer: steps on what `restore` puts back, which it calls by itself before its step. Whoever looks
            at gradients before, to clip or to unscale them, calls `restore` first.
        rank: r.
        seed: of A.

    Raises:
        InvalidRank: the rank is not positive.

    Example:
        >>> layer = nn.Linear(64, 32)
        >>> optimizer = torch.optim.AdamW(layer.named_parameters())
        >>> accumulation = CompressedAccumulation(optimizer, rank=8)
        >>> for _ in range(4):
        ...     layer(torch.ones(2, 64)).sum().backward()
        >>> layer.weight.grad, accumulation.state_dict()["sums"]["weight"].shape
        (None, torch.Size([8, 64]))
        >>> optimizer.step()
    """

    def __init__(self, optimizer: Optimizer, rank: int, *, seed: int = 0) -> None:
        if rank < 1:
            raise InvalidRank(f"the rank of compressed gradients must be at least 1, not {rank}")
        self.rank, self.seed, self._round = rank, seed, 0
        self._sums: dict[str, Tensor] = {}
        pairs = [pair for at, group in enumerate(optimizer.param_groups) for pair in named(at, group)]
        self._parameters = {name: p for name, p in pairs if p.requires_grad and _gains(p, rank)}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(self._compressor(name))
            for name, parameter in self._parameters.items()
        ]
        self._handles.append(optimizer.register_step_pre_hook(lambda *_: self.restore()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the gradients A^T C in place, and begin another sum with another A."""
        for name, kept in self._sums.items():
            parameter = self._parameters[name]
            left, matrix = is_left(_AUTO, matrix_shape(parameter)), parameter.reshape(len(parameter), -1)
            found = self._basis(name, matrix if left else matrix.T, kept).T @ kept
            parameter.grad = (found if left else found.T).reshape(parameter.shape).to(parameter.dtype)
        self._round += bool(self._sums)
        self._sums = {}

    def remove(self) -> None:
        """Let gradients be added up in full again; a sum that was begun is put in place."""
        self.restore()
        for handle in self._handles:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the step and the sums so far, tensors (r, n) by the parameters' names."""
        return {"round": self._round, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a sum.

        Raises:
            Incompatible: the sums are of other parameters or of another rank.
        """
        for name, kept in state["sums"].items():
            known = self._parameters.get(name)
            if known is None or kept.shape != (self.rank, max(matrix_shape(known))):
                raise Incompatible(f"no parameter here has sums of gradients {tuple(kept.shape)} as {name}")
        self._round = int(state["round"])
        self._sums = {n: kept.clone().to(self._parameters[n].device) for n, kept in state["sums"].items()}

    def _compressor(self, name: str) -> Any:
        @torch.no_grad()
        def compress(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = floating(parameter.grad)
            matrix = gradient.reshape(len(gradient), -1)
            oriented = matrix if is_left(_AUTO, matrix_shape(parameter)) else matrix.T
            kept = self._sums.setdefault(name, oriented.new_zeros(self.rank, oriented.shape[1]))
            kept.addmm_(self._basis(name, oriented, kept), oriented)
            parameter.grad = None

        return compress

    def _basis(self, name: str, oriented: Tensor, kept: Tensor) -> Tensor:
        return gaussian(oriented, self.rank, self.seed, name, self._round).to(kept)


_AUTO = {"side": "auto"}


def _gains(parameter: nn.Parameter, rank: int) -> bool:
    return parameter.dim() > 1 and min(matrix_shape(parameter)) > rank
