"""Claims about compression: MiniLM with SST-2, and a small Llama on the standard library's sources.

python benchmarks/claims/compress.py --data-dir DIR [--runs DIR] [--seeds 3] [--only minilm|llama|eora]

MiniLM's 36 linear layers keep 90, 70 and 50 % of their numbers. Calibrated methods read 128 sentences of the
training split of SST-2, other ones for every seed. Printed are the mean cosine of sentence embeddings with
the original's on the development split, the accuracy there of a linear probe that is trained anew on the
compressed model's embeddings, and of the probe of the original. A 1M Llama, pretrained by `rankfold
pretrain`, is scored by its perplexity on sources that it has not seen. DIR holds sst2-train.tsv and
sst2-dev.tsv. A run that is done is kept in --runs and not repeated.
"""

import argparse
import copy
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _claim import Claim, Interval, Runs, below_zero, interval
from torch import Tensor, nn

import rankfold as rf

sys.path.insert(0, str(Path(__file__).parents[1]))
from _minilm import folder

KEEPS = (0.9, 0.7, 0.5)
CALIBRATION, PROBE, LONGEST, ROWS = 128, 800, 64, 32  # sentences, sentences, tokens, sentences a batch
SPARE = 64  # rank of what EoRA gives back, as a share of MiniLM's width what 64 of 384 is
TARGETS = "encoder.*"
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Arm:
    """A way to compress.

    Attributes:
        method: by name.
        options: of `compress`.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)


ARMS = {
    "svd": Arm("svd"),
    "svd, shares by error": Arm("svd", {"share": "error"}),
    "welore": Arm("svd", {"share": ("welore", {"min_ratio": 0.0})}),
    "fwsvd": Arm("fwsvd"),
    "asvd": Arm("asvd"),
    "svd-llm": Arm("svd-llm"),
    "svd-llm, sequential": Arm("svd-llm", {"calibration": "sequential"}),
    "svd-llm, shares by error": Arm("svd-llm", {"share": "error"}),
    "lord": Arm("lord"),
    "afm": Arm("afm"),
}


class Sentences:
    """SST-2 and an encoder whose mean over tokens is a sentence's embedding.

    Args:
        data: folder of the two files.
    """

    def __init__(self, data: Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(folder())
        self.model: nn.Module = AutoModel.from_pretrained(folder()).eval()
        self.train, self.dev = (self._rows(data / f"sst2-{split}.tsv") for split in ("train", "dev"))

    @staticmethod
    def _rows(path: Path) -> list[tuple[str, int]]:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [(text, int(label)) for text, _, label in (line.rpartition("\t") for line in lines)]

    def batches(self, rows: Sequence[tuple[str, int]], *, labels: bool = False) -> list[Batch]:
        """Return rows in batches, the shorter sentences first."""
        ordered = sorted(rows, key=lambda row: len(row[0]))
        return [self._batch(ordered[i : i + ROWS], labels) for i in range(0, len(ordered), ROWS)]

    def _batch(self, rows: Sequence[tuple[str, int]], labels: bool) -> Batch:
        encoded = self.tokenizer(
            [text for text, _ in rows], truncation=True, max_length=LONGEST, padding=True, return_tensors="pt"
        )
        batch = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        return {**batch, "classes": torch.tensor([label for _, label in rows])} if labels else batch

    @torch.no_grad()
    def embed(self, model: nn.Module, rows: Sequence[tuple[str, int]]) -> tuple[Tensor, Tensor]:
        """Return embeddings (rows, width) and labels."""
        found, labels = [], []
        for batch in self.batches(rows, labels=True):
            labels.append(batch.pop("classes"))
            found.append(pooled(model, batch))
        return torch.cat(found), torch.cat(labels)

    def drawn(self, seed: int, count: int) -> list[tuple[str, int]]:
        """Return so many sentences of the training split."""
        return random.Random(seed).sample(self.train, count)


def pooled(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of the hidden states over the tokens that count, of length 1."""
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None].to(states.dtype)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


