"""Training a weight that is kept as its whole SVD, a few pairs of vectors at a time.

    p_i = (1/m + s_i / sum_j s_j) / 2

Zhao et al. 2024. All singular values train, and r pairs of vectors, drawn again and again with p.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..linalg import truncated_svd
from ..linalg.checks import exact_dtype, require_finite
from ..optim import reset
from ..optim import resize as resize_state
from ..weights import Sliced, Spectral, Sum, Weight
from .limits import in_range
from .rules import Dynamics
from .run import Run


@dataclass(kw_only=True)
class SpectralSampling(Dynamics):
    """Which pairs of singular vectors train, and what keeps an SVD an SVD.

    Args:
        interval: T3, steps between two drawings, at least 1.
        warmup: steps over which the rate of the vectors climbs after a drawing.
    """

    interval: int = 200
    warmup: int = 20

    def __post_init__(self) -> None:
        in_range("sst", "[1, inf)", interval=self.interval)
        in_range("sst", "[0, inf)", warmup=self.warmup)

    def gradients_ready(self, run: Run) -> None:
        """Remember where vectors stand whose rate is climbing."""
        share = (run.step % self.interval + 1) / max(1, self.warmup)
        if share < 1:
            for path, active, _ in trained_spectra(run):
                before = {"left": active.left.tensor().clone(), "right": active.right.tensor().clone()}
                run.memory(path).update(share=share, **before)

    def stepped(self, run: Run) -> None:
        """Shorten, clamp and normalise; draw other pairs, from a new SVD after a round."""
        for path, active, rest in trained_spectra(run):
            memory, share = run.memory(path), run.memory(path).pop("share", 1.0)
            for name, leaf, axis in (("left", active.left, 0), ("right", active.right, 1)):
                vectors = leaf.tensor()
                if name in memory:
                    vectors.copy_(memory.pop(name).to(vectors).lerp(vectors, share))
                vectors.copy_(nn.functional.normalize(vectors, dim=axis))
            _values(active).clamp_(min=0)
            done, left_over = divmod(run.step, self.interval)
            if not left_over:
                rounded = done % -(-min(active.shape) // active.left.shape[1]) == 0
                _draw_again(run, path, active, rest, decompose=rounded)


def trained_spectra(run: Run) -> Iterator[tuple[str, Spectral, Spectral]]:
    """Yield the path and both parts of every weight that nobody has frozen."""
    for path, weight in run.expressions.items():
        active, rest = spectra(weight)
        if active.left.trainable:
            yield path, active, rest


def spectra(weight: Weight) -> tuple[Spectral, Spectral]:
    """Return the pairs that train and those that do not."""
    assert isinstance(weight, Sum)
    active, rest = weight.terms
    assert isinstance(active, Spectral)
    assert isinstance(rest, Spectral)
    return active, rest


def _values(active: Spectral) -> Tensor:
    """Return all singular values (m,), those of the trained pairs first."""
    assert isinstance(active.core, Sliced)
    return active.core.inner.tensor()


def _draw_again(run: Run, path: str, active: Spectral, rest: Spectral, *, decompose: bool) -> None:
    """Let other pairs train; W stays what it is."""
    values = require_finite(_values(active), f"{path}: the vector of singular values")
    left = torch.cat([active.left.tensor(), rest.left.tensor()], 1)
    right = torch.cat([active.right.tensor(), rest.right.tensor()])
    follow = torch.arange(len(values), device=values.device)
    now = values.clone()
    if decompose:
        follow = values.argsort(descending=True, stable=True)
        wide = exact_dtype(values)
        left, now, right = truncated_svd(left.to(wide) * now @ right.to(wide), len(values))
    order = drawn_first(now, active.left.shape[1], run.generator(path))
    resize_state(run.optimizer, values, 0, follow[order])
    values.copy_(now[order])
    rank = active.left.shape[1]
    for part, chosen in ((active, order[:rank]), (rest, order[rank:])):
        part.left.tensor().copy_(left[:, chosen])
        part.right.tensor().copy_(right[chosen])
    for leaf in (active.left, active.right):
        drop_strange(run.optimizer, leaf.tensor())
        reset(run.optimizer, leaf.tensor())


def drop_strange(optimizer: Optimizer, parameter: Tensor) -> None:
    """Let an optimizer start anew with a parameter of which it keeps anything in another shape."""
    state = optimizer.state.get(parameter, {})
    shaped = [value for value in state.values() if isinstance(value, Tensor) and value.dim()]
    if any(value.shape != parameter.shape for value in shaped):
        state.clear()


def drawn_first(values: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return an order of all pairs whose first r are drawn by their singular values (m,)."""
    sizes = values.detach().double().cpu()
    shares = sizes / sizes.sum() if sizes.any() else torch.full_like(sizes, 1 / len(sizes))
    drawn = torch.multinomial((1 / len(sizes) + shares) / 2, rank, generator=generator).sort().values
    rest = torch.ones(len(sizes), dtype=torch.bool).index_fill(0, drawn, value=False)
    return torch.cat([drawn, rest.nonzero().flatten()]).to(values.device)
