"""A text classification data set that every installation holds: which sub-package does a docstring document?

The docstrings come from the source files of the installed libraries, read by `ast` and never imported. The
object's own name, the names on the path of its module and the names of all the libraries are masked, so that
what is left to classify by is what the text says. A module belongs to one split only, and of texts that start
alike one is kept.

    python examples/docstrings.py        # counts per class, and a few examples
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

SUBPACKAGES = (
    "torch.nn",
    "torch.distributed",
    "torch._inductor",
    "networkx",
    "transformers.models",
    "huggingface_hub",
    "datasets",
    "pandas.core",
    "sklearn",
    "matplotlib",
)
"""The classes, in the order of their labels."""

MASK = "[MASK]"
SPLIT_SIZES = {"test": 100, "validation": 30, "train": 180}
"""Examples of each class in each split; splits are filled in this order."""

LARGEST_SHARE = {"test": 10, "validation": 10, "train": 30}
"""Examples taken from one module at most, so that no module speaks for its class."""

MOST_MODULES = 130
"""Modules of each class that are read at most: enough for every split, and quick."""

SKIPPED = {"tests", "testing", "_vendor"}
"""Folders whose modules document something else."""

FEWEST_WORDS = 10
LONGEST_TEXT = 400
"""Characters kept: a little more than the 64 tokens that the model reads."""

FINGERPRINT_WORDS = 8
"""Two texts whose first words agree this far count as duplicates."""

GIVEAWAYS = frozenset(
    {"torch", "pytorch", "nn", "distributed", "dist", "inductor", "_inductor", "torchinductor"}
    | {"transformers", "models", "huggingface", "hugging", "hub", "huggingface_hub", "hf", "datasets"}
    | {"pandas", "pd", "core", "sklearn", "scikit", "learn", "matplotlib", "mpl", "plt", "pyplot"}
    | {"networkx", "nx", "numpy", "np"}
)
"""Library names, their aliases and their sub-packages; masked in every text, whatever its class."""


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Example:
    """One masked docstring: its text, its label (an index into `SUBPACKAGES`) and where it stands."""

    text: str
    label: int
    module: str
    name: str


@dataclass(frozen=True)
class Docstrings:
    """The data set: three lists of examples that share neither modules nor texts."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def splits(self) -> dict[str, list[Example]]:
        """The lists by name."""
        return {"train": self.train, "validation": self.validation, "test": self.test}


def load(root: Path | None = None, seed: int = 0) -> Docstrings:
    """The data set from the libraries under `root` (default: where this Python installs libraries).

    Args:
        root: a folder that holds the libraries' source files.
        seed: decides which modules go to which split and which examples are kept.

    Raises:
        FileNotFoundError: a sub-package is not installed, or has too few docstrings.
    """
    root = root or Path(sysconfig.get_paths()["purelib"])
    distinct = drop_duplicates(
        [
            example
            for label, package in enumerate(SUBPACKAGES)
            for path in _modules(root, package, random.Random(f"{seed} {package} modules"))
            for example in _documented(root, path, label)
        ]
    )
    split: dict[str, list[Example]] = {name: [] for name in SPLIT_SIZES}
    for label, package in enumerate(SUBPACKAGES):
        own = [example for example in distinct if example.label == label]
        for name, part in _split_by_module(own, package, random.Random(f"{seed} {package}")).items():
            split[name] += part
    return Docstrings(**split)


def mask(text: str, names: Set[str]) -> str:
    """The text with every word of `names` (lower case) replaced by the mask; `_` joins and separates words.

    >>> mask("Apply Linear to x; see torch.nn.Linear and torch_geometric.", {"linear", "torch", "nn"})
    'Apply [MASK] to x; see [MASK].[MASK].[MASK] and [MASK]_geometric.'
    """

    def word(match: re.Match[str]) -> str:
        return MASK if match[0].lower() in names else match[0]

    return re.sub(r"[A-Za-z0-9]+", word, re.sub(r"\w+", word, text))


