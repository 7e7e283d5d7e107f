"""The space of points: every pair of axes, and whole points, either work from start to end or are refused.

A point that is accepted keeps its step-0 contract, lowers the loss on a real task while something happens to
it (a mask, a restart, a switch), can be saved in the middle and continued as if nothing had happened, folds
or says why not, and is taken away without a trace.
"""

from __future__ import annotations

import copy
import io
import json as text_source
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from battery import assert_start, inputs_at_hand
from hosts import TOKENS, Blocks, blocks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import Incompatible, NotDense, RankfoldError
from rankfold.methods import registry, space
from rankfold.methods.calibrate import UNNAMED
from rankfold.methods.recipe import Resolved, resolve, split_part
from rankfold.methods.registry import StepZero
from rankfold.weights import Moved

STEPS, HALF, RATE = 12, 6, 1e-2

# Options with which something happens within twelve steps, by axis and name.
SOON: dict[tuple[str, str], dict[str, Any]] = {
    ("ranks", "adalora"): {"interval": 2, "final": 0.2},
    ("ranks", "codyra"): {"dense": 0.2},
    ("ranks", "dora-dynamic"): {"interval": 2, "start": 0.1, "final": 0.3},
    ("ranks", "elalora"): {"interval": 2, "warmup": 0.0, "pool": 1, "final": 0.2},
    ("ranks", "increlora"): {"interval": 2, "warmup": 0.1, "final": 0.2},
    ("ranks", "prilora"): {"interval": 3},
    ("ranks", "lora-squeeze"): {"times": 2.0},
    ("ranks", "sora"): {"threshold": 0.005},
    # Its own scaling of 20 asks for a rate of 1e-3 at most.
    ("structure", "randlora"): {"alpha": 4.0},
    # Sixteen times this rate oversteps where the middle factor is the inverse of an arbitrary block (nlora).
    ("dynamics", "lora+"): {"ratio": 8.0},
    ("dynamics", "periodic-lora"): {"interval": 4},
    ("dynamics", "refactorisation"): {"interval": 3, "reset_interval": 6, "warmup": 1},
    ("dynamics", "relora"): {"interval": 4, "warmup": 1},
    ("dynamics", "switchlora"): {"interval": 4.0, "freeze": 2},
    ("structure", "sltrain"): {"alpha": None},  # allora is for products without a scaling
    ("structure", "lift"): {"refresh": 4, "filter_rank": 1},
    ("structure", "losia"): {"factor": 0.5, "interval": 2},
    ("structure", "losia-pro"): {"factor": 0.5, "interval": 2},
}
# Rules whose gates shrink a little with every step: within a dozen steps none that starts at one is closed.
SHRINKING = {"ard-lora", "codyra", "sora"}

# A real task ------------------------------------------------------------------------------------------


def _ids(text: str) -> list[int]:
    """Map characters to ids 2 to 9; 1 stands for a line's end, which invokes what waits for it."""
    groups = ("aeiou", "tnsrh", "ldcmfp", "gwybvkxjqz", " ", ".,;:'\"`-_", "0123456789")
    kinds = {character: number + 2 for number, group in enumerate(groups) for character in group}
    return [1 if c == "\n" else kinds.get(c.lower(), 9) for c in text]


@cache
def task(ahead: int) -> tuple[Tensor, Tensor]:
    """Return windows of a module's documentation, and for every token the kind of the one `ahead` of it."""
    ids = torch.tensor(_ids(text_source.__doc__ or ""))
    windows = ids.unfold(0, TOKENS + ahead, 3)
    windows = windows[(windows[:, :2] == 1).any(1) | (torch.arange(len(windows)) % 4 == 0)]
    wanted = torch.tensor([3, 3, 0, 1, 1, 1, 2, 3, 3, 3])
    return windows[:, :TOKENS].contiguous(), wanted[windows[:, ahead : TOKENS + ahead]]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


@cache
def _trained(gated: bool = False) -> Blocks:
    """Return a model that knows the next character's kind; points learn the one after it."""
    model = blocks(gated=gated).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(model, task(1)).backward()
        optimizer.step()
    return model.requires_grad_(True).eval()


def host(resolved: Resolved | None = None) -> Blocks:
    """Return a copy of the trained model; its feed-forward parts are gated modules where those are edited."""
    return copy.deepcopy(_trained(resolved is not None and resolved.targets == "gated-mlp"))


def batches() -> list[tuple[Tensor, Tensor]]:
    inputs, wanted = task(2)
    return [(inputs[i::4], wanted[i::4]) for i in range(4)]


