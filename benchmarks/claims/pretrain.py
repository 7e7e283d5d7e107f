"""Claims about pretraining in little memory: a small Llama on the sources of Python's standard library.

python benchmarks/claims/pretrain.py [--runs DIR] [--scale 1.0] [--arms NAME ...] [--report-only]

Every arm trains the 1M model of the ladder on 0.5M tokens (times --scale): three learning rates on one seed,
the best of them by held-out loss, extended while it is at the grid's edge, then three other seeds with the
same batches for all arms. Printed are held-out loss and the bytes of weights, gradients and optimizer state,
counted on the tensors; a picture goes beside the results. A run that is done is kept in --runs and not
repeated.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _claim import RESULTS, Claim, Interval, Runs, below_zero, interval
from torch import Tensor, nn

import rankfold as rf
from rankfold.errors import InvalidOption
from rankfold.pretrain.ladder import LADDER
from rankfold.pretrain.memory import gradient_bytes, state_bytes, weight_bytes
from rankfold.pretrain.optimizers import adamw, named_optimizer
from rankfold.pretrain.text import read_corpus
from rankfold.pretrain.tokens import train_tokenizer
from rankfold.training.packed import Packed, pack

SIZE, TOKENS, LENGTH, BATCH = "1M", 500_000, 128, 8
WARMUP, FLOOR, CLIP, HELD_OUT_BLOCKS = 0.1, 0.1, 1.0, 256
TUNING_SEED, SEEDS = 0, (1, 2, 3)
RANK = LADDER[SIZE].hidden // 4  # the ratio of the papers' runs
STEP = 10**0.5  # between two learning rates of the grid


@dataclass(frozen=True)
class Arm:
    """A way to train.

    Attributes:
        optimizer: by name.
        options: of the optimizer.
        structure: a point, or "" for the weights as they are.
        settings: of the structure.
        rate: middle of the grid of learning rates.
        body: learning rate of the weights inside the blocks over that of the rest.
        full_start: share of the steps that train the weights as they are, before the structure comes.
    """

    optimizer: str = "adamw"
    options: Mapping[str, Any] = field(default_factory=dict)
    structure: str | rf.Recipe = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate: float = 3e-3
    body: float = 1.0
    full_start: float = 0.0


PROJECTED = {"rank": RANK, "refresh": 50}
RELORA = rf.Recipe("lora", dynamics=(("relora", {"interval": 60, "warmup": 10}),))
ARMS = {
    "full": Arm(),
    # As in GaLore and its kin, whose scale of 0.25 leaves embeddings and head a rate four times as high.
    "full-4x": Arm(rate=1e-2, body=0.25),
    "galore": Arm("galore", PROJECTED, rate=1e-2),
    "fira": Arm("fira", PROJECTED, rate=1e-2),
    # Its rates are shares of the size of a weight, as those of Adafactor.
    "flora": Arm("flora", {"rank": RANK, "kappa": 100}, rate=1e-1),
    "dct": Arm("dct-projection", {"rank": RANK, "scale": 0.25}, rate=1e-2),
    "sltrain": Arm(structure="sltrain", settings={"alpha": RANK / 4}),
    "lost": Arm(structure="lost", settings={"density": 0.05}),
    "relora": Arm(
        structure=rf.Recipe("lora", dynamics=(("relora", {"interval": 60, "warmup": 10}),)), full_start=0.25
    ),
    "low-rank": Arm(structure="low-rank"),
}


class Task:
    """The text, packed; the same for every arm."""

    def __init__(self) -> None:
        corpus = read_corpus((), (), 0.05)
        self.tokenizer = train_tokenizer(corpus.training, LADDER[SIZE].vocabulary)
        self.train = pack(corpus.training, self.tokenizer, LENGTH, corpus.name)
        self.held_out = pack(corpus.held_out, self.tokenizer, LENGTH, corpus.name).first(HELD_OUT_BLOCKS)

    def batches(self, seed: int, steps: int) -> Iterator[Tensor]:
        """Yield token ids (BATCH, LENGTH), drawn without repetition by a seed."""
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(seed))
        for i in range(steps):
            yield rows(self.train, order[i * BATCH : (i + 1) * BATCH].tolist())

    def model(self, seed: int) -> nn.Module:
        """Return a model that starts at random."""
        from transformers import LlamaForCausalLM

        torch.manual_seed(seed)
        return LlamaForCausalLM(LADDER[SIZE].config()).train()  # type: ignore[no-any-return]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the mean held-out loss of a token, in nats."""
        model.eval()
        starts = range(0, len(self.held_out), 32)
        blocks = [rows(self.held_out, range(i, min(i + 32, len(self.held_out)))) for i in starts]
        losses = [model(input_ids=ids, labels=ids).loss.item() * len(ids) for ids in blocks]
        return sum(losses) / len(self.held_out)


