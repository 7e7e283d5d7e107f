"""What one pretraining run is asked to do."""

from dataclasses import dataclass, field
from typing import Any

from rankfold.errors import InvalidOption
from rankfold.training.config import (
    require,
    require_choices,
    require_counts,
    require_one_length,
    require_positive,
)

CHOICES = {
    "dtype": ("float32", "bfloat16", "mixed"),
    "device": ("auto", "cpu", "cuda"),
}


@dataclass(frozen=True)
class PretrainConfig:
    """The settings of one run; each is also a flag of `rankfold pretrain` and a key of its config file.

    Args:
        model: a size of the ladder, such as `1M`, or the file, folder or hub name of a transformers
            configuration.
        out: folder that receives the model; only a plan needs none.
        data: text files, folders of .txt files and globs; none reads the sources of Python's standard
            library.
        eval_data: text of the perplexity, as `data`; none holds some of the documents out.
        held_out: share of the text that is held out, in (0, 1).
        tokenizer: folder, file or hub name of a tokenizer; none trains a byte-level BPE on the text.
        vocab: tokens of the tokenizer that is trained, or None for the model's.
        length: tokens per sequence.
        optimizer: `adamw`, or an optimizer of the catalogue, such as `galore`.
        structure: the point of the weights, such as `sltrain` or `lora/relora`; none trains them as they are.
        rank: of the structure, or None for a quarter of the model's width.
        targets: the modules that get the structure: presets, globs, regexes or paths.
        set: options by axis, such as `{"optimizer.rank": 64, "structure.density": 0.05}`.
        lr: peak learning rate, or None for the optimizer's.
        epochs: passes over the text (1 when neither it nor `steps` is given).
        steps: optimizer steps, instead of `epochs`.
        batch_size: sequences per forward pass and device.
        accumulate: forward passes per optimizer step.
        warmup: share of the steps over which the learning rate climbs, in [0, 1).
        floor: share of the peak that the cosine ends at, in [0, 1].
        clip: largest norm of all gradients together; 0 does not limit it.
        seed: decides the start and the order of the data.
        dtype: `float32`; `bfloat16`, weights and all; or `mixed`, float32 weights computed with in bfloat16.
        compile: compile the model.
        checkpointing: keep the input of every block only, and compute the block again in the backward pass.
        step_in_backward: move every weight as soon as its gradient is there, so that one is alive at a time;
            for projected optimizers, with `clip` 0, no accumulation and one process.
        fsdp: shard weights, gradients and optimizer state over the processes (FSDP2).
        device: `auto`, `cpu` or `cuda`.
        eval_steps: optimizer steps between two measurements of the perplexity, or None for a tenth.
        eval_blocks: sequences that it is measured on.
        save_steps: optimizer steps between checkpoints, or None for a tenth of the run.

    Raises:
        InvalidOption: when a value cannot be meant.
    """

    model: str
    out: str | None = None
    data: tuple[str, ...] = ()
    eval_data: tuple[str, ...] = ()
    held_out: float = 0.05
    tokenizer: str | None = None
    vocab: int | None = None
    length: int = 256
    optimizer: str = "adamw"
    structure: str | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ()
    set: dict[str, Any] = field(default_factory=dict)
    lr: float | None = None
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    warmup: float = 0.1
    floor: float = 0.1
    clip: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    compile: bool = False
    checkpointing: bool = False
    step_in_backward: bool = False
    fsdp: bool = False
    device: str = "auto"
    eval_steps: int | None = None
    eval_blocks: int = 128
    save_steps: int | None = None

    def __post_init__(self) -> None:
        require_choices(self, CHOICES)
        require_positive(self, "lr", "epochs")
        for name in ("model", "out", "tokenizer", "structure", "optimizer"):
            require(self, name, lambda value: value.strip(), "a name")
        for name in ("data", "eval_data", "targets"):
            require(self, name, lambda values: all(value.strip() for value in values), "no empty name")
        require_counts(self, "vocab", "rank", "steps", "batch_size", "accumulate")
        require_counts(self, "save_steps", "eval_steps", "eval_blocks")
        require_one_length(self)
        require(self, "length", lambda value: value >= 2, "at least 2, a token and the one it predicts")
        require(self, "held_out", lambda value: 0 < value < 1, "above 0 and below 1")
        require(self, "warmup", lambda value: 0 <= value < 1, "at least 0 and below 1")
        require(self, "floor", lambda value: 0 <= value <= 1, "between 0 and 1")
        require(self, "clip", lambda value: 0 <= value < float("inf"), "a finite number of at least 0")
        if self.step_in_backward and (self.clip or self.accumulate > 1 or self.fsdp):
            raise InvalidOption(
                "step_in_backward frees gradients one by one: it needs clip 0, accumulate 1 and no fsdp"
            )
        require(self, "seed", lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1")
