"""What a run would do, and what it did, for people and for programs."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rankfold as rf
from rankfold.methods.recipe import split_part
from rankfold.training.config import RunConfig, json_settings
from rankfold.training.memory import Memory, readable
from rankfold.training.metrics import Score


@dataclass(frozen=True)
class RunPlan:
    """What a run would do, found without writing anything.

    Args:
        plan: the modules that match, and the parameters that train.
        memory: predicted bytes of a step.
        examples: number of training examples.
        steps: optimizer steps.
        task: `causal` or `classify`.
    """

    plan: rf.Plan
    memory: Memory
    examples: int
    steps: int
    task: str

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-like data; memory in bytes."""
        return {
            "task": self.task,
            "modules": [
                {"path": site.path, "shape": list(site.shape), "rank": site.rank} for site in self.plan.sites
            ],
            "train": list(self.plan.train),
            "unmatched": list(self.plan.unmatched),
            "trainable": self.plan.trainable,
            "examples": self.examples,
            "steps": self.steps,
            "memory": self.memory.to_dict(),
        }

    def __str__(self) -> str:
        """Return the table of modules, and what they cost."""
        return (
            f"{self.plan}\n{self.task}: {self.examples:,} examples, {self.steps:,} steps\n"
            f"memory {self.memory}"
        )


@dataclass(frozen=True)
class RunResult:
    """What a run did.

    Args:
        config: the settings, with what was found filled in.
        out: the folder of the adapter.
        trainable: parameters that trained.
        total: parameters of the adapted model.
        steps: optimizer steps, those before a resumption counted.
        seconds: training time of this process.
        peak_memory: bytes: of the GPU where one was used, else of the process.
        before: metric of the base, with a new head as it started.
        after: metric of the adapted model.
        scored_on: what the metric was measured on.
    """

    config: RunConfig
    out: Path
    trainable: int
    total: int
    steps: int
    seconds: float
    peak_memory: int
    before: Score
    after: Score
    scored_on: str

    @property
    def next_command(self) -> str:
        """A command that makes a stock checkpoint of the result, or loads a result that has no such form."""
        out, model = str(self.out), self.config.model
        structure, _ = split_part(rf.parse_point(self.config.method).structure)
        traits = rf.find_method(f"structure={structure}").traits
        if traits["gate"] is None and not traits["activations"]:
            return shlex.join(["rankfold", "fold", out, "--model", model, "--out", f"{out}-folded"])
        program = f"from rankfold.training.adapter import load_adapted; _, base = load_adapted({out!r})"
        if not traits["permanent"]:
            return shlex.join(["python", "-i", "-c", program])
        folder = f"{out}-{traits['permanent'].rpartition('.')[2]}ed"
        saved = f"{traits['permanent']}(base.model).save_pretrained({folder!r})"
        program += f"; import rankfold; {saved}; base.tokenizer.save_pretrained({folder!r})"
        return shlex.join(["python", "-c", program])

    @property
    def facts(self) -> dict[str, str]:
        """What the adapter's card says of the run."""
        return {
            "data": self.config.data,
            "steps": f"{self.steps:,}",
            "trained parameters": f"{self.trainable:,}",
            "measured on": self.scored_on,
            "before": str(self.before),
            "after": str(self.after),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-like data: seconds, bytes, nats."""
        return {
            "out": str(self.out),
            "task": self.config.task,
            "trainable": self.trainable,
            "total": self.total,
            "share": self.trainable / self.total,
            "steps": self.steps,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
            "scored_on": self.scored_on,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "next": self.next_command,
            "config": json_settings(self.config),
        }

    def __str__(self) -> str:
        """Return the summary for a person."""
        lines = {
            "trained": f"{self.trainable:,} of {self.total:,} parameters ({self.trainable / self.total:.3%})",
            "time": f"{self.seconds:.1f} s, {self.steps:,} steps",
            "memory": f"{readable(self.peak_memory)} at the peak",
            "before": str(self.before),
            "after": str(self.after),
            "measured": f"on {self.scored_on}",
            "files": str(self.out),
            "next": self.next_command,
        }
        return "\n".join(f"{name:<9} {line}" for name, line in lines.items())
