"""Claims about merging: four text classifiers that were fine-tuned from one MiniLM become one.

python benchmarks/claims/merge.py --data-dir DIR [--runs DIR] [--seeds 3] [--no-adarank]

The tasks are SST-2 and three questions of which package a docstring is from: of the standard library, of
numerical packages, of packages for machine learning. No file gives texts to two splits. Every task
fine-tunes all layers of the encoder, but not its embeddings, and a head of its own. Then the encoders are
merged, and every task is tested on the merged encoder with the head that it had.

Every rule but linear, opcm and adarank has a scale, in which all are affine, so that one merge gives a whole
grid. The best on the validation split of all tasks, with the first seed, is taken for all seeds. AdaRank
starts from task arithmetic at its best scale, and reads the texts of the test split, without labels, as in
the paper; its learning rate is chosen as the scales are. DIR holds sst2-train.tsv and sst2-dev.tsv (sentence,
tab, 0 or 1). What is done is kept in --runs and not repeated.
"""

import argparse
import ast
import copy
import random
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _claim import Claim, Interval, Runs, interval
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import rankfold as rf

sys.path.insert(0, str(Path(__file__).parents[1]))
from _minilm import folder

PACKAGES = {
    "standard library": ("asyncio", "email", "importlib"),
    "numbers": ("numpy", "scipy", "sympy", "networkx"),
    "learning": ("torch", "transformers", "peft", "sklearn"),
}
TASKS = ("sst-2", *PACKAGES)
CLASSES = max(len(packages) for packages in PACKAGES.values())  # of every head, so that all are of one shape
TRAIN, VALIDATION, TEST = 300, 32, 64  # texts of a class at most
A_FILE, SHORTEST = 40, 8  # texts of a file at most, words of a text at least
STEPS, ROWS, LONGEST, WARMUP = 60, 16, 32, 0.1
RATE, HEAD_RATE = 1e-4, 2e-3
IMPOSSIBLE = -1e4  # bias of a class that a task does not have

SCALES = (0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
LEARNING_RATES, LEARNING_STEPS, LEARNING_ROWS = (1e-3, 5e-3), 50, 8


@dataclass(frozen=True)
class Rule:
    """A rule of merging as it is used here.

    Attributes:
        options: of the rule.
        scaled: its result is affine in `scale`.
        start: the scale at which the result is known without the rule: that of the base is 0.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    scaled: bool = True
    start: float = 0.0

    @property
    def asked(self) -> dict[str, Any]:
        """The options, at scale 1 where there is one, whatever the usual scale of the rule."""
        return {**self.options, "scale": 1.0} if self.scaled else dict(self.options)


RULES = {
    "linear": Rule(scaled=False),
    "task-arithmetic": Rule(),
    "ties": Rule({"density": 0.2}),
    "dare-ties": Rule({"density": 0.1}),
    "breadcrumbs": Rule({"drop_smallest": 0.85, "drop_largest": 0.01}),
    # It asks for no base, and with the mean of its changes instead of their sum it is the average.
    "lore-merging": Rule({"mu": 0.01, "iterations": 20}, start=1 / len(TASKS)),
    "tsv-m": Rule(),
    "opcm": Rule(scaled=False),
}
BASELINES = ("task-arithmetic", "ties")
PAPERS = {
    "breadcrumbs": "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks (2023)",
    "lore-merging": "LoRE-Merging: Exploring Low-Rank Estimation For Large Language Model Merging (2025)",
    "adarank": "AdaRank: Adaptive Rank Pruning for Enhanced Model Merging (2025)",
}

Row = tuple[str, int]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Texts:
    """The texts of one task with their classes.

    Attributes:
        classes: how many.
        train: in turn of each class.
        validation: on which scales are tuned.
        test: on which accuracy is measured.
    """

    classes: int
    train: list[Row]
    validation: list[Row]
    test: list[Row]


def sentiment(data: Path) -> Texts:
    """Return SST-2: its training split, and two parts of its development split."""
    train, dev = (_labelled(data / f"sst2-{split}.tsv") for split in ("train", "dev"))
    random.Random(0).shuffle(dev)
    tests = CLASSES * TEST
    return Texts(2, train, dev[tests : tests + CLASSES * VALIDATION], dev[:tests])


def _labelled(path: Path) -> list[Row]:
    parts = (line.rpartition("\t") for line in path.read_text(encoding="utf-8").splitlines())
    return [(text, int(label)) for text, _, label in parts]


def docstrings(packages: Sequence[str]) -> Texts:
    """Return docstrings with the number of their package, equally many of each."""
    found = [_splits(package) for package in packages]
    short = next((package for package, one in zip(packages, found, strict=True) if not one[0]), None)
    if short is not None:
        raise SystemExit(f"the package {short} has too few docstrings")
    splits = []
    for texts in zip(*found, strict=True):  # of one split, by package
        rows = [[(text, label) for text in one] for label, one in enumerate(texts)]
        splits.append([row for turn in zip(*rows, strict=False) for row in turn])
    return Texts(len(packages), *splits)


def _splits(package: str) -> list[list[str]]:
    """Return the texts for training, validation and test; each from other files."""
    wanted, splits, seen = [TEST, VALIDATION, TRAIN], [[], [], []], set()  # type: ignore[var-annotated]
    for path in _files(package):
        place = next((i for i, size in enumerate(wanted) if len(splits[i]) < size), None)
        if place is None:
            break
        new = [text for text in dict.fromkeys(_documented(path)) if text not in seen][:A_FILE]
        seen.update(new)
        splits[place] += new
    return [split[:size] for split, size in zip(splits, wanted, strict=True)][::-1]


def _files(package: str) -> list[Path]:
    """Return the sources of a package in an order that is the same on every machine, tests left out."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the package {package} is not installed")
    root = Path(next(iter(spec.submodule_search_locations)))
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    sources = [name for name in names if not any("test" in part for part in name.parts[:-1])]
    return [root / name for name in sorted(sources, key=lambda name: zlib.crc32(name.as_posix().encode()))]


