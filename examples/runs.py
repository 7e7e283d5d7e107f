"""One measured training run of MiniLM with one method, and the same model put together again from files."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from processes import Notify
    from torch import Tensor, nn

BATCH_SIZE = 16
EVALUATION_BATCH_SIZE = 50
HEAD_RATE = 1e-2
"""Learning rate of the freshly initialised head where it is not the only thing that trains."""

LARGEST_GRADIENT = 1.0
"""Norm to which larger gradients are cut, as transformers' Trainer does."""

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; then it falls to zero in a line."""


@dataclass(frozen=True)
class Method:
    """A way to train the model: a point of rankfold, or one of the two ends without it.

    Args:
        name: how the report calls it.
        rates: the learning rates that the sweep tries.
        cost: time of a step next to a step of lora, for the estimate of the time left.
        options: keyword arguments of `rankfold.adapt`; None where everything or only the head trains.
    """

    name: str
    rates: tuple[float, ...]
    cost: float
    options: Mapping[str, Any] | None = None

    @property
    def is_adapter(self) -> bool:
        """Whether rankfold adapts the model."""
        return self.options is not None


METHODS = (
    Method("head only", (1e-2, 2e-2, 4e-2), 0.5),
    Method("full", (1e-4, 2e-4, 4e-4), 1.6),
    Method("lora", (1e-3, 2e-3, 4e-3), 1.0, {"method": "lora", "rank": 8}),
    Method("dora", (1e-3, 2e-3, 4e-3), 1.15, {"method": "dora", "rank": 8}),
    Method("lora-xs", (5e-3, 1e-2, 2e-2), 1.0, {"method": "lora-xs", "rank": 16}),
    Method("vera", (1e-2, 2e-2, 4e-2), 1.4, {"method": "vera", "rank": 128}),
)


@dataclass(frozen=True)
class Encoded:
    """Token ids of texts, with their labels."""

    ids: list[list[int]]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Args:
        trained: numbers that were trained, the head included.
        losses: training loss of each step.
        logits: by name of the split, the logits of each example.
        seconds: processor time of the training steps.
        peak_bytes: largest resident memory of the run's process.
        start_bytes: resident memory of the same process just before its first step.
    """

    trained: int
    losses: list[float]
    logits: dict[str, list[list[float]]]
    seconds: float
    peak_bytes: int
    start_bytes: int


@dataclass(frozen=True)
class Run:
    """Train `method` at `rate` on the train split for so many steps, and evaluate it on the others.

    Args:
        base: folder of the pretrained model.
        method: what trains.
        rate: peak learning rate of what the method trains.
        steps: optimizer steps.
        schedule: steps in which the learning rate rises and falls; a run of fewer steps stops on the way.
        classes: number of labels.
        train: examples to learn from.
        evaluate: examples to evaluate, by the name of their split.
        folder: receives the trained adapter, where the method is one.
        seed: decides the head's start, the batches and the dropout.
    """

    base: Path
    method: Method
    rate: float
    steps: int
    schedule: int
    classes: int
    train: Encoded = field(repr=False)
    evaluate: Mapping[str, Encoded] = field(repr=False)
    folder: Path | None = None
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.method.name} at {self.rate:g}"

    @property
    def cost(self) -> float:
        """Expected time, in steps of lora."""
        return self.steps * self.method.cost + sum(
            evaluation_cost(len(examples)) for examples in self.evaluate.values()
        )

    def __call__(self, notify: Notify) -> Outcome:
        """Do it, in a process that has done nothing else."""
        use_one_thread()
        model = prepared_model(self)
        groups = parameter_groups(model, self)
        start_bytes = resident_bytes()
        began = time.process_time()
        losses = train(model, groups, self, notify)
        seconds = time.process_time() - began
        logits = {split: predict(model, examples, notify) for split, examples in self.evaluate.items()}
        peak = peak_bytes()
        if self.folder and self.method.is_adapter:
            write_adapter(model, self.method, self.folder)
        trained = sum(parameter.numel() for group in groups for parameter in group["params"])
        return Outcome(trained, losses, logits, seconds, peak, start_bytes)


@dataclass(frozen=True)
class Reload:
    """Put the model together again from a fresh base and the files of an adapter, and evaluate it.

    Args:
        base: folder of the pretrained model.
        folder: an adapter that rankfold saved, or one that it exported for peft.
        reader: "rankfold", or "peft" to load it with that library.
        method: whose predictions it must give.
        examples: what to evaluate.
        classes: number of labels.
    """

    base: Path
    folder: Path
    reader: str
    method: str
    examples: Encoded = field(repr=False)
    classes: int

    def __str__(self) -> str:
        return f"{self.folder.name} read by {self.reader}"

    @property
    def cost(self) -> float:
        """Expected time, in steps of lora."""
        return evaluation_cost(len(self.examples))

    def __call__(self, notify: Notify) -> list[list[float]]:
        """Return the logits of each example."""
        use_one_thread()
        # Another seed than in training: the head must come from the files, not from the same start.
        model: Any = base_model(self.base, self.classes, seed=1)
        if self.reader == "peft":
            import peft

            model = peft.PeftModel.from_pretrained(model, str(self.folder))
        else:
            import rankfold as rf

            rf.load(model, self.folder)
        return predict(model, self.examples, notify)