def hidden_names(module: str, name: str) -> set[str]:
    """What is masked in the docstring of `name` in `module`: both, their parts, and every library's name.

    >>> sorted(hidden_names("torch.nn.modules.batch_norm", "_Batch") - GIVEAWAYS)
    ['_batch', 'batch', 'batch_norm', 'batchnorm', 'modules', 'norm']
    """
    whole = {part.lower() for part in (*module.split("."), name)}
    bare = {part.strip("_") for part in whole}
    pieces = {piece for part in module.lower().split(".") for piece in part.split("_")}
    return (whole | bare | pieces | {part.replace("_", "") for part in bare} | GIVEAWAYS) - {""}


def fingerprint(text: str) -> str:
    """The first words of a text, in lower case and without digits and marks: equal for near copies.

    >>> fingerprint("Applies a 1D max-pool, see below.") == fingerprint("Applies a 2D max pool (see below)!")
    True
    """
    return " ".join(re.findall(r"[a-z]+", text.lower())[:FINGERPRINT_WORDS])


def drop_duplicates(examples: Sequence[Example]) -> list[Example]:
    """The first example of each fingerprint; none of a fingerprint that occurs in two classes."""
    classes: dict[str, set[int]] = {}
    first: dict[str, Example] = {}
    for example in examples:
        key = fingerprint(example.text)
        classes.setdefault(key, set()).add(example.label)
        first.setdefault(key, example)
    return [example for key, example in first.items() if len(classes[key]) == 1]


def _modules(root: Path, package: str, chance: random.Random) -> list[Path]:
    """Source files of a sub-package, at most `MOST_MODULES`, in an order that depends on the seed alone."""
    folder = root.joinpath(*package.split("."))
    if not folder.is_dir():
        raise FileNotFoundError(f"{package}: not found in {root}; install the library with its source files")
    paths = [path for path in folder.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts)]
    paths.sort(key=lambda path: path.relative_to(root).parts)
    chance.shuffle(paths)
    return paths[:MOST_MODULES]


def _documented(root: Path, path: Path, label: int) -> Iterator[Example]:
    parts = path.relative_to(root).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    for node in _definitions(ast.parse(path.read_text(encoding="utf-8"))):
        text = " ".join((ast.get_docstring(node) or "").split())[:LONGEST_TEXT]
        text = mask(text, hidden_names(module, node.name))
        if len(re.findall(r"[A-Za-z]{2,}", text.replace(MASK, ""))) >= FEWEST_WORDS:
            yield Example(text, label, module, node.name)


def _definitions(parent: ast.AST) -> Iterator[Definition]:
    """Functions and classes below a node, without a look into the expressions: those are most of a tree."""
    for block in ("body", "orelse", "finalbody"):
        for node in getattr(parent, block, ()):
            if isinstance(node, Definition):
                yield node
            yield from _definitions(node)


def _split_by_module(
    examples: list[Example], package: str, chance: random.Random
) -> dict[str, list[Example]]:
    """Fill the splits module by module; what a split does not need of its last module is left out."""
    modules: dict[str, list[Example]] = {}
    for example in examples:
        modules.setdefault(example.module, []).append(example)
    order = list(modules)
    chance.shuffle(order)
    split = {}
    for name, size in SPLIT_SIZES.items():
        part: list[Example] = []
        while len(part) < size:
            if not order:
                raise FileNotFoundError(f"{package}: too few docstrings to fill the {name} split with {size}")
            own = modules[order.pop()]
            part += chance.sample(own, min(len(own), LARGEST_SHARE[name]))
        split[name] = part[:size]
    return split


def _describe(docstrings: Docstrings) -> None:
    for name, examples in docstrings.splits.items():
        modules = Counter(SUBPACKAGES[label] for _, label in {(e.module, e.label) for e in examples})
        print(f"{name}: {len(examples)} examples; modules: {dict(modules)}")
    for example in docstrings.test[:: SPLIT_SIZES["test"] // 3]:
        print(f"{SUBPACKAGES[example.label]:20s} {example.text[:140]}")


if __name__ == "__main__":
    _describe(load())
