"""SwitchLoRA: at every step a few vectors of the factors are exchanged, W absorbing the difference.

    W += s b_i (a_i - c)^T,   a_i <- c      b_i is frozen for N steps, its moments and its step count are 0
    W += s (b_i - d) a_i^T,   b_i <- d      and the same for a_i
    about r rho_t / I_0 of each a step,   rho_t = 0.3^((t + 1) / t_d),   t_d = ratio * total_steps

Zhou et al. 2024. b_i are the columns of B (m, r), a_i the rows of A (r, n), c and d random candidates from
two pools of min(m, n) vectors, those in use left out. A switch comes after backward and before the step: the
partner's gradient refers to the vector that went and is set to zero. The number of switches is r rho_t / I_0
rounded up or down at random. Positions are taken in turn, from 0 for rows and from r / 2 for columns; where
the next one is still frozen on either side, the rest of a step's switches is left out. I_0 = 40, N = 5 and
ratio = 0.1 are the paper's; a rank of 128 to 512, alpha = 1 and a rate of 0.02 with Adam too. Start: its own
initialiser's (`init=switchlora`), which keeps the base; a switch does not change the model's function.

Candidates are drawn from seeds when they are needed, so that the pools, as large as twice the weight, are
never stored. That is the official code's default, where the vector that goes is dropped; with `exchange` it
is put in its own place in the pool, as the paper describes, and the optimizer's state then grows up to the
size of the pools. A weight whose rank is min(m, n) has no candidate to spare and is left as it is.

PyTorch's optimizers count the steps of a whole factor. Under Adam and AdamW the step of a vector that began
again is therefore taken with its own count: the difference between the two bias corrections is added after
the optimizer's step. Other optimizers have their moments set to zero and nothing else.

Deviations: the weight that moves is a copy in float32 or better; frozen vectors do not move under weight
decay either; public code freezes their gradient only.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...optim import adam_options, reset
from ..inits.switchlora import candidates, deviations
from ..limits import in_range
from ..registry import dynamics
from ..rules import Dynamics
from ..run import Run, TrainedPair

_OTHER = {"up": "down", "down": "up"}
_AXIS = {"up": 1, "down": 0}


@dynamics(
    "switchlora",
    needs=("total_steps",),
    pairs="terms",
    moves_base=True,
    gates=False,
    excludes=(
        "relora",
        "periodic-lora",
        "refactorisation",
        "shrink-perturb",
        "shrink-perturb-all",
        "lora-pro",
        "loft",
    ),
    init=("switchlora", {}),
    title="SwitchLoRA: Switched Low-Rank Adaptation Can Learn Full-Rank Information",
    year=2024,
    arxiv="2406.06564",
    formula="W += s b_i (a_i - c)^T, a_i <- c, b_i frozen for N steps, its moments reset; likewise for b_i",
)
@dataclass(kw_only=True)
class SwitchLoRA(Dynamics):
    """Switches.

    Args:
        interval: I_0, steps until every vector has been switched once at the initial frequency, positive.
        ratio: share of the training after which the frequency has fallen to 0.3 of that, positive.
        freeze: N, steps for which a switched vector's partner does not move, this one included, at least 1.
        exchange: put the vector that goes into the pool.
    """

    interval: float = 40.0
    ratio: float = 0.1
    freeze: int = 5
    exchange: bool = False

    def __post_init__(self) -> None:
        in_range("switchlora", "(0, inf)", interval=self.interval, ratio=self.ratio)
        in_range("switchlora", "[1, inf)", freeze=self.freeze)

    def begin(self, run: Run) -> None:
        """Find out which candidates are in use, and point to the first vectors."""
        for pair in run.pairs:
            memory = run.memory(pair.key)
            rank = pair.rank
            for side in ("up", "down"):
                memory[side] = {
                    "next": 0 if side == "down" else rank // 2,
                    "installed": _installed(run, pair, side),
                    "frozen": torch.zeros(rank, dtype=torch.long),  # steps for which it does not move yet
                    "age": torch.full((rank,), -1),  # steps since it began again; -1: it never did
                    "pool": {},
                }

    def gradients_ready(self, run: Run) -> None:
        """Switch, and take the gradients of frozen vectors away."""
        for pair in run.pairs:
            generator = run.generator(pair.key)
            for side in ("down", "up"):
                for _ in range(self.count(run, pair.rank, generator)):
                    if not self.switch_next(run, pair, side, generator):
                        break
            self.hold(run, pair)

    def count(self, run: Run, rank: int, generator: torch.Generator) -> int:
        """Draw how many vectors of one factor are switched at this step."""
        assert run.total_steps is not None
        share = math.pow(0.3, (run.step + 1) / (self.ratio * run.total_steps))
        expected = rank * share / self.interval
        whole = math.floor(expected)
        return whole + int(torch.rand((), generator=generator) < expected - whole)

    def switch_next(self, run: Run, pair: TrainedPair, side: str, generator: torch.Generator) -> bool:
        """Switch the vector that is next in turn; say whether that was possible."""
        memory = run.memory(pair.key)
        own, partner = memory[side], memory[_OTHER[side]]
        index = own["next"]
        free = _free(own["installed"], min(pair.up.shape[0], pair.down.shape[1]))
        if own["frozen"][index] > 0 or partner["frozen"][index] > 0 or not len(free):
            return False
        chosen = int(free[torch.randint(len(free), (), generator=generator)])
        incoming = _candidate(run, pair, side, chosen)
        outgoing = switch(pair, side, index, incoming)
        if self.exchange and own["installed"][index] >= 0:
            own["pool"][str(int(own["installed"][index]))] = outgoing
        own["installed"][index] = chosen
        own["next"] = (index + 1) % pair.rank
        partner["frozen"][index], partner["age"][index] = self.freeze, 0
        forget(run, pair, _OTHER[side], index)
        return True

    def hold(self, run: Run, pair: TrainedPair) -> None:
        """Remember the frozen vectors during the step, which sees no gradient of them."""
        for side in ("up", "down"):
            own, factor = run.memory(pair.key)[side], _factor(pair, side)
            frozen = own["frozen"].nonzero().flatten().to(factor.device)
            if len(frozen):
                own["held"] = factor.index_select(_AXIS[side], frozen)
                if factor.grad is not None:
                    factor.grad.index_fill_(_AXIS[side], frozen, 0)

    def stepped(self, run: Run) -> None:
        """Put frozen vectors back, correct the step of those that began again, and let time pass."""
        for pair in run.pairs:
            for side in ("up", "down"):
                own, factor = run.memory(pair.key)[side], _factor(pair, side)
                frozen = own["frozen"].nonzero().flatten()
                if "held" in own:
                    factor.index_copy_(_AXIS[side], frozen.to(factor.device), own.pop("held"))
                    reset(run.optimizer, factor, frozen, _AXIS[side])
                moving = (own["frozen"] == 0) & (own["age"] >= 0)
                own["age"] = own["age"] + moving.long()
                if bool(moving.any()) and factor.grad is not None:
                    correct(run, factor, _AXIS[side], moving.nonzero().flatten(), own["age"][moving])
                own["frozen"] = (own["frozen"] - 1).clamp_min(0)


def switch(pair: TrainedPair, side: str, index: int, incoming: Tensor) -> Tensor:
    """Exchange a column of B ("up") or a row of A ("down") and return it; W absorbs the difference."""
    factor = _factor(pair, side)
    incoming = incoming.to(factor)
    outgoing = factor.select(_AXIS[side], index).clone()
    difference, partner = outgoing - incoming, _factor(pair, _OTHER[side]).select(_AXIS[_OTHER[side]], index)
    ends = (partner, difference) if side == "down" else (difference, partner)
    pair.move_into_base(pair.scale * torch.outer(*ends))
    factor.select(_AXIS[side], index).copy_(incoming)
    return outgoing


def forget(run: Run, pair: TrainedPair, side: str, index: int) -> None:
    """Set the moments and the waiting gradient of one vector to zero."""
    factor = _factor(pair, side)
    reset(run.optimizer, factor, torch.tensor([index]), _AXIS[side])
    if factor.grad is not None:
        factor.grad.select(_AXIS[side], index).zero_()


def correct(run: Run, factor: Tensor, axis: int, index: Tensor, ages: Tensor) -> None:
    """Add what Adam's step of some vectors lacks because it was corrected for the steps of the whole factor.

        step(t) = -lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps);   factor += step(age) - step(count)

    Args:
        run: the training.
        factor: of which Adam has just taken a step.
        axis: of its vectors.
        index: which vectors, k of them.
        ages: the steps that each has taken itself, this one included, (k,).
    """
    options, state = adam_options(run.optimizer, factor), run.optimizer.state.get(factor, {})
    if options is None or "exp_avg" not in state:
        return
    index = index.to(factor.device)
    first = state["exp_avg"].index_select(axis, index)
    second = state.get("max_exp_avg_sq", state["exp_avg_sq"]).index_select(axis, index)
    shape = (1, -1) if axis == 1 else (-1, 1)
    own = _adam(options, first, second, ages.view(shape).to(factor.device, torch.float64))
    common = _adam(options, first, second, torch.as_tensor(state["step"]).to(factor.device, torch.float64))
    factor.index_add_(axis, index, (own - common).to(factor))


def _adam(options: dict[str, Any], first: Tensor, second: Tensor, steps: Tensor) -> Tensor:
    (beta, second_beta), rate = options["betas"], float(options["lr"])
    mean = first.double() / (1 - beta**steps)
    size = (second.double() / (1 - second_beta**steps)).sqrt() + options["eps"]
    step: Tensor = (rate if options["maximize"] else -rate) * mean / size
    return step


def _factor(pair: TrainedPair, side: str) -> Tensor:
    return pair.up if side == "up" else pair.down


def _candidates(run: Run, pair: TrainedPair, side: str, numbers: list[int]) -> Tensor:
    shape = (pair.up.shape[0], pair.down.shape[1])
    stds = dict(zip(("up", "down"), deviations(shape, pair.rank, pair.scale), strict=True))
    length = shape[0] if side == "up" else shape[1]
    return candidates(run.seed, pair.path, side, numbers, length, stds[side])


def _candidate(run: Run, pair: TrainedPair, side: str, number: int) -> Tensor:
    kept: Tensor | None = run.memory(pair.key)[side]["pool"].get(str(number))
    return _candidates(run, pair, side, [number])[0] if kept is None else kept


def _installed(run: Run, pair: TrainedPair, side: str) -> Tensor:
    """Return which candidate every vector is, or -1 where it is none, because it started otherwise."""
    factor = _factor(pair, side)
    vectors = factor.detach().movedim(_AXIS[side], 0)
    own = _candidates(run, pair, side, list(range(pair.rank))).to(factor)
    return torch.where((vectors == own).all(1), torch.arange(pair.rank, device=own.device), -1).cpu()


def _free(installed: Tensor, size: int) -> Tensor:
    mask = torch.ones(size, dtype=torch.bool)
    mask[installed[installed >= 0]] = False
    return mask.nonzero().flatten()
