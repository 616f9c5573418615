"""Check and measure the package on a GPU, within a given time; docs/gpu_check.md says what each part does.

OUTPUT gets gpu_check.json and gpu_check.md, written after each figure, and the files that parts write. With
`--device cpu` the command rehearses: all parts run at small sizes, and nothing is measured.

Exit status: 1 if a part that had time, or all parts together, gave no figure; 2 if the results could not be
written.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from focal_d2.commands.cli import Parser
from focal_d2.console import tell, write
from focal_d2.errors import UserError


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("--minutes", type=_minutes, required=True, metavar="M", help="for all parts together")
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of the results, new or without any"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse (cuda)")
    parser.add_argument("--parts", type=_parts, metavar="N,N,…", help="only these parts, by their numbers")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0 and below 10,000")
    return minutes


def _parts(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers such as 1,3")
    return sorted({int(number) for number in numbers})


def _prepare(folder: Path) -> None:
    """Make the folder of the results.

    Raises:
        UserError: if nothing can be written there, or it has the results of another check.
    """
    from focal_d2.analysis.gpu_check.report import JSON_FILE

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be written")
    if (folder / JSON_FILE).exists():
        raise UserError(f"{folder / JSON_FILE} has the results of another check: choose another folder")


def run(args: argparse.Namespace) -> int:
    """Run the parts; return the exit status."""
    from focal_d2.analysis.gpu_check.processes import ended_by_sigterm
    from focal_d2.analysis.gpu_check.report import REHEARSAL_NOTE, as_table, value_text, write_results
    from focal_d2.analysis.gpu_check.run import PARTS, PartResult, find_device, run_parts

    unknown = sorted(set(args.parts or ()) - PARTS.keys())
    if unknown:
        raise UserError(f"--parts: there is no part {unknown[0]}; they are 1 to {max(PARTS)}")
    rehearsal = args.device == "cpu"
    start = time.monotonic()
    _prepare(args.output)
    header: dict[str, Any] = {"device": "", "rehearsal": rehearsal, "minutes": args.minutes}
    shown = 0  # lines that are on the terminal
    failure: OSError | None = None  # of the last attempt to write

    def report(results: list[PartResult]) -> None:
        nonlocal shown, failure
        try:
            write_results(args.output, header, results)
            failure = None
        except OSError as error:  # such as a full disk: the terminal has the figures, too
            failure = error
        lines = [(result.number, line) for result in results for line in result.lines]
        for number, line in lines[shown:]:
            missed = ", the aim is missed" if line.met is False else ""
            tell(f"{number}. {line.name}: {value_text(line)}{missed}")
        shown = len(lines)

    with ended_by_sigterm():
        header["device"] = find_device(args.device)
        results = run_parts(
            args.parts or list(PARTS),
            device=args.device,
            seconds=60 * args.minutes - (time.monotonic() - start),
            folder=args.output,
            report=report,
        )
    write(as_table(header, results))
    if rehearsal:
        tell(REHEARSAL_NOTE)
    if failure is not None:
        raise UserError(f"{args.output}: {failure}")
    some_figure = any(line.value is not None for result in results for line in result.lines)
    return int(not some_figure or any(result.gave_nothing for result in results))