def probe(embeddings: Tensor, labels: Tensor) -> Any:
    """Return a fitted logistic regression."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10.0, max_iter=2000).fit(embeddings.numpy(), labels.numpy())


class Encoder:
    """The scores of a compressed MiniLM for one seed.

    Args:
        task: sentences.
        seed: of calibration and probe.
    """

    def __init__(self, task: Sentences, seed: int) -> None:
        self.task = task
        self.calibration, self.rows = task.drawn(1000 + seed, CALIBRATION), task.drawn(2000 + seed, PROBE)
        self.before, self.labels = task.embed(task.model, task.dev)
        embeddings, labels = task.embed(task.model, self.rows)
        self.probe = probe(embeddings, labels)

    def loss(self) -> Callable[[nn.Module, Any], Tensor]:
        """Return the loss of the original's probe, for the Fisher information of the task."""
        weight, bias = (
            torch.tensor(v, dtype=torch.float32) for v in (self.probe.coef_, self.probe.intercept_)
        )

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            inputs = {key: value for key, value in batch.items() if key != "classes"}
            logits = pooled(model, inputs) @ weight[0] + bias[0]
            return F.binary_cross_entropy_with_logits(logits, batch["classes"].float())

        return loss

    def data(self, method: str) -> dict[str, Any]:
        """Return the calibration: by sentence, with labels, where a method reads the task's gradients."""
        if method != "fwsvd":
            return {"data": self.task.batches(self.calibration)}
        single = [self.task._batch([row], True) for row in self.calibration]
        return {"data": single, "loss": self.loss()}

    def scores(self, model: nn.Module) -> dict[str, float]:
        """Return cosine, accuracy of a new probe, and accuracy of the original's probe."""
        after, labels = self.task.embed(model, self.task.dev)
        fresh = probe(*self.task.embed(model, self.rows))
        return {
            "cosine": float((after * self.before).sum(1).mean()),
            "accuracy": float(fresh.score(after.numpy(), labels.numpy())),
            "kept_probe": float(self.probe.score(after.numpy(), labels.numpy())),
        }


def encoder_run(encoder: Encoder, arm: Arm, keep: float) -> dict[str, Any]:
    """Compress a copy and score it."""
    model, reports = copy.deepcopy(encoder.task.model), []
    rf.compress(
        model, arm.method, keep=keep, targets=TARGETS, progress=False, few_tokens="allow",
        report=reports.append,
        **encoder.data(arm.method), **arm.options,
    )  # fmt: skip
    return {**encoder.scores(model), "kept": reports[0].kept, "seconds": reports[0].seconds}


# EoRA -------------------------------------------------------------------------------------------------


@torch.no_grad()
def halved_and_rounded(model: nn.Module) -> nn.Module:
    """Return a copy whose linears are pruned 2:4 by magnitude and rounded to 4 bits in groups of 64."""
    small = copy.deepcopy(model)
    for name, module in small.named_modules():
        if isinstance(module, nn.Linear) and ".layer." in name:
            groups = module.weight.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0)
            blocks = module.weight.view(-1, 64)
            step = blocks.abs().amax(1, keepdim=True).clamp(min=1e-12) / 7
            blocks.copy_((blocks / step).round().clamp(-8, 7) * step)
    return small


def eora_run(encoder: Encoder, how: str) -> dict[str, Any]:
    """Score the compressed model as it is, with a plain decomposition of what it lost, or with EoRA."""
    original, small = encoder.task.model, halved_and_rounded(encoder.task.model)
    if how == "svd of the loss":
        modules = dict(small.named_modules())
        for name, module in original.named_modules():
            if isinstance(module, nn.Linear) and ".layer." in name:
                lost = module.weight.detach() - modules[name].weight.detach()
                left, values, right = torch.linalg.svd(lost, full_matrices=False)
                modules[name].weight.data += left[:, :SPARE] * values[:SPARE] @ right[:SPARE]
    elif how == "eora":
        rf.compress(
            small, "eora", original=original, rank=SPARE, targets=TARGETS, progress=False, few_tokens="allow",
            **encoder.data("eora"),
        )  # fmt: skip
    return encoder.scores(small)


# Llama ------------------------------------------------------------------------------------------------


