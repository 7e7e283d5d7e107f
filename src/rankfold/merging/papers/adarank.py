"""AdaRank: which singular components of every task survive is learned from unlabelled data.

    th_t - th_o = U_t diag(s_t) V_t^T                    of every matrix, all k = min(m, n) components
    p_t = sigmoid(a_t / temperature),   h_t = 1[p_t > 0.5]
    s'_t = h_t s_t, with the gradient of p_t s_t         (straight through)
    th* = th_o + sum_t l_t U_t diag(s'_t) V_t^T;         other tensors: th_o + sum_t l_t (th_t - th_o)
    min over a_t, l_t of  sum_t mean_x H(softmax f(x; th*)),   x unlabelled, of task t; H the entropy

Lee et al. 2025. There is a logit a for every component of every task and matrix, and a coefficient l for
every task and tensor; a component that is off has a gradient too and can come back. Every step builds th*
once and takes one batch of each task. The origin th_o is the base (task arithmetic) or the mean (CART).

Defaults are the paper's for eight vision tasks: a = 0.1 for the leading components that are on at the start
(all with the base, 1/T of them with the mean) and -0.1 for the others; l = 0.3 with the base, 2.3 with the
mean, times the model's weight; temperature 10; Adam without decay at 1e-3; 10,000 steps of 16 examples a
task. For text it takes 5e-5 and 5,000 steps. The result is that of the last step: the official program
picks the best by test accuracy, which unlabelled data cannot tell. Confident mistakes have no entropy
either: models that err often at the start can get worse, more so with masks than with coefficients alone;
keep some labelled examples to see.

The decompositions of all models are kept in memory. Heads of tasks, named by `heads`, are frozen: for a batch
of a task its own model's are used, and the merged model keeps the origin's, for a task's own to be put in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from ...errors import Incompatible, InvalidOption
from ...statistics.batches import Batch
from ...statistics.calibrating import Progress
from ...statistics.finite import NotFinite
from ..masked import Added, Masked, Start
from ..registry import merger
from ..sources import Sources
from ..spectra import EMBEDDINGS, has_spectrum
from ..unlabelled import entropy, logits_of, task_streams

_ORIGINS = ("base", "mean")


@merger(
    "adarank",
    title="AdaRank: Adaptive Rank Pruning for Enhanced Model Merging",
    year=2025,
    arxiv="2503.22178",
    code="david3684/AdaRank",
    formula="th0 + sum_t l_t U_t (h_t s_t) V_t^T, masks h and coefficients l of least entropy",
    base="optional",
    whole=True,
    example={"steps": 2},
)
def adarank(
    sources: Sources,
    *,
    origin: str = "base",
    fraction: float | None = None,
    coefficient: float | None = None,
    masks: bool = True,
    steps: int = 10_000,
    learning_rate: float = 1e-3,
    temperature: float = 10.0,
    margin: float = 0.1,
    heads: Sequence[str] = (),
    plain: Sequence[str] = EMBEDDINGS,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the merged model.

    Args:
        sources: the models, unlabelled batches for all tasks or for each, and the base, if it is the origin.
        origin: "base" or "mean".
        fraction: of each matrix's components, the leading ones, that are on at the start, in 0..1; None: all
            with the base, 1 / models with the mean.
        coefficient: of each task at the start, times its weight; None: 0.3 with the base, 2.3 with the mean.
        masks: learn them; false leaves them at their start and learns the coefficients alone.
        steps: of Adam; 0 gives the start.
        learning_rate: of all logits and coefficients.
        temperature: of the logits, above 0.
        margin: distance of the logits from 0 at the start, above 0.
        heads: patterns of names, with `*` and `?`, of the tensors that every task has of its own.
        plain: patterns of names of matrices that are merged without a mask.

    Raises:
        InvalidOption: an option is outside its range, or there are batches for another number of tasks.
        Incompatible: there are no batches, no live model can be made, the model gives no logits, or there is
            no base and it is the origin.
        NotFinite: the entropy is not finite.
    """
    _check(origin, fraction, steps, learning_rate, temperature, margin)
    usual = (1.0, 0.3) if origin == "base" else (1 / sources.count, 2.3)
    share = usual[0] if fraction is None else fraction
    rate = usual[1] if coefficient is None else coefficient
    start = Start(origin == "mean", share, rate, margin, temperature)
    own = [name for name in sources.names if any(fnmatch(name, pattern) for pattern in heads)]
    merged = {name: _merged(sources, name, start, plain) for name in sources.names if name not in own}
    if steps and merged:
        learn(sources, merged, own, masks=masks, steps=steps, learning_rate=learning_rate)
    for name in sources.names:
        yield name, start.origin(sources.parts(name)) if name in own else merged[name].tensor().detach()