# A point from start to end ----------------------------------------------------------------------------


def soon(recipe: rf.Recipe) -> rf.Recipe:
    """Return the recipe with options that let something happen within a dozen steps."""

    def part(axis: str, given: Any) -> Any:
        if given is None:
            return None
        name, options = split_part(given)
        return name, {**options, **SOON.get((axis, name), {})}

    return rf.Recipe(
        part("structure", recipe.structure),
        part("init", recipe.init),
        part("ranks", recipe.ranks),
        tuple(part("dynamics", d) for d in recipe.dynamics),
    )


def adapted(recipe: rf.Recipe) -> nn.Module:
    resolved = resolve(recipe, {})
    model, given = host(resolved), {}
    readers = [m for m in (resolved.structure, resolved.init, resolved.ranks) if m]
    needs = [need for m in readers for need in registry.needs_of(m, _options(resolved, m), 4)]
    if needs:
        sets = {(n if isinstance(n, str) else n[0]).partition("@")[2] for n in needs}
        named = {name or UNNAMED: batches() for name in sets}
        given = {"data": batches() if sets == {""} else named, "loss": loss_of}
    if resolved.init and resolved.init.traits["rate"]:
        given["lr"] = RATE
    multiple = resolved.structure.traits["multiple"](resolved.options)
    rank = None if resolved.structure.traits["rank"] is None else multiple * max(1, 2 // multiple)
    targets = resolved.structure.traits["targets"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights that a rank rule leaves out
        return rf.adapt(model, recipe, rank=rank, targets=targets, progress=False, **given)


def _options(resolved: Resolved, method: Any) -> dict[str, Any]:
    if method is resolved.structure:
        return resolved.options
    return resolved.init_options if method is resolved.init else resolved.ranks_options


class Training:
    """A bare training loop that can be stopped, saved and continued."""

    def __init__(self, model: nn.Module, state: Any = None) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(rf.param_groups(model, lr=RATE))
        if state is not None:
            self.optimizer.load_state_dict(state)
        self.handle = rf.attach(model, self.optimizer, total_steps=STEPS, validation=batches(), loss=loss_of)

    def run(self, steps: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(steps)  # a method that draws noise draws the same after it was continued
            for _ in range(steps):
                self.optimizer.zero_grad()
                loss_of(self.model, task(2)).backward()
                self.optimizer.step()

    def state(self) -> Any:
        """Return the optimizer's state as a file would hold it."""
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        return torch.load(file, weights_only=True)


def promised(resolved: Resolved) -> StepZero:
    methods = [resolved.structure, *([resolved.init] if resolved.init else [])]
    others = [m.start for m in methods if m.start.kind == "other"]
    return others[0] if others else max((m.start for m in methods), key=lambda start: start.tolerance)


@inputs_at_hand()
def check_point(recipe: rf.Recipe, folder: Path) -> None:
    """Take a point from its start to its end."""
    recipe = soon(recipe)
    resolved, inputs = resolve(recipe, {}), task(2)[0]
    base = host(resolved)(inputs)
    model = adapted(recipe)
    assert_start(promised(resolved), model(inputs), base)
    training = Training(model)
    first = loss_of(model, task(2)).item()
    training.run(HALF)
    rf.save(model, folder / "half", overwrite=True)
    state = training.state()
    training.run(STEPS - HALF)
    last = loss_of(model, task(2)).item()
    assert last < first, f"{first} -> {last}"
    check_events(model, resolved)
    continued = Training(rf.load(host(resolved), folder / "half"), state)
    continued.run(STEPS - HALF)
    training.handle.remove()
    continued.handle.remove()
    assert torch.equal(model.eval()(inputs), continued.model.eval()(inputs)), "continuing is not the same"
    check_ranks(model, resolved)
    check_end(model, inputs, base, folder)


def check_events(model: nn.Module, resolved: Resolved) -> None:
    """Something has happened to what is said to change: a gate, a rank, the stored weight."""
    adaptation = model.__dict__["_rankfold"]
    expressions = list(adaptation.expressions("default").values())
    if resolved.moves_base:
        moved = [leaf for e in expressions for leaf in e.leaves() if isinstance(leaf, Moved)]
        assert any(not torch.equal(leaf.value, leaf._holder[0].matrix()) for leaf in moved)
    if resolved.rule is not None:
        pairs = [pair for e in expressions for pair in e.pairs()]
        gates = [pair.gate.tensor() for pair in pairs if pair.gate is not None]
        ranks = adaptation.adapter().record["ranks"].values()
        closed = any(bool((gate == 0).any() or (gate == 1).all()) for gate in gates)
        resized = [pair.up.shape[1] for pair in pairs] != list(ranks)
        assert closed or resized or not gates or resolved.ranks.name in SHRINKING


def check_ranks(model: nn.Module, resolved: Resolved) -> None:
    """Every trained product has a rank that its weight can hold, and no gate is not a number."""
    adaptation = model.__dict__["_rankfold"]
    for expression in adaptation.expressions("default").values():
        for pair in expression.pairs():
            assert 0 < pair.up.shape[1] == pair.down.shape[0]
            assert pair.gate is None or bool(torch.isfinite(pair.gate.tensor()).all())


def check_end(model: nn.Module, inputs: Tensor, base: Tensor, folder: Path) -> None:
    """Folding and export give the same function or say why not, and removal leaves no trace."""
    with torch.no_grad():
        applied, folded = model(inputs), copy.deepcopy(model)
        scratch = model.__dict__["_rankfold"].scratch
        try:
            rf.fold(folded)
        except NotDense:
            with pytest.raises(RankfoldError):
                rf.export(model, folder / "peft", overwrite=True)
        else:
            torch.testing.assert_close(folded(inputs), applied, rtol=1e-4, atol=1e-4)
            rf.export(
                model, folder / "peft", overwrite=True, **({"format": "dense"} if scratch else {"rank": 4})
            )
        if scratch:
            return
        rf.remove(model)
        assert torch.equal(model(inputs), base)


# The named points -------------------------------------------------------------------------------------

NAMED = (
    "dora/pissa/adalora", "lora/lora-ga/lora+", "abba/ranks=eva", "gralora/pissa", "hra/prilora",
    "lora-xs/corda", "vera/lora+", "dora/init=eva/lora-pro", "lora/olora/sora/allora", "lora/relora",
)  # fmt: skip


@pytest.mark.parametrize("text", NAMED)
def test_a_named_point_works_from_start_to_end(text: str, tmp_path: Path) -> None:
    check_point(rf.parse_point(text), tmp_path)


# All pairs --------------------------------------------------------------------------------------------

PAIRS = list(space.pairs())


def _name(verdict: space.Verdict) -> str:
    return f"{verdict.first.axis}={verdict.first.name}, {verdict.second.axis}={verdict.second.name}"


@pytest.mark.parametrize("verdict", [v for v in PAIRS if not v.accepted], ids=_name)
def test_a_pair_that_is_refused_says_so_in_one_sentence_and_leaves_the_model_alone(verdict: Any) -> None:
    model = host()
    with pytest.raises(Incompatible) as refusal:
        rf.adapt(model, verdict.recipe, targets="all-linear")
    sentence = str(refusal.value)
    assert verdict.first.name in sentence or verdict.second.name in sentence
    assert "\n" not in sentence
    assert torch.equal(model(task(2)[0]), host()(task(2)[0]))


SAMPLE = 40  # of the accepted pairs run by default; the others are marked slow
ACCEPTED = [v for v in PAIRS if v.accepted]
_chosen = set(torch.randperm(len(ACCEPTED), generator=torch.Generator().manual_seed(0))[:SAMPLE].tolist())


@pytest.mark.parametrize(
    "verdict",
    [
        pytest.param(v, id=_name(v), marks=[] if i in _chosen else [pytest.mark.slow])
        for i, v in enumerate(ACCEPTED)
    ],
)
def test_a_pair_that_is_accepted_works_from_start_to_end(verdict: Any, tmp_path: Path) -> None:
    check_point(verdict.recipe, tmp_path)


# Whole points -----------------------------------------------------------------------------------------


def _one_of(axis: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *rf.methods(axis)])


whole_points = st.tuples(
    st.sampled_from(space.parts_on("structure")), _one_of("init"), _one_of("ranks"), _one_of("dynamics"),
    _one_of("dynamics"),
)  # fmt: skip


def _check_whole(parts: tuple[Any, ...], folder: Path) -> None:
    recipe = space.point([method for method in parts if method is not None])
    reason = space.refusal(soon(recipe))
    if not reason:
        check_point(recipe, folder)
    assert "\n" not in reason


_quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=_quiet)
@given(parts=whole_points)
def test_any_point_works_or_is_refused(parts: tuple[Any, ...], tmp_path: Path) -> None:
    _check_whole(parts, tmp_path)


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=_quiet)
@given(parts=whole_points)
def test_many_points_work_or_are_refused(parts: tuple[Any, ...], tmp_path: Path) -> None:
    _check_whole(parts, tmp_path)
