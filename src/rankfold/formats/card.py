"""The model card that is written beside an adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def model_card(record: Mapping[str, Any], notes: Mapping[str, Any], library: str = "rankfold") -> str:
    """Return README.md for an adapter folder.

    Args:
        record: what the adapter's record holds.
        notes: further facts, such as metric values, by name.
        library: that the adapter's form belongs to.
    """
    base = str(record["base"].get("name") or record["base"].get("class") or "an unnamed model")
    method = record.get("method", {})
    name = str(method.get("name", record["recipe"]["structure"][0]))
    rows = {"base model": base, "method": record.get("point", name), "seed": record.get("seed"), **notes}
    parts = [
        _front_matter(record, name, library),
        f"# {name} adapter for {base}",
        f"    {method['formula']}" if method.get("formula") else "",
        "\n".join(
            ["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())]
        ),
        _paper(method),
        "Load it into its base model:",
        '```python\nimport rankfold as rf\n\nmodel = rf.load(model, "path/to/this/folder")\n```',
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(record: Mapping[str, Any], name: str, library: str) -> str:
    """Return what the hub reads; it would refuse a base that is no hub name, so that is left out."""
    base = str(record["base"].get("name") or "")
    lines = [f"base_model: {json.dumps(base)}"] if _HUB_NAME.fullmatch(base) else []
    lines += [f"library_name: {library}", "tags:", "- rankfold", f"- {name}"]
    arxiv = record.get("method", {}).get("arxiv")
    return "\n".join(["---", *lines, *([f"- arxiv:{arxiv}"] if arxiv else []), "---"])


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _paper(method: Mapping[str, Any]) -> str:
    if not method.get("title"):
        return ""
    link = f", arXiv {method['arxiv']}" if method.get("arxiv") else ""
    return f"Paper: {method['title']} ({method['year']}){link}"