def learn(
    sources: Sources,
    merged: Mapping[str, Masked | Added],
    heads: Sequence[str],
    *,
    masks: bool,
    steps: int,
    learning_rate: float,
) -> None:
    """Take the steps of Adam on the sum of the tasks' entropies, one batch of each a step.

    Args:
        sources: the models and the batches.
        merged: the tensors by name; what they are made of is changed in place.
        heads: names of the tensors that every task has of its own.
        masks: learn the logits, not the coefficients alone.
        steps: how many.
        learning_rate: of all.

    Raises:
        NotFinite: the entropy is not finite.
    """
    first = next(iter(merged.values())).origin
    model = _live(sources, merged, first.dtype)
    streams = task_streams(sources.data, sources.count, first.device)
    own = [{name: sources.read(task, name) for name in heads} for task in range(sources.count)]
    learned = [tensor.coefficients for tensor in merged.values()]
    learned += [tensor.logits for tensor in merged.values() if masks and isinstance(tensor, Masked)]
    optimizer = torch.optim.Adam(learned, lr=learning_rate)
    with closing(Progress(sources.progress, steps, "adarank")) as bar, torch.enable_grad():
        for step in range(1, steps + 1):
            shared = {name: tensor.tensor() for name, tensor in merged.items()}
            found = _entropies(model, [{**shared, **head} for head in own], streams)
            if not bool(found.isfinite().all()):
                raise NotFinite(f"adarank: the entropy at step {step} is {float(found.detach().sum()):g}")
            optimizer.zero_grad()
            torch.autograd.backward(found.sum(), inputs=learned)
            optimizer.step()
            bar.step()


def _entropies(
    model: nn.Module, tasks: Sequence[Mapping[str, Tensor]], streams: Sequence[Iterator[Batch]]
) -> Tensor:
    """Return the mean entropy (T,) of the model of each task on its next batch."""
    batches = [next(stream) for stream in streams]
    pairs = zip(tasks, batches, strict=True)
    return torch.stack([entropy(logits_of(model, own, batch), batch.mask) for own, batch in pairs])


def _merged(sources: Sources, name: str, start: Start, plain: Sequence[str]) -> Masked | Added:
    spectral = has_spectrum(name, sources.shape(name), plain)
    return (Masked if spectral else Added)(sources.parts(name), start)


def _live(sources: Sources, merged: Mapping[str, object], precision: torch.dtype) -> nn.Module:
    """Return the architecture in evaluation mode, in the precision in which its tensors are merged."""
    model = sources.module().eval().requires_grad_(False)
    known = model.state_dict()
    unknown = next((name for name in merged if name not in known), None)
    if unknown is not None:
        raise Incompatible(
            f"adarank runs the model, and {type(model).__name__} calls no tensor {unknown}, as the files do; "
            "pass modules instead of folders"
        )
    return model.to(precision)


def _check(
    origin: str,
    fraction: float | None,
    steps: int,
    learning_rate: float,
    temperature: float,
    margin: float,
) -> None:
    if origin not in _ORIGINS:
        raise InvalidOption(f"adarank: origin must be one of {', '.join(_ORIGINS)}, not {origin!r}")
    if fraction is not None and not 0 <= fraction <= 1:
        raise InvalidOption(f"adarank: fraction={fraction:g} must lie between 0 and 1")
    if steps < 0 or min(learning_rate, temperature, margin) <= 0:
        raise InvalidOption(
            f"adarank: steps={steps} must be 0 or more; learning_rate={learning_rate:g}, "
            f"temperature={temperature:g} and margin={margin:g} must be above 0"
        )
