"""A benchmark's result as text, and a sweep's as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from focal_d2.errors import UserError, reason
from focal_d2.storage.files import create_file


def as_text(result: dict[str, Any]) -> str:
    """Write a result for a terminal.

    Args:
        result: "setting", "hardware" and "rows", as `focal-d2 benchmark --json` prints them.
    """
    lines = [", ".join(f"{k} {v}" for k, v in result[part].items()) for part in ("hardware", "setting")]
    for row in result["rows"]:
        lines.append(f"\n{row['name']}" if "name" in row else f"\n{row['field']} {row['value']}")
        for who in ("ours", "detectron2", "limit"):
            parts = [f"  {who:<11}"]
            if row[who] is not None:
                parts.append(f"{row[who] * 1000:10.1f} ms")
            if row[f"{who}_bytes"] is not None:
                parts.append(f"{row[f'{who}_bytes'] / 2**20:10.1f} MiB")
            if who == "limit":
                parts.append(f"  ({row['limit_is']})")
            lines.append(" ".join(parts))
        for ratio, text in _RATIOS.items():
            if row[ratio] is not None:
                lines.append(f"  ours is {row[ratio]:.3f} × {text}")
    return "\n".join(lines)


_RATIOS = {
    "speedup": "as fast as detectron2",
    "over_limit": "the limit's time",
    "memory_of_detectron2": "detectron2's memory",
    "memory_over_limit": "the limit's memory",
}
_UNITS = {
    "size": "pixels, height and width",
    "batch": "images",
    "classes": "classes",
    "boxes": "boxes an image",
}


def plot_sweep(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a step's time (top) and memory (bottom) over each field that was swept.

    Raises:
        UserError: if the file cannot be written.
    """
    fields = list(dict.fromkeys(row["field"] for row in rows))
    figure = Figure(figsize=(3.6 * len(fields), 6), layout="tight")
    axes = figure.subplots(2, len(fields), squeeze=False)
    for column, field in enumerate(fields):
        of_field = [row for row in rows if row["field"] == field]
        values = [row["value"] for row in of_field]
        for line, colour, style in (("detectron2", "C3", "o-"), ("ours", "C0", "o-"), ("limit", "0.6", "--")):
            label = "network alone" if line == "limit" else "focal_d2" if line == "ours" else line
            seconds = [row[line] for row in of_field]
            gib = [row[f"{line}_bytes"] / 2**30 for row in of_field]
            axes[0][column].plot(values, seconds, style, color=colour, label=label)
            axes[1][column].plot(values, gib, style, color=colour, label=label)
        for row_of_axes in axes:
            axis = row_of_axes[column]
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if field in ("classes", "boxes"):
                axis.set_xscale("log")
            axis.set_xlabel(_UNITS[field])
    axes[0][0].set_ylabel("step, s")
    axes[1][0].set_ylabel("peak memory of a step, GiB")
    axes[0][0].legend(frameon=False)
    try:
        with create_file(path) as file:
            figure.savefig(file, dpi=110, format=path.suffix[1:] or "png")
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