def rows(packed: Packed, numbers: Any) -> Tensor:
    """Return sequences as a batch of token ids."""
    return torch.stack([packed[number] for number in numbers]).long()


def rate_at(step: int, steps: int) -> float:
    """Return the share of the peak rate: a linear warmup, then a cosine down to the floor."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def optimizer_of(model: nn.Module, arm: Arm, rate: float) -> torch.optim.Optimizer:
    """Return the optimizer of an arm."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if arm.optimizer != "adamw":
        return named_optimizer(named, arm.optimizer, rate, arm.options)
    if arm.body == 1:
        return adamw(model, rate, {})
    inside = [p for name, p in named if ".layers." in name and p.dim() > 1]
    rest = [p for name, p in named if not (".layers." in name and p.dim() > 1)]
    groups = [{"params": inside, "lr": rate * arm.body}, {"params": rest, "lr": rate}]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def train(task: Task, arm: Arm, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Return the held-out loss, the losses of every step, bytes and seconds of a step."""
    model, losses, seconds = task.model(seed), [], []
    early = round(arm.full_start * steps)
    batches = task.batches(seed, steps)

    def run(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(first + step, steps))
        for _ in range(first, last):
            begin = time.perf_counter()
            optimizer.zero_grad()
            ids = next(batches)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - begin)

    if early:
        run(adamw(model, rate, {}), 0, early)
    if arm.structure:
        given = {"rank": RANK, "seed": seed, "train": "all", "removable": False}
        rf.adapt(model, arm.structure, **given, **arm.settings)
    optimizer = optimizer_of(model, arm, rate)
    if arm.structure:
        with rf.attach(model, optimizer, total_steps=steps - early):
            run(optimizer, early, steps)
    else:
        run(optimizer, early, steps)
    count = rf.count(model)
    return {
        "held_out": task.loss(model),
        "losses": losses,
        "bytes": weight_bytes(model) + gradient_bytes(model) + state_bytes(optimizer),
        "state_bytes": state_bytes(optimizer),
        "numbers": {"stored": count.stored, "active": count.active, "deployed": count.deployed},
        "milliseconds": 1e3 * sorted(seconds)[len(seconds) // 2],
    }


def tuned(task: Task, name: str, runs: Runs, steps: int) -> float:
    """Return the learning rate with the lowest held-out loss."""
    arm, found = ARMS[name], {}
    wanted = [arm.rate / STEP, arm.rate, arm.rate * STEP]
    for _ in range(3):
        for rate in wanted:
            found[rate] = once(task, name, runs, TUNING_SEED, rate, steps)["held_out"]
            print(f"{name:<9} lr {rate:.1e}  held-out loss {found[rate]:.4f}", flush=True)
        best = min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
        if min(found) < best < max(found):
            break
        wanted = [best / STEP if best == min(found) else best * STEP]
    return best


def once(task: Task, name: str, runs: Runs, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Return a run, from its file if it is done."""

    def run() -> dict[str, Any]:
        try:
            return train(task, ARMS[name], seed, rate, steps)
        except InvalidOption as diverged:  # a gradient that is no number, which the optimizer refuses
            return {"held_out": math.inf, "diverged": str(diverged)}

    return runs.once(f"{steps}-{name}-{seed}-{rate:.1e}", run)


Results = dict[str, list[dict[str, Any]]]


def paired(results: Results, first: str, second: str) -> Interval:
    """Return the interval of the difference of held-out losses, seed by seed."""
    pairs = zip(results[first], results[second], strict=True)
    return interval([a["held_out"] - b["held_out"] for a, b in pairs])


# The directions claimed: the first has the lower held-out loss.
DIRECTIONS = (
    ("sltrain", "low-rank", "SLTrain: a sparse plus low-rank approach for parameter and memory efficient "
     "pretraining (2024)"),
    ("lost", "low-rank", "LOST: Low-rank and Sparse Pre-training for Large Language Models (2025)"),
    ("relora", "low-rank", "Stack More Layers Differently: High-Rank Training Through Low-Rank Updates "
     "(2023)"),
    ("galore", "low-rank", "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection (2024)"),
    ("fira", "galore", "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint? "
     "(2024)"),
    ("flora", "low-rank", "Flora: Low-Rank Adapters Are Secretly Gradient Compressors (2024)"),
    ("dct", "galore", "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (2025)"),
)  # fmt: skip


def report(results: Results, rates: Mapping[str, float], steps: int, command: str) -> None:
    """Print the table, write claims and picture."""
    print(
        f"\n{'arm':<9} {'lr':>8} {'held-out loss':>26} {'minus full':>26} {'MB':>6} {'state MB':>9} {'ms':>6}"
    )
    for name, found in sorted(results.items(), key=lambda item: interval(losses_of(item[1])).mean):
        gap = paired(results, name, "full") if "full" in results and name != "full" else ""
        last = found[-1]
        print(
            f"{name:<9} {rates[name]:>8.1e} {interval(losses_of(found))!s:>26} {gap!s:>26} "
            f"{last['bytes'] / 1e6:>6.1f} {last['state_bytes'] / 1e6:>9.1f} {last['milliseconds']:>6.0f}"
        )
    scale = f"{SIZE} Llama, standard library, {steps} steps of {BATCH} x {LENGTH} tokens, {len(SEEDS)} seeds"
    for first, second, paper in DIRECTIONS:
        if first in results and second in results:
            found = paired(results, first, second)
            words = f"the held-out loss is lower than that of {second} ({first} minus {second})"
            named = [name for name in (first, second, "full") if name in results]
            measured = {name: summary(results[name], rates[name]) for name in named}
            claim = Claim(paper, words, scale, measured, found, below_zero(found), command)
            print(f"{first} below {second}: {found}  {claim.verdict}")
            claim.write(f"pretrain-{first}")
    picture(results)


def losses_of(found: list[dict[str, Any]]) -> list[float]:
    """Return the held-out losses."""
    return [run["held_out"] for run in found]


def summary(found: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    """Return what was measured of an arm."""
    last = found[-1]
    return {
        "learning_rate": rate,
        "held_out_loss": str(interval(losses_of(found))),
        **{key: last[key] for key in ("bytes", "state_bytes", "numbers")},
    }


def picture(results: Results) -> None:
    """Draw held-out loss against memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, found in results.items():
        mean = interval(losses_of(found))
        size = found[-1]["bytes"] / 1e6
        axes.errorbar(size, mean.mean, yerr=max(0.0, mean.high - mean.mean), fmt="o", capsize=3)
        above = name != "fira"  # which lies on galore
        axes.annotate(name, (size, mean.mean), textcoords="offset points", xytext=(6, 4 if above else -12))
    axes.margins(x=0.12)  # room for the names
    axes.set_xlabel("weights, gradients and optimizer state, MB")
    axes.set_ylabel("held-out loss, nats per token")
    figure.savefig(RESULTS / "pretrain.png", dpi=120)


def main() -> None:
    """Run what is not done yet and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=Path, default=Path("runs") / "pretrain")
    parser.add_argument("--scale", type=float, default=1.0, help="times 0.5M tokens a run")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--report-only", action="store_true", help="leave out arms with runs that are not done"
    )
    given = parser.parse_args()
    steps, runs = max(20, round(given.scale * TOKENS / (BATCH * LENGTH))), Runs(given.runs)
    task = Task()
    results: Results = {}
    rates: dict[str, float] = {}
    for name in given.arms:
        if given.report_only and not any(given.runs.glob(f"{steps}-{name}-{SEEDS[-1]}-*.json")):
            print(f"{name}: not done")
            continue
        rates[name] = tuned(task, name, runs, steps)
        results[name] = [once(task, name, runs, seed, rates[name], steps) for seed in SEEDS]
    report(results, rates, steps, f"python benchmarks/claims/pretrain.py --scale {given.scale:g}")
    print(json.dumps({"rates": rates}))


if __name__ == "__main__":
    main()