class Llama:
    """A 1M Llama, pretrained once, and blocks of sources that it has not seen.

    Args:
        runs: where it is kept.
    """

    def __init__(self, runs: Path) -> None:
        from rankfold.pretrain import PretrainConfig, load_pretrained, pretrain
        from rankfold.pretrain.text import read_corpus
        from rankfold.training.packed import pack

        place = runs / "llama-1M"
        config = PretrainConfig("1M", out=str(place), steps=800, batch_size=8, length=128, lr=3e-3)
        if not (place / "result.json").is_file():
            pretrain(config, resume=place.exists(), notify=print)
        self.model, tokenizer = load_pretrained(place)
        corpus = read_corpus((), (), config.held_out)
        texts = (corpus.training, corpus.held_out)
        self.train, self.held = (pack(documents, tokenizer, 128, corpus.name) for documents in texts)

    def calibration(self, seed: int) -> list[Batch]:
        """Return 128 blocks."""
        chosen = random.Random(3000 + seed).sample(range(len(self.train)), CALIBRATION)
        return [self._batch([self.train[i] for i in chosen[k : k + 8]]) for k in range(0, CALIBRATION, 8)]

    @staticmethod
    def _batch(blocks: Sequence[Tensor]) -> Batch:
        ids = torch.stack(list(blocks)).long()
        return {"input_ids": ids, "labels": ids}

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        """Return that of 128 held-out blocks."""
        count = min(128, len(self.held))
        losses = [float(model(**self._batch([self.held[i]])).loss) for i in range(count)]
        return float(torch.tensor(losses).mean().exp())

    def run(self, arm: Arm, keep: float, seed: int) -> dict[str, Any]:
        """Compress a copy and score it."""
        model, reports = copy.deepcopy(self.model), []
        batches = self.calibration(seed)
        if arm.method == "fwsvd":
            batches = [{k: v[i : i + 1] for k, v in batch.items()} for batch in batches for i in range(8)]
        rf.compress(
            model, arm.method, keep=keep, data=batches, progress=False, report=reports.append, **arm.options
        )
        return {"perplexity": self.perplexity(model), "kept": reports[0].kept}


# Tables and claims ------------------------------------------------------------------------------------


def table(
    name: str, found: Mapping[str, Mapping[float, Sequence[Mapping[str, float]]]], scores: Sequence[str]
) -> None:
    """Print means and 95 % intervals as Markdown."""
    print(f"\n| {name} | keep | {' | '.join(scores)} |\n| --- | --- |{' --- |' * len(scores)}")
    for arm, rows in found.items():
        for keep, runs in rows.items():
            cells = [_cell(interval([run[score] for run in runs])) for score in scores]
            print(f"| {arm} | {keep:g} | {' | '.join(cells)} |")


def _cell(found: Interval) -> str:
    return f"{found.mean:.3f} ± {(found.high - found.low) / 2:.3f}"


def claim(
    paper: str, said: str, scale: str, differences: Sequence[float], result: dict[str, Any], name: str
) -> None:
    """Write a claim that a paired difference is negative."""
    found = interval(differences)
    verdict = below_zero(found)
    command = "python benchmarks/claims/compress.py --data-dir DIR"
    Claim(paper, said, scale, result, found, verdict, command).write(f"compress-{name}")
    print(f"{verdict:<10} {said}: {found}")


def paired(found: Any, first: str, second: str, keep: float, score: str) -> list[float]:
    """Return a score of the first arm less that of the second, seed by seed."""
    return [a[score] - b[score] for a, b in zip(found[first][keep], found[second][keep], strict=True)]


def claims_of_encoder(found: Any, scale: str) -> None:
    """Check the directions on MiniLM; lower is better in every difference."""
    for arm, paper in (("svd-llm", "SVD-LLM, 2024"), ("afm", "AFM, 2024"), ("asvd", "ASVD, 2023")):
        for keep in KEEPS:
            said = f"{arm} is nearer to the original than svd at {keep:g}"
            differences = [-d for d in paired(found, arm, "svd", keep, "cosine")]
            claim(paper, said, scale, differences, {}, f"{arm}-{round(100 * keep)}")
    gains = [
        -(a - b)
        for a, b in zip(
            paired(found, "svd-llm", "svd", 0.5, "cosine"),
            paired(found, "svd-llm", "svd", 0.9, "cosine"),
            strict=True,
        )
    ]
    claim(
        "SVD-LLM, 2024",
        "what svd-llm gains over svd is more at 0.5 than at 0.9",
        scale,
        gains,
        {},
        "more-at-50",
    )
    for keep in KEEPS:
        differences = [-d for d in paired(found, "fwsvd", "svd", keep, "kept_probe")]
        said = f"fwsvd keeps the task's accuracy better than svd at {keep:g}"
        claim("FWSVD, 2022", said, scale, differences, {}, f"fwsvd-{round(100 * keep)}")
        differences = [-d for d in paired(found, "welore", "svd", keep, "cosine")]
        said = f"welore's ranks are better than uniform ones at {keep:g}"
        claim("WeLore, 2024", said, scale, differences, {}, f"welore-{round(100 * keep)}")