def _documented(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):  # templates and examples of errors
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            words = (ast.get_docstring(node) or "").split()
            if len(words) >= SHORTEST:
                yield " ".join(words)


class Classifier(nn.Module):
    """An encoder, the mean over its tokens, and a linear head.

    Args:
        encoder: gives last_hidden_state (rows, tokens, width).
        width: of it.
        classes: that the task has, of the CLASSES that the head has.
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, CLASSES)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            self.head.bias[classes:] = IMPOSSIBLE

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (rows, CLASSES) of token ids (rows, tokens)."""
        with torch.autocast("cpu", torch.bfloat16):
            states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        kept = attention_mask.unsqueeze(-1).float()
        return self.head((states.float() * kept).sum(1) / kept.sum(1))  # type: ignore[no-any-return]


class Bench:
    """The tasks, the base, and the models that were fine-tuned from it.

    Args:
        data: folder of SST-2.
        runs: what is done already.
    """

    def __init__(self, data: Path, runs: Runs) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.runs = runs
        self.tokenizer = AutoTokenizer.from_pretrained(folder())
        self.texts = {"sst-2": sentiment(data)} | {
            name: docstrings(packages) for name, packages in PACKAGES.items()
        }

    @cached_property
    def validation(self) -> dict[str, list[Batch]]:
        """Batches of the validation split by task."""
        return {name: self.held_out(texts.validation) for name, texts in self.texts.items()}

    @cached_property
    def test(self) -> dict[str, list[Batch]]:
        """Batches of the test split by task."""
        return {name: self.held_out(texts.test) for name, texts in self.texts.items()}

    def fresh(self, task: str) -> Classifier:
        """Return the base with a new head."""
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(folder(), add_pooling_layer=False)
        return Classifier(encoder, encoder.config.hidden_size, self.texts[task].classes).eval()

    def batch(self, rows: Sequence[Row]) -> Batch:
        """Return token ids, mask and labels."""
        encoded = self.tokenizer(
            [text for text, _ in rows],
            truncation=True,
            max_length=LONGEST,
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        return {**encoded, "labels": torch.tensor([label for _, label in rows])}

    def drawn(self, rows: Sequence[Row], size: int, count: int, seed: int) -> list[Batch]:
        """Return so many batches, drawn by a seed."""
        order, found = random.Random(seed), []  # type: ignore[var-annotated]
        while len(found) < count * size:
            found += order.sample(rows, len(rows))
        return [self.batch(found[i * size : (i + 1) * size]) for i in range(count)]

    def held_out(self, rows: Sequence[Row]) -> list[Batch]:
        """Return all rows in batches of about equal length."""
        ordered = sorted(rows, key=lambda row: len(row[0]))
        return [self.batch(ordered[i : i + 64]) for i in range(0, len(ordered), 64)]

    def individual(self, task: str, seed: int) -> Classifier:
        """Return the model fine-tuned on one task, from its file if it is done."""
        path = self.runs.folder / f"{task}-{seed}.safetensors".replace(" ", "-")
        model = self.fresh(task)
        if path.is_file():
            model.load_state_dict(load_file(path), strict=False)
        else:
            begin = time.process_time()
            self._tune(model, task, seed)
            save(model, path)
            print(f"{task:<17} seed {seed}  trained in {time.process_time() - begin:.0f} s", flush=True)
        return model.requires_grad_(False)

    def _tune(self, model: Classifier, task: str, seed: int) -> None:
        model.encoder.get_submodule("embeddings").requires_grad_(False)
        groups = [
            {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": RATE},
            {"params": list(model.head.parameters()), "lr": HEAD_RATE},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / (WARMUP * STEPS), (STEPS - step) / ((1 - WARMUP) * STEPS), 1.0),
        )
        for batch in self.drawn(self.texts[task].train, ROWS, STEPS, seed):
            optimizer.zero_grad()
            labels = batch.pop("labels")
            F.cross_entropy(model(**batch), labels).backward()
            optimizer.step()
            schedule.step()


def save(model: nn.Module, path: Path) -> None:
    """Write all tensors but those of the embeddings, which are the base's, complete or not at all."""
    unfinished = path.with_suffix(".partial")
    save_file({name: t for name, t in model.state_dict().items() if "embeddings" not in name}, unfinished)
    unfinished.replace(path)


@torch.inference_mode()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return the share of rows that are classified rightly."""
    right = count = 0
    for batch in batches:
        labels = batch["labels"]
        found = model(batch["input_ids"], batch["attention_mask"]).argmax(-1)
        right += int((found == labels).sum())
        count += len(labels)
    return right / count


def joined(encoder: nn.Module, models: Mapping[str, Classifier]) -> dict[str, Classifier]:
    """Return for every task one encoder with the task's own head."""
    return {task: copy.deepcopy(model, {id(model.encoder): encoder}) for task, model in models.items()}


def accuracies(models: Mapping[str, Classifier], splits: Mapping[str, list[Batch]]) -> dict[str, float]:
    """Return the accuracy of every task."""
    return {task: accuracy(model, splits[task]) for task, model in models.items()}


def mean(found: Mapping[str, float]) -> float:
    """Return the mean over tasks."""
    return sum(found.values()) / len(found)


def layers_of(encoder: nn.Module) -> nn.Module:
    """Return what was trained."""
    return encoder.get_submodule("encoder")


def between(first: nn.Module, second: nn.Module, share: float) -> nn.Module:
    """Return the encoder at a share of the way from one to another, or beyond."""
    ends = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    result = copy.deepcopy(first)
    result.load_state_dict({name: torch.lerp(start, end, share) for (name, start), end in ends})
    return result


class Merging:
    """The models of one seed and what becomes of them.

    Args:
        bench: the tasks.
        seed: of the models.
    """

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.seed = bench, seed

    @cached_property
    def models(self) -> dict[str, Classifier]:
        """The individual models by task."""
        return {task: self.bench.individual(task, self.seed) for task in TASKS}

    @cached_property
    def base(self) -> Classifier:
        """The model from which all were trained."""
        return self.bench.fresh(TASKS[0])

    def encoder(self, name: str) -> nn.Module:
        """Return the merged encoder, at scale 1 where the rule has one, from its file if it is done."""
        path = self.bench.runs.folder / f"{name}-{self.seed}-layers.safetensors"
        result = copy.deepcopy(self.base.encoder).requires_grad_(False)
        layers = layers_of(result)
        if not path.is_file():
            begin = time.process_time()
            base = None if name in ("linear", "lore-merging") else layers
            models = [layers_of(model.encoder) for model in self.models.values()]
            options = {"base": base, "seed": self.seed, "progress": False, **RULES[name].asked}
            save(rf.merge(models, name, **options), path)
            print(f"{name:<17} seed {self.seed}  merged in {time.process_time() - begin:.1f} s", flush=True)
        layers.load_state_dict(load_file(path))
        return result

    def scaled(self, name: str, scale: float) -> nn.Module:
        """Return the merged encoder at a scale."""
        start = RULES[name].start
        first = self.encoder("linear") if start else self.base.encoder
        return between(first, self.encoder(name), (scale - start) / (1 - start))

    def learned(self, scale: float, rate: float) -> nn.Module:
        """Return the encoder merged by AdaRank, from task arithmetic at a scale."""
        count = LEARNING_STEPS
        data = {
            task: self.bench.drawn(texts.test, LEARNING_ROWS, count, self.seed)
            for task, texts in self.bench.texts.items()
        }
        for batch in (batch for batches in data.values() for batch in batches):
            del batch["labels"]
        own = ("head.*", "*embeddings*")  # embeddings are alike in all
        settings: dict[str, Any] = {"coefficient": scale, "learning_rate": rate, "steps": count, "heads": own}
        with torch.autocast("cpu", torch.bfloat16):
            merged = rf.merge(
                list(self.models.values()), "adarank", base=self.base, data=data, progress=False, **settings
            )
        return merged.encoder  # type: ignore[no-any-return]

    def measured(self, encoder: nn.Module, splits: Mapping[str, list[Batch]]) -> dict[str, float]:
        """Return the accuracy of every task, each with its own head on this encoder."""
        return accuracies(joined(encoder, self.models), splits)


def best_scale(bench: Bench, first: Merging, name: str) -> float:
    """Return the scale with the highest mean accuracy on the validation split, for the first seed."""

    def tried(scale: float) -> dict[str, float]:
        return first.measured(first.scaled(name, scale), bench.validation)

    found = {s: bench.runs.once(f"{name}-{s:g}-validation", partial(tried, s)) for s in SCALES}
    best = max(SCALES, key=lambda scale: mean(found[scale]))
    print(
        f"{name:<17} {'  '.join(f'{scale:g}: {mean(one):.3f}' for scale, one in found.items())}", flush=True
    )
    return best


def best_rate(bench: Bench, first: Merging, scale: float) -> float:
    """Return AdaRank's learning rate with the highest mean accuracy on the validation split."""
    found = {rate: _learned(bench, first, scale, rate)["validation"] for rate in LEARNING_RATES}
    print(
        f"{'adarank':<17} {'  '.join(f'{rate:g}: {value:.3f}' for rate, value in found.items())}", flush=True
    )
    return max(found, key=lambda rate: found[rate])


def _learned(bench: Bench, merging: Merging, scale: float, rate: float) -> dict[str, Any]:
    def run() -> dict[str, Any]:
        begin = time.process_time()
        encoder = merging.learned(scale, rate)
        seconds = time.process_time() - begin
        validation = mean(merging.measured(encoder, bench.validation))
        return {
            "test": merging.measured(encoder, bench.test),
            "validation": validation,
            "seconds": seconds,
        }

    return bench.runs.once(f"adarank-{scale:g}-{rate:g}-{LEARNING_STEPS}-{merging.seed}", run)


Results = dict[str, list[dict[str, float]]]  # by arm, accuracies by task for every seed


def measure(bench: Bench, merging: Merging, choices: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Return the accuracies of every arm but AdaRank for one seed."""
    runs, seed = bench.runs, merging.seed

    def tested(key: str, encoder: Callable[[], nn.Module]) -> dict[str, float]:
        found = runs.once(f"{key}-test-{seed}", lambda: merging.measured(encoder(), bench.test))
        print(f"{key:<22} seed {seed}  mean accuracy {mean(found):.3f}", flush=True)
        return found

    results = {
        "individual": runs.once(f"individual-{seed}", lambda: accuracies(merging.models, bench.test)),
        "base": tested("base", lambda: merging.base.encoder),
    }
    for name, rule in RULES.items():
        if not rule.scaled:
            results[name] = tested(name, partial(merging.encoder, name))
        else:
            scale = choices[name]
            results[name] = tested(f"{name}-{scale:g}", partial(merging.scaled, name, scale))
    return results


def means(found: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the mean over tasks, seed by seed."""
    return [mean(one) for one in found]


def gap(results: Results, first: str, second: str) -> Interval:
    """Return the interval of the difference of mean accuracies, seed by seed."""
    pairs = zip(means(results[first]), means(results[second]), strict=True)
    return interval([a - b for a, b in pairs])


def above_zero(found: Interval) -> str:
    """Return the verdict on a claim that a difference is positive."""
    return "agrees" if found.low > 0 else "disagrees" if found.high < 0 else "undecided"


def table(results: Results, choices: Mapping[str, float]) -> str:
    """Return the accuracies as Markdown, the best mean first."""
    lines = [f"| | scale | {' | '.join(TASKS)} | mean | of individual |", f"|{'---|' * (len(TASKS) + 4)}"]
    for name, found in sorted(results.items(), key=lambda item: -mean_of(item[1])):
        tasks = [f"{sum(one[task] for one in found) / len(found):.3f}" for task in TASKS]
        total = interval(means(found))
        scale = f"{choices[name]:g}" if name in choices and name != "adarank" else ""
        share = interval([a / b for a, b in zip(means(found), means(results["individual"]), strict=True)])
        cells = [name, scale, *tasks, bounds(total), f"{share.mean:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_of(found: Sequence[Mapping[str, float]]) -> float:
    """Return the mean over tasks and seeds."""
    return interval(means(found)).mean


def bounds(found: Interval) -> str:
    """Return an interval in three digits."""
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"


def report(results: Results, choices: Mapping[str, float], seeds: int) -> None:
    """Print the table and write the claims."""
    print(f"\n{table(results, choices)}\n")
    scale = (
        f"MiniLM-L6 (22M), SST-2 and three classifications of docstrings, each {STEPS} steps of {ROWS} texts "
        f"of at most {LONGEST} tokens, embeddings held, {seeds} seeds; scales chosen on a validation split; "
        f"AdaRank: {LEARNING_STEPS} steps of {LEARNING_ROWS} texts a task"
    )
    command = f"python benchmarks/claims/merge.py --data-dir DIR --seeds {seeds}"
    for name, paper in PAPERS.items():
        for other in BASELINES if name in results else ():
            found = gap(results, name, other)
            words = (
                "of four task models of one base the mean accuracy after merging is higher than that of "
                f"{other} ({name} minus {other})"
            )
            arms = ("individual", "base", name, other)
            measured = {arm: summary(results[arm], choices.get(arm)) for arm in arms}
            print(f"| {name} above {other} | {bounds(found)} | {above_zero(found)} |")
            claim = Claim(paper, words, scale, measured, found, above_zero(found), command)
            claim.write(f"merge-{name}-{other}")


def summary(found: Sequence[Mapping[str, float]], choice: float | None) -> dict[str, Any]:
    """Return what was measured of an arm."""
    chosen = {} if choice is None else {"chosen": choice}
    tasks = {task: str(interval([one[task] for one in found])) for task in TASKS}
    return {**chosen, "mean_accuracy": str(interval(means(found))), **tasks}


def main() -> None:
    """Run what is not done yet and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2-train.tsv and sst2-dev.tsv")
    parser.add_argument("--runs", type=Path, default=Path(__file__).parents[1] / "results" / "merge")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--no-adarank", action="store_true", help="leave out the rule that learns")
    given = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(given.data_dir, Runs(given.runs))
    every = [Merging(bench, seed) for seed in range(given.seeds)]
    choices = {name: best_scale(bench, every[0], name) for name, rule in RULES.items() if rule.scaled}
    found = [measure(bench, merging, choices) for merging in every]
    if not given.no_adarank:
        scale = choices["task-arithmetic"]
        rate = choices["adarank"] = best_rate(bench, every[0], scale)
        for merging, one in zip(every, found, strict=True):
            one["adarank"] = _learned(bench, merging, scale, rate)["test"]
    report({name: [one[name] for one in found] for name in found[0]}, choices, given.seeds)


if __name__ == "__main__":
    main()
