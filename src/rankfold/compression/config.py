"""What one compression is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rankfold.errors import InvalidOption
from rankfold.training.config import require, require_choices, require_counts, require_positive

CHOICES = {
    "calibration": ("parallel", "sequential"),
    "solver": ("exact", "randomised"),
    "form": ("expression", "layers", "dense"),
    "few_tokens": ("error", "allow"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "device": ("auto", "cpu", "cuda"),
}
AXES = ("compress", "share")  # of options


@dataclass(frozen=True)
class CompressConfig:
    """The settings of one compression; each is a flag of `rankfold compress` and a key of its config file.

    Args:
        model: folder or hub name of a pretrained model, or a folder that `rankfold pretrain` or `rankfold
            compress` left.
        out: folder that receives the compressed model; only a plan needs none.
        method: of the catalogue's axis compress.
        keep: share of the targeted weights' numbers that may remain, in (0, 1]; None takes 0.7.
        data: text to calibrate on: a .txt, .jsonl, .json, .csv, .tsv or .parquet file, a folder of .txt
            files, or a dataset of the hub; methods without statistics need none.
        eval_data: unseen text of the measurements before and after, as `data`; None holds a share of `data`
            out. With a column of labels and a model that classifies, its accuracy is measured.
        held_out: share of the sequences of `data` that is held out, in (0, 1).
        text: column that holds the text.
        label: column of `eval_data` that holds the label.
        tokens: of calibration, at most.
        samples: sequences of calibration, at most (when neither it nor `tokens` is given, 256 packed ones, or
            1024 texts for a model that does not predict tokens).
        eval_samples: sequences that are measured on, at most.
        length: tokens per sequence, or None for 512 or what the model can hold, whichever is less.
        batch_size: sequences per forward pass.
        targets: which weights: presets, globs, regexes or paths; none takes the method's own.
        share: how the parameters are shared out over the weights; None takes the method's own.
        calibration: `parallel` or `sequential`, or None for the method's own.
        solver: `exact` or `randomised`, or None for the method's own.
        set: options by axis, such as `{"compress.damping": 0.01, "share.exact": True}`.
        original: folder or hub name of the model before it was compressed, for methods that compensate.
        few_tokens: `error` refuses fewer tokens than a weight has inputs, `allow` does not.
        memory: GiB that the statistics of one pass over the data may take, or None for about those of one
            layer; more means fewer passes.
        seed: of every random choice.
        dtype: `auto`, as the checkpoint has it, `float32`, `bfloat16` or `float16`; also of the result.
        device: `auto`, `cpu` or `cuda`.
        form: `expression`, Rankfold's own; `layers`, two plain layers in the place of one, which transformers
            loads with `trust_remote_code=True`; or `dense`, multiplied out, a stock model of the old size.

    Raises:
        InvalidOption: when a value cannot be meant.
    """

    model: str
    out: str | None = None
    method: str = "svd-llm"
    keep: float | None = None
    data: str | None = None
    eval_data: str | None = None
    held_out: float = 0.1
    text: str | None = None
    label: str | None = None
    tokens: int | None = None
    samples: int | None = None
    eval_samples: int = 128
    length: int | None = None
    batch_size: int = 8
    targets: tuple[str, ...] = ()
    share: str | None = None
    calibration: str | None = None
    solver: str | None = None
    set: dict[str, Any] = field(default_factory=dict)
    original: str | None = None
    few_tokens: str = "error"
    memory: float | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    form: str = "expression"

    def __post_init__(self) -> None:
        require_choices(self, CHOICES)
        require_positive(self, "memory")
        require_counts(self, "tokens", "samples", "eval_samples", "batch_size")
        require(self, "keep", lambda value: 0 < value <= 1, "the share that remains, above 0 and at most 1")
        require(self, "held_out", lambda value: 0 < value < 1, "above 0 and below 1")
        require(self, "length", lambda value: value >= 2, "at least 2, a token and the one it predicts")
        require(self, "seed", lambda value: 0 <= value < 2**32, "between 0 and 2**32 - 1")
        for name in ("model", "out", "method", "data", "eval_data", "original", "share"):
            require(self, name, lambda value: value.strip(), "a name")
        if self.tokens is not None and self.samples is not None:
            raise InvalidOption("tokens and samples both say how much to calibrate on; give one of them")
        for name in self.set:
            if name.partition(".")[0] not in AXES:
                raise InvalidOption(f"{name} is an option of no axis here; write {' or '.join(AXES)}.option")

    def options(self, axis: str) -> dict[str, Any]:
        """Return the options of an axis by their names.

        Example:
            >>> CompressConfig("m", set={"compress.damping": 0.1, "share.exact": True}).options("share")
            {'exact': True}
        """
        start = f"{axis}."
        return {name[len(start) :]: value for name, value in self.set.items() if name.startswith(start)}
