"""What a pretraining run would do, and what it did."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rankfold.layers import Counts
from rankfold.pretrain.config import PretrainConfig
from rankfold.pretrain.memory import StepMemory, table
from rankfold.training.config import json_settings
from rankfold.training.memory import readable
from rankfold.training.metrics import Score


@dataclass(frozen=True)
class PretrainPlan:
    """What a run would do, found before it trains anything.

    Args:
        config: the settings, with what was found filled in.
        parameters: of the model without a structure.
        trainable: numbers that train.
        modules: weights that get the structure.
        optimizer: what it projects, in words.
        text: documents, tokens and vocabulary.
        steps: optimizer steps.
        tokens: of all steps.
        memory: predicted bytes of a step in one process.
    """

    config: PretrainConfig
    parameters: int
    trainable: int
    modules: int
    optimizer: str
    text: Mapping[str, Any]
    steps: int
    tokens: int
    memory: StepMemory

    @property
    def title(self) -> str:
        """The run in a few words."""
        return ", ".join(filter(None, (self.config.model, self.config.structure, self.config.optimizer)))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON-like data; memory in bytes."""
        return {
            "parameters": self.parameters,
            "trainable": self.trainable,
            "modules": self.modules,
            "optimizer": self.optimizer,
            "text": dict(self.text),
            "steps": self.steps,
            "tokens": self.tokens,
            "memory": self.memory.to_dict(),
            "config": json_settings(self.config),
        }

    def __str__(self) -> str:
        """Return the plan for a person."""
        config, text = self.config, self.text
        structure = f"{config.structure} in {self.modules} weights" if config.structure else "dense weights"
        lines = {
            "model": f"{config.model}: {self.parameters:,} parameters, vocabulary {text['vocabulary']:,}",
            "text": f"{text['tokens']:,} tokens in {text['documents']:,} documents, "
            f"{text['held_out_tokens']:,} in {text['held_out_documents']:,} held out",
            "weights": f"{structure}; {self.trainable:,} numbers train",
            "optimizer": f"{self.optimizer}; lr {config.lr:.3g}",
            "steps": f"{self.steps:,} on {self.tokens // self.steps:,} tokens each",
            "memory": f"{self.memory} (predicted, of a step)",
        }
        return "\n".join(f"{name:<10} {line}" for name, line in lines.items())


@dataclass(frozen=True)
class PretrainResult:
    """What a run did.

    Args:
        plan: what it was to do.
        out: the folder of the model.
        seconds: training time of this process.
        trained_tokens: of the steps that this process took part in.
        measured: bytes of a step, counted while it ran.
        peak_memory: bytes: of the GPU where one was used, else of the process with all its libraries.
        before: on the text that is held out, at random.
        after: likewise, when it was trained.
        reason: why the model is in Rankfold's form, or None where it is a stock one.
        numbers: of the model before it was folded: stored, active and deployed.
        earlier: what `to_dict` takes from the run before this one, where no step was left to take.
    """

    plan: PretrainPlan
    out: Path
    seconds: float
    trained_tokens: int
    measured: StepMemory
    peak_memory: int
    before: Score | None
    after: Score
    reason: str | None
    numbers: Counts | None = None
    earlier: Mapping[str, Any] = field(default_factory=dict)

    @property
    def loads_with(self) -> str:
        """Python that loads the model."""
        if self.reason is None:
            return f"AutoModelForCausalLM.from_pretrained({str(self.out)!r})"
        return f"rankfold.pretrain.load_pretrained({str(self.out)!r})"

    @property
    def facts(self) -> dict[str, str]:
        """What a structure's card says of the run."""
        return {
            "model": self.plan.config.model,
            "parameters": f"{self.plan.parameters:,}",
            "tokens": f"{self.plan.tokens:,}",
            "optimizer": self.plan.optimizer,
            "held out": str(self.after),
        }

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.trained_tokens / max(self.seconds, 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-like data: seconds, bytes, nats."""
        plan = self.plan.to_dict()
        return {
            **{key: plan[key] for key in plan if key != "memory"},
            "out": str(self.out),
            "seconds": self.seconds,
            "tokens_per_second": self.speed,
            "memory": {"predicted": plan["memory"], "measured": self.measured.to_dict()},
            "peak_memory": self.peak_memory,
            "before": None if self.before is None else self.before.to_dict(),
            "after": self.after.to_dict(),
            "numbers": None if self.numbers is None else asdict(self.numbers),
            "stock": self.reason is None,
            "reason": self.reason,
            "loads_with": self.loads_with,
            **self.earlier,
        }

    def __str__(self) -> str:
        """Return the summary for a person."""
        lines = {
            "time": f"{self.seconds:.1f} s, {self.speed:,.0f} tokens/s" if self.trained_tokens else "",
            "before": "" if self.before is None else str(self.before),
            "after": str(self.after),
            "numbers": "" if self.numbers is None else str(self.numbers),
            "peak": f"{readable(self.peak_memory)}, of the process with its libraries or of the GPU",
            "form": "a stock model" if self.reason is None else f"Rankfold's: {self.reason}",
            "load": self.loads_with,
        }
        said = [f"{name:<10} {line}" for name, line in lines.items() if line]
        return "\n".join([*said, "memory of a step", table(self.plan.memory, self.measured)])


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], title: str, path: Path) -> None:
    """Draw the losses against the tokens that were read.

    Args:
        curves: of `train` and `held_out`.
        title: over the picture.
        path: of the .png file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, style in (("train", {"linewidth": 0.8}), ("held_out", {"marker": "o", "linewidth": 1.6})):
        points = curves[name]
        label = name.replace("_", " ")
        axes.plot([p["tokens"] for p in points], [p["loss"] for p in points], label=label, **style)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
