"""The model card that is written beside an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def model_card(record: Mapping[str, Any], notes: Mapping[str, Any]) -> str:
    """Return README.md for an adapter folder.

    Args:
        record: what the adapter's record holds.
        notes: further facts, such as metric values, by name.
    """
    base = record["base"].get("name") or record["base"].get("class") or "unknown"
    method = record.get("method", {})
    name = str(method.get("name", record["recipe"].get("structure", ["?"])[0]))
    rows = {"base model": base, "method": record.get("point", name), "seed": record.get("seed"), **notes}
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    paper = f"{method.get('title', '')} ({method.get('year', '')})"
    link = f", arXiv {method['arxiv']}" if method.get("arxiv") else ""
    return f"""---
base_model: {base}
library_name: rankfold
tags:
- rankfold
- {name}
---

# {name} adapter for {base}

{method.get("formula", "")}

| | |
|---|---|
{table}

Paper: {paper}{link}

Load it into its base model:

```python
import rankfold as rf

model = rf.load(model, "path/to/this/folder")
```
"""
