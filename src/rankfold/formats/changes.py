"""Low-rank changes of named weights, apart from any model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import Incompatible, InvalidOption
from ..linalg import Squeezed, squeeze_factors
from . import card, peft, portable
from .files import complete_folder, write_text

KINDS = ("linear", "embedding", "convolution")
FORMS = ("peft", "portable")
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Changes:
    """Low-rank changes of named weights.

        W' = W0 + up @ down

    Every scale is folded into the factors. A kernel is a matrix (out, in * window), an embedding's table is
    (vocabulary, dimension).

    Args:
        pairs: up (out, r) and down (r, in) by the module's dotted path.
        kinds: by path: linear, embedding or convolution; what is not named is linear. Of other kinds (grouped
            convolution, attention projection) the other tools' forms have no agreed meaning.
        windows: the kernel's size by path, for convolutions.
        whole: tensors that replace the model's own, by parameter name.
        base: name of the model that the changes were made for, where it is known.
        source: the form that they were read from.
        flattened: whether the paths are no module's but names that only the model can undo: those in which
            underscores stand for dots, as some trainers write them, and GGUF's, whose rows may stand in
            another order, too.
        tied: by path, a module that shares the weight and changes with it, which other tools' forms cannot
            say: in those each of the two has a change of its own.

    Raises:
        InvalidOption: two factors do not multiply, or a kind or a window does not belong to a pair.

    Example:
        >>> import torch
        >>> changes = Changes({"layer": (torch.ones(3, 2), torch.ones(2, 4))})
        >>> changes.rank("layer"), changes.dense("layer")[0].tolist()
        (2, [2.0, 2.0, 2.0, 2.0])
        >>> print(changes.squeezed(rank=1))
        1 weight, rank 1
          weight  kind    shape  rank  norm
          layer   linear  3x4       1  6.93
    """

    pairs: Mapping[str, Pair]
    kinds: Mapping[str, str] = field(default_factory=dict)
    windows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    base: str = ""
    source: str = ""
    flattened: bool = False
    tied: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the parts belong together."""
        kinds = {path: self.kinds.get(path, "linear") for path in self.pairs}
        extra = sorted({*self.kinds, *self.windows} - set(self.pairs))
        if extra:
            raise InvalidOption(f"{extra[0]} has a kind or a window and no factors")
        object.__setattr__(self, "kinds", kinds)
        for path in self.pairs:
            self._check(path)

    def _check(self, path: str) -> None:
        up, down = self.pairs[path]
        if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0]:
            raise InvalidOption(
                f"{path} has factors {tuple(up.shape)} and {tuple(down.shape)}, which do not multiply"
            )
        window = self.windows.get(path, ())
        if self.kinds[path].endswith("convolution") != bool(window):
            raise InvalidOption(f"{path} is {self.kinds[path]} and has the window {window}")
        if window and down.shape[1] % _size(window):
            raise InvalidOption(
                f"{path} has {down.shape[1]} columns, which its window {window} does not divide"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The weights' paths, in order."""
        return tuple(self.pairs)

    def rank(self, path: str) -> int:
        """Return the inner dimension of a pair, which its change's rank cannot exceed."""
        return self.pairs[path][0].shape[1]

    def shape(self, path: str) -> tuple[int, int]:
        """Return (out, in) of a change."""
        up, down = self.pairs[path]
        return up.shape[0], down.shape[1]

    def dense(self, path: str) -> Tensor:
        """Return the change of one weight as a matrix (out, in)."""
        up, down = self.pairs[path]
        return up @ down

    def norm(self, path: str) -> float:
        """Return the Frobenius norm of a change, from its factors: |U D|^2 = <U^T U, D D^T>."""
        up, down = (factor.double() for factor in self.pairs[path])
        return math.sqrt(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))

    def squeezed(self, rank: int | Mapping[str, int] | None = None, energy: float | None = None) -> Changes:
        """Return the best changes of a smaller rank, by QR of the factors; no product is formed.

        Args:
            rank: of the result, for all or by path; at least 1. A pair that has less keeps its own.
            energy: part of each change's squared Frobenius norm that is kept, in (0, 1].

        Returns:
            Changes with balanced factors, up^T up = down down^T.

        Raises:
            InvalidOption: both or neither of rank and energy are given, one is out of range, or a factor
                holds NaN.
        """
        _check_target(rank, energy)
        ranks = rank if isinstance(rank, Mapping) else dict.fromkeys(self.pairs, rank)
        absent = sorted(set(self.pairs) - set(ranks))
        if absent:
            raise InvalidOption(f"rank has no entry for {absent[0]}")
        return replace(self, pairs={path: self._cut(path, ranks[path], energy) for path in self.pairs})

    def _cut(self, path: str, rank: int | None, energy: float | None) -> Pair:
        full = min(*self.shape(path), self.rank(path))
        if full == 0:
            return self.pairs[path]
        try:
            squeezed = squeeze_factors(*self.pairs[path], full)
        except InvalidOption as error:
            raise InvalidOption(f"{path}: {error}") from None
        kept = min(full, rank) if rank is not None else _within(squeezed, energy or 1.0)
        return squeezed.up[:, :kept].contiguous(), squeezed.down[:kept].contiguous()

    def save(self, path: str | Path, format: str = "peft", *, overwrite: bool = False) -> Path:
        """Write the changes as a plain LoRA folder.

        Args:
            path: the folder; it appears complete or not at all.
            format: "peft" (any kind of layer, ranks that differ, modules trained whole) or "portable" (the
                plain LoRA of linear layers that every server reads alike).
            overwrite: replace a folder that is there.

        Returns:
            The folder.

        Raises:
            InvalidOption: the format is not one of the two.
            Incompatible: the format cannot hold the changes.
            OutputExists: the folder is there.
        """
        if format not in FORMS:
            raise InvalidOption(f"format must be one of {', '.join(FORMS)}, not {format!r}")
        self._refuse(format)
        with complete_folder(path, overwrite=overwrite) as folder:
            if format == "peft":
                peft.write(folder, self.as_peft())
            else:
                portable.write(folder, self.pairs, {"base_model_name_or_path": self.base or None})
            write_text(folder / "README.md", card.model_card(self._record(), {"format": format}, "peft"))
        return Path(path)

    def _refuse(self, format: str) -> None:
        if not self.pairs:
            raise Incompatible("there is no change to write")
        if self.flattened:
            raise Incompatible(
                f"{self.paths[0]} is a {'GGUF' if self.source == 'GGUF' else 'flattened'} name, which only "
                "its model can undo; read it with model="
            )
        for path, other in self.tied.items():
            raise Incompatible(
                f"{other} shares its tensor with {path}, which is changed, as a {format} file cannot say"
            )
        for path, kind in self.kinds.items():
            if kind not in KINDS:
                raise Incompatible(
                    f"{path}: the {format} form has no agreed names for the {kind} of this change"
                )
            if format == "portable" and kind != "linear":
                raise Incompatible(f"{path}: servers read LoRA of linear layers only, and this is {kind}")
        if format == "portable" and self.whole:
            raise Incompatible(f"the portable form cannot hold {min(self.whole)}, which was trained whole")

    def as_peft(self) -> peft.PeftAdapter:
        """Return the changes in terms of peft's format, a plain LoRA of scale 1."""
        layers = {path: {"up": up, "down": down} for path, (up, down) in self.pairs.items()}
        alphas = {path: float(self.rank(path)) for path in self.pairs}
        options: dict[str, Any] = {"base_model_name_or_path": self.base or None}
        if self.whole:
            options["modules_to_save"] = sorted({key.rpartition(".")[0] for key in self.whole})
        return peft.PeftAdapter(
            "LORA",
            layers,
            dict(self.kinds),
            dict(self.windows),
            alphas,
            whole=dict(self.whole),
            options=options,
        )

    def _record(self) -> dict[str, Any]:
        return {"base": {"name": self.base}, "recipe": {"structure": ["lora"]}}

    def to_dict(self) -> dict[str, Any]:
        """Return what is known of the changes as plain data, one row a weight."""
        return {
            "source": self.source,
            "base": self.base,
            "flattened": self.flattened,
            "rows": [self._row(path) for path in self.pairs],
            "whole": sorted(self.whole),
        }

    def _row(self, path: str) -> dict[str, Any]:
        return {
            "weight": path,
            "kind": self.kinds[path],
            "shape": list(self.shape(path)),
            "window": list(self.windows.get(path, ())),
            "rank": self.rank(path),
            "norm": self.norm(path),
        }

    def __str__(self) -> str:
        """Return a short table."""
        ranks = sorted({self.rank(path) for path in self.pairs})
        span = "-".join(map(str, dict.fromkeys([ranks[0], ranks[-1]]))) if ranks else ""
        count = f"{len(self.pairs)} weight{'s' * (len(self.pairs) != 1)}"
        head = ", ".join(
            [count, *([f"rank {span}"] if span else []), *([f"from {self.source}"] if self.source else [])]
        )
        tail = [f"  whole: {', '.join(sorted(self.whole))}"] if self.whole else []
        return "\n".join([head, *_table([self._row(path) for path in self.pairs]), *tail])


