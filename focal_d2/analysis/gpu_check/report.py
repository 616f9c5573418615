"""The results as JSON and as a Markdown table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focal_d2.analysis.gpu_check.lines import Line
from focal_d2.analysis.gpu_check.run import PartResult
from focal_d2.storage.files import write_aside

JSON_FILE, TABLE_FILE = "gpu_check.json", "gpu_check.md"
REHEARSAL_NOTE = "This is a rehearsal on a CPU: it shows that the command runs, and measures nothing."
# The parts that decide whether `MODEL.FOCAL.KERNELS: auto` may use the kernels on a GPU.
DECIDING = (1, 2, 3, 4)


def write_results(folder: Path, header: dict[str, Any], results: Sequence[PartResult]) -> None:
    """Write both files whole.

    Args:
        folder: where they go.
        header: what was measured on: "device", "rehearsal", "minutes".
        results: of the parts so far.
    """
    content = _without_nan({**header, "parts": [_as_dict(result) for result in results]})
    texts = {
        JSON_FILE: json.dumps(content, indent=1, default=str, allow_nan=False),
        TABLE_FILE: as_table(header, results),
    }
    for name, text in texts.items():
        data = f"{text}\n".encode()
        write_aside(str(folder / name), lambda file, data=data: file.write(data))  # type: ignore[misc]


def _as_dict(result: PartResult) -> dict[str, Any]:
    lines = [line._asdict() for line in result.lines]
    return {**result._asdict(), "lines": lines, "passed": result.passed}


def _without_nan(x: Any) -> Any:
    """Return lists, dicts and numbers with NaN and infinity as text: JSON has no such numbers."""
    if isinstance(x, dict):
        return {str(key): _without_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_without_nan(value) for value in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def as_table(header: dict[str, Any], results: Sequence[PartResult]) -> str:
    """Write the results as Markdown: a table for each part."""
    texts = ["# GPU check", ", ".join(f"{key}: {value}" for key, value in header.items())]
    if header["rehearsal"]:
        texts.append(f"**{REHEARSAL_NOTE}**")
    passed = {result.number: result.passed for result in results}
    verdicts = [f"{n}: {'passed' if passed[n] else 'not passed'}" for n in DECIDING if n in passed]
    texts.append(f"Parts that decide on the kernels: {', '.join(verdicts) or 'none has run'}.")
    for result in results:
        texts.append(f"## {result.number}. {result.title}")
        texts.append(f"{result.seconds:.0f} s of {result.budget:.0f}. {result.problem}".strip())
        if result.lines:
            rows = ["| what | value | beside | aim | met |", "|---|---|---|---|---|"]
            texts.append("\n".join([*rows, *(_row(line) for line in result.lines)]))
    return "\n\n".join(texts)


def _row(line: Line) -> str:
    met = {None: "", True: "yes", False: "**no**"}[line.met]
    cells = [line.name, value_text(line), line.beside, line.aim, met]
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def value_text(line: Line) -> str:
    """Return a line's value with its unit, or the cause why it has none."""
    if line.value is None:
        return line.problem
    value = f"{line.value:.4g}" if isinstance(line.value, float) else str(line.value)
    return f"{value} {line.unit}".strip()