def claims_of_eora(found: Any, scale: str) -> None:
    """Check that EoRA gives back most of what was lost, and more than a plain decomposition."""
    runs = {name: rows[1.0] for name, rows in found.items()}
    lost = [1 - row["cosine"] for row in runs["2:4 and 4 bits"]]
    left = [1 - row["cosine"] for row in runs["eora"]]
    shares = [a / b - 0.5 for a, b in zip(left, lost, strict=True)]
    claim(
        "EoRA, 2024",
        "less than half of the lost cosine remains",
        scale,
        shares,
        {"lost": lost, "left": left},
        "eora",
    )
    differences = [-d for d in paired(found, "eora", "svd of the loss", 1.0, "cosine")]
    claim(
        "EoRA, 2024",
        "eora is nearer than a plain decomposition of the loss",
        scale,
        differences,
        {},
        "eora-svd",
    )


def main() -> None:
    """Run what is not done, and print tables and verdicts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="holds sst2-train.tsv and sst2-dev.tsv")
    parser.add_argument("--runs", type=Path, default=Path("benchmarks/results/compress"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=("minilm", "llama", "eora"))
    arguments = parser.parse_args()
    runs, seeds = Runs(arguments.runs), range(arguments.seeds)
    if arguments.only in (None, "minilm", "eora"):
        encoders(Sentences(arguments.data_dir), runs, seeds, arguments.only)
    if arguments.only in (None, "llama"):
        llamas(runs, seeds)


def encoders(task: Sentences, runs: Runs, seeds: Sequence[int], only: str | None) -> None:
    """Compress MiniLM in every way."""
    made: dict[int, Encoder] = {}

    def encoder(seed: int) -> Encoder:
        return made.setdefault(seed, Encoder(task, seed)) if seed not in made else made[seed]

    scale = f"MiniLM, 36 linears, {CALIBRATION} sentences, {len(seeds)} seeds"
    if only != "eora":
        found = {
            name: {
                keep: [
                    runs.once(
                        f"minilm-{name}-{keep:g}-{seed}",
                        lambda arm=arm, keep=keep, seed=seed: encoder_run(encoder(seed), arm, keep),
                    )
                    for seed in seeds
                ]
                for keep in KEEPS
            }
            for name, arm in ARMS.items()
            if "calibration" not in arm.options  # one pass over the data for each of 24 inputs
        }
        table("MiniLM", found, ("cosine", "accuracy", "kept_probe", "kept", "seconds"))
        claims_of_encoder(found, scale)
    ways = ("as it was", "2:4 and 4 bits", "svd of the loss", "eora")
    given = {
        how: {
            1.0: [
                runs.once(
                    f"eora-{how.replace(':', '-')}-{seed}",
                    lambda how=how, seed=seed: (
                        encoder(seed).scores(task.model)
                        if how == "as it was"
                        else eora_run(encoder(seed), how)
                    ),
                )
                for seed in seeds
            ]
        }
        for how in ways
    }
    table("MiniLM, compensated", given, ("cosine", "accuracy", "kept_probe"))
    claims_of_eora(given, scale)


def llamas(runs: Runs, seeds: Sequence[int]) -> None:
    """Compress a small Llama in every way."""
    llama = Llama(runs.folder)
    base = runs.once("llama-base", lambda: {"perplexity": llama.perplexity(llama.model), "kept": 1.0})
    print(f"\nLlama 1M, perplexity as it was: {base['perplexity']:.2f}")
    found = {
        name: {
            keep: [
                runs.once(
                    f"llama-{name}-{keep:g}-{seed}",
                    lambda arm=arm, keep=keep, seed=seed: llama.run(arm, keep, seed),
                )
                for seed in seeds
            ]
            for keep in KEEPS
        }
        for name, arm in ARMS.items()
    }
    table("Llama 1M", found, ("perplexity", "kept"))
    scale = f"1M Llama, {CALIBRATION} blocks of 128 tokens, {len(seeds)} seeds"
    for keep in KEEPS:
        for arm, paper in (("svd-llm", "SVD-LLM, 2024"), ("welore", "WeLore, 2024"), ("lord", "LoRD, 2023")):
            said = f"{arm} has a lower perplexity than svd at {keep:g}"
            differences = paired(found, arm, "svd", keep, "perplexity")
            claim(paper, said, scale, differences, {}, f"llama-{arm}-{round(100 * keep)}")


if __name__ == "__main__":
    main()