def _size(window: Sequence[int]) -> int:
    return int(torch.Size(window).numel())


def _check_target(rank: int | Mapping[str, int] | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise InvalidOption("pass either rank= or energy=")
    ranks = rank.values() if isinstance(rank, Mapping) else [1 if rank is None else rank]
    wrong = [value for value in ranks if value < 1]
    if wrong:
        raise InvalidOption(f"rank must be at least 1, not {wrong[0]}")
    if energy is not None and not 0 < energy <= 1:
        raise InvalidOption(f"energy must lie in (0, 1], not {energy}")


def _within(squeezed: Squeezed, energy: float) -> int:
    """Return the smallest rank, at least 1, that keeps a part of the squared Frobenius norm."""
    squares = squeezed.values.double().square()
    rest = squares.flip(0).cumsum(0).flip(0)  # what is lost by keeping so many
    # Rounding of the last values must not keep them where all the energy is asked for.
    level = (1 - energy) * squares.sum() + squares.sum() * torch.finfo(squeezed.values.dtype).eps ** 2
    return max(1, int((rest > level).sum()))


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    heads = ("weight", "kind", "shape", "rank", "norm")
    cells = [
        (r["weight"], r["kind"], "x".join(map(str, r["shape"])), str(r["rank"]), f"{r['norm']:.3g}")
        for r in rows
    ]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(heads))]
    for row in [heads, *cells] if cells else []:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True)]
        yield f"  {'  '.join([*left, *right])}"


