"""The README of a merged model, as the model hub reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from .. import catalogue
from .report import MergeReport


def model_card(report: MergeReport) -> str:
    """Return the README of a merged model: what was merged, how, and the paper.

    Example:
        >>> report = MergeReport("linear", {"normalize": True}, ["one", "two"], "", [1.0, 3.0], 0, "float32")
        >>> "| two | 3 |" in model_card(report)
        True
    """
    method = catalogue.get("merge", report.method)
    tags = ["rankfold", "merge", *([f"arxiv:{method.arxiv}"] if method.arxiv else [])]
    parts = [
        "\n".join(["---", "tags:", *(f"- {tag}" for tag in tags), "---"]),
        f"# A merge of {len(report.models)} models by {method.name}",
        f"    {method.formula}",
        _table(("model", "weight"), _models(report)),
        _table(("", ""), _settings(report)),
        f"Paper: {method.title} ({method.year})" + (f", arXiv {method.arxiv}" if method.arxiv else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _models(report: MergeReport) -> Iterator[tuple[str, str]]:
    if report.base:
        yield Path(report.base).name, "base"
    for label, weight in zip(report.models, report.weights, strict=True):
        yield Path(label).name, f"{weight:g}"


def _settings(report: MergeReport) -> Iterator[tuple[str, str]]:
    for key, value in report.options.items():
        yield key, json.dumps(value, default=str)
    yield from (("dtype", report.dtype), ("seed", str(report.seed)))


def _table(heads: tuple[str, str], rows: Iterator[tuple[str, str]]) -> str:
    lines = [heads, ("---", "---"), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)
