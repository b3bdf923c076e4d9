"""The same for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_SHOWN = 40  # tensors of a comparison


def facts_text(found: dict[str, Any]) -> str:
    """What ``facts`` found."""
    layout, attempts = found["layout"], found["attempts"]
    where = f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x data {layout['data']}"
    precision = "bfloat16 with float32 masters" if layout["bf16"] else "float32"
    offload = "".join(f", {name}" for name in layout["offload"])
    progress = f"{found['step']} updates"
    if attempts is not None:
        progress += f", {attempts - found['step']} skipped"
    if found["tokens"] is not None:
        progress += f", {found['tokens']:,} tokens"
    lines = [
        ("checkpoint", found["path"]),
        ("progress", progress),
        ("method", f"{found['method']} ({_pairs(found['method_config'])})"),
        ("model", _pairs(found["model"])),
        ("written by", f"{layout['ranks']} rank(s): {where}, ZeRO-{layout['zero']}{offload}, {precision}"),
        ("versions", _pairs(found["versions"])),
        ("hashes", "verified" if found["verified"] else "not verified"),
    ]
    head = "\n".join(f"{name:<12}{text}" for name, text in lines if text)
    files = [["file", "bytes"], *([name, f"{size:,}"] for name, size in found["files"].items())]
    return f"{head}\n\n{table(files)}\n\n{table(_kinds(found))}"


def tensors_text(tensors: dict[str, dict[str, Any]]) -> str:
    """Values of tensors, one a line."""
    head = ["tensor", "shape", "type", "norm", "min", "max", "zeros", "not finite"]
    rows = [
        [
            name, "x".join(map(str, it["shape"])) or "scalar", it["dtype"], f"{it['norm']:.6g}", _number(it["min"]),
            _number(it["max"]), f"{100 * it['zeros']:.2f} %", f"{it['not_finite']:,}",
        ]
        for name, it in tensors.items()
    ]  # fmt: skip
    return table([head, *rows], left=3)


def list_text(found: dict[str, Any]) -> str:
    """Checkpoints of a folder, one a line."""
    state = "intact" if found["verified"] else "sizes right"
    rows = [["checkpoint", "ranks", "bytes", ""]]
    for entry in found["checkpoints"]:
        named = ", latest" if entry["latest"] else ""
        if "error" in entry:
            rows.append([entry["name"], "", "", f"DAMAGED{named}: {entry['error']}"])
        else:
            rows.append([entry["name"], str(entry["ranks"]), f"{entry['bytes']:,}", state + named])
    text = table(rows, right=(1, 2))
    return text if not found["latest"].startswith("none") else f"{text}\nlatest: {found['latest']}"


def comparison_text(found: dict[str, Any]) -> str:
    """What ``compare`` found."""
    lines = [f"only in {found[side]}: {name}" for side in ("one", "other") for name in found[f"only_in_{side}"]]
    lines += [f"{key} differs" for key in found["state"]]
    if found["different"]:
        rows = [["tensor", "elements that differ", "largest difference", "relative to the largest element"]]
        shown = sorted(found["different"].items(), key=lambda item: -item[1].get("relative", math.inf))[:_SHOWN]
        rows += [[name, *_difference(it)] for name, it in shown]
        lines.append(table(rows))
    if len(found["different"]) > _SHOWN:
        lines.append(f"and {len(found['different']) - _SHOWN} tensors that differ less; --json names all")
    same = found["tensors"] - len(found["different"])
    lines.append(f"{same} of {found['tensors']} tensors in both are equal bit by bit")
    return "\n".join(lines)


def table(rows: Sequence[Sequence[str]], left: int = 1, right: Sequence[int] | None = None) -> str:
    """Columns under each other, those in ``right`` (default: from ``left`` on) aligned at the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = range(left, len(widths)) if right is None else right
    lines = [
        "  ".join(f"{cell:>{width}}" if at in numbers else f"{cell:<{width}}" for at, (cell, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def _kinds(found: dict[str, Any]) -> list[list[str]]:
    total = {
        "tensors": sum(it["tensors"] for it in found["kinds"].values()),
        "elements": sum(it["elements"] for it in found["kinds"].values()),
        "bytes": found["bytes"],
        "bytes_per_parameter": found["bytes_per_parameter"],
    }
    rows = [["kind", "tensors", "elements", "bytes", f"bytes per parameter ({found['parameters']:,} of them)"]]
    for kind, it in [*found["kinds"].items(), ("files in all", total)]:
        each = it["bytes_per_parameter"]
        shown = "" if each is None else f"{each:.3f}"
        rows.append([kind, f"{it['tensors']:,}", f"{it['elements']:,}", f"{it['bytes']:,}", shown])
    return rows


def _difference(it: dict[str, Any]) -> list[str]:
    if "shapes" in it:
        return ["all", " and ".join(map(str, it["shapes"])), " and ".join(it["dtypes"])]
    return [f"{it['elements']:,}", f"{it['absolute']:.6g}", f"{it['relative']:.6g}"]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