def read_changes(path: str | Path, model: nn.Module | None = None) -> Changes:
    """Read the low-rank changes of an adapter that lies in a file or folder, whatever tool wrote it.

    What is read is recognised by its keys: Rankfold's own folder; a peft folder (LoRA, DoRA, VeRA, LoHa,
    LoKr, GraLoRA, AdaLoRA); a safetensors file of LyCORIS, kohya's trainers or diffusers; a GGUF LoRA.
    Nothing in a file is ever run. Every pair is exact: where the change has no smaller one, a factor is the
    identity, and `Changes.squeezed` cuts it.

    Args:
        path: the file or folder.
        model: the base model. Most adapters need none. One whose change depends on the base weight (DoRA,
            products with the weight), or on widths that its file does not tell (peft's VeRA), does; and
            only a model undoes names in which underscores stand for dots, and tells a convolution's kernel
            that a file keeps as a matrix. It is not changed.

    Returns:
        The changes; paths are the model's where it is given. Without it, a GGUF file's names stay GGUF's and
        flattened names stay as they are (`flattened`; `save` refuses both), and kernels kept as a matrix
        count as linear.

    Raises:
        MissingPath: there is nothing, or no adapter.
        FormatError: it is truncated or changed, or a tensor in it is of no form that is read.
        Incompatible: it is of a method that no low-rank pair can hold, or the model is needed and not given.
        BaseMismatch: a name or a shape does not fit the model.
    """
    from .readers import read

    return read(Path(path), model)
