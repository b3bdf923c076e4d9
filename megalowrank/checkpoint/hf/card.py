"""README.md of an exported model: how it was trained, and how far the conversion is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalowrank import __version__
from megalowrank.checkpoint.folder import write_text

_HEAD = """---
library_name: {library}
pipeline_tag: text-generation
tags:
- megalowrank
- {method}
---

# {title}

{text}

| | |
|---|---|
"""
_LABELS = {
    "rank": "rank", "scale": "scale of the low-rank term", "updates": "updates", "tokens": "tokens",
    "loss": "training loss, nats per token", "eval_loss": "held-out loss, nats per token", "imported": "imported from",
    "version": "trained with megalowrank",
}  # fmt: skip


def write_card(
    folder: Path, title: str, origin: dict[str, Any], facts: dict[str, Any], text: str, library: str = "transformers"
) -> None:
    """Write README.md; ``origin`` is what ``plain.origin`` says, ``facts`` are further rows of the table."""
    method = origin.get("method", "unknown")
    rows = {"method": method}
    rows.update({label: _shown(origin[key]) for key, label in _LABELS.items() if key in origin})
    if "loss" not in origin and "imported" not in origin:
        rows["training loss"] = "not recorded"
    rows.update(facts)
    rows["converted with megalowrank"] = __version__
    head = _HEAD.format(library=library, method=method, title=title, text=text)
    write_text(folder / "README.md", head + "".join(f"| {label} | {value} |\n" for label, value in rows.items()))


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