def evaluation_cost(examples: int) -> float:
    """Expected time to evaluate so many examples, in training steps of lora."""
    return 0.35 * examples / BATCH_SIZE


def use_one_thread() -> None:
    """Compute on one core: the runs beside this one have the others, and processor time says what it took."""
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.disable_progress_bar()


def base_model(base: Path, classes: int, seed: int) -> nn.Module:
    """The pretrained model with a new head of so many classes."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed)
    model: nn.Module = AutoModelForSequenceClassification.from_pretrained(base, num_labels=classes)
    return model


def prepared_model(run: Run) -> nn.Module:
    """The base of a run, with the parts that its method trains set to be trained."""
    model = base_model(run.base, run.classes, run.seed)
    if run.method.options is not None:
        import rankfold as rf

        rf.adapt(model, **run.method.options, seed=run.seed)
    elif run.method.name == "head only":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier."))
    return model


def parameter_groups(model: nn.Module, run: Run) -> list[dict[str, Any]]:
    """What trains, and how fast: the head by itself, and the rest at the rate of the run."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    head = [weight for name, weight in trained if "classifier" in name]
    rest = [weight for name, weight in trained if "classifier" not in name]
    if not rest:
        return [{"params": head, "lr": run.rate}]
    return [{"params": head, "lr": HEAD_RATE}, {"params": rest, "lr": run.rate}]


def train(model: nn.Module, groups: list[dict[str, Any]], run: Run, notify: Notify) -> list[float]:
    """Train in place; return the loss of each step."""
    import torch

    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [group["lr"] for group in groups],
        total_steps=run.schedule + 1,  # it counts the rate that would come after the last step
        pct_start=WARM_UP,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    torch.manual_seed(run.seed)
    model.train()
    trained = [parameter for group in groups for parameter in group["params"]]
    losses = []
    for rows in batches_of(run.train, run.steps, run.seed):
        loss = model(**collate(run.train, rows)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        notify(run.method.cost)
    return losses


def batches_of(examples: Encoded, count: int, seed: int) -> Iterator[list[int]]:
    """The rows of `count` batches: texts of like length together, so that little padding is computed.

    A pass over the data is shuffled, cut into groups of eight batches, and each group is sorted by length
    before it is cut into batches, which are shuffled again. Every method sees the same batches.
    """
    chance = random.Random(seed)
    batches: list[list[int]] = []
    for _ in range(count):
        if not batches:
            rows = chance.sample(range(len(examples)), len(examples))
            group = 8 * BATCH_SIZE
            for start in range(0, len(rows), group):
                by_length = sorted(rows[start : start + group], key=lambda row: len(examples.ids[row]))
                batches += [by_length[at : at + BATCH_SIZE] for at in range(0, len(by_length), BATCH_SIZE)]
            chance.shuffle(batches)
        yield batches.pop()


def collate(examples: Encoded, rows: Sequence[int]) -> dict[str, Tensor]:
    """A batch of those rows, padded to its longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(examples.ids[row]) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence(mask, batch_first=True),
        "labels": torch.tensor([examples.labels[row] for row in rows]),
    }


def predict(model: nn.Module, examples: Encoded, notify: Notify) -> list[list[float]]:
    """The logits of each example, in order."""
    import torch

    model.eval()
    order = sorted(range(len(examples)), key=lambda row: len(examples.ids[row]))
    logits: dict[int, list[float]] = {}
    with torch.no_grad():
        for start in range(0, len(order), EVALUATION_BATCH_SIZE):
            rows = order[start : start + EVALUATION_BATCH_SIZE]
            logits.update(zip(rows, model(**collate(examples, rows)).logits.tolist(), strict=True))
            notify(evaluation_cost(len(rows)))
    return [logits[row] for row in range(len(examples))]


def write_adapter(model: nn.Module, method: Method, folder: Path) -> None:
    """Save the adapter in rankfold's form, and plain LoRA in peft's form too."""
    import rankfold as rf

    rf.save(model, folder / method.name, overwrite=True)
    if method.name == "lora":
        rf.export(model, folder / "lora-peft", format="peft", overwrite=True)


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """Largest resident memory of this process so far, as the operating system has counted it."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
