"""Check and measure the package on a GPU, within a given time; docs/gpu_check.md says what each part does.

OUTPUT gets gpu_check.json and gpu_check.md, written after each figure, and the files that parts write. With
`--device cpu` the command rehearses: all parts run at small sizes, and nothing is measured.

Exit status: 1 if a part that had time gave no figure.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from focal_d2.commands.cli import Parser
from focal_d2.console import tell, write
from focal_d2.errors import UserError


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("--minutes", type=_minutes, required=True, metavar="M", help="for all parts together")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse (cuda)")
    parser.add_argument("--parts", type=_parts, metavar="N,N,…", help="only these parts, by their numbers")


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 10_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return minutes


def _parts(text: str) -> list[int]:
    numbers = text.split(",")
    if not all(number.isdecimal() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text} is not a list of numbers such as 1,3")
    return sorted({int(number) for number in numbers})


def run(args: argparse.Namespace) -> int:
    """Run the parts; return the exit status."""
    from focal_d2.analysis.gpu_check.report import REHEARSAL_NOTE, value_text, write_results
    from focal_d2.analysis.gpu_check.run import PARTS, PartResult, find_device, run_parts

    unknown = sorted(set(args.parts or ()) - PARTS.keys())
    if unknown:
        raise UserError(f"--parts: there is no part {unknown[0]}; they are 1 to {max(PARTS)}")
    rehearsal = args.device == "cpu"
    start = time.monotonic()
    header = {"device": find_device(args.device), "rehearsal": rehearsal, "minutes": args.minutes}
    shown = 0  # lines that are on the terminal

    def report(results: list[PartResult]) -> None:
        nonlocal shown
        write_results(args.output, header, results)
        lines = [(result.number, line) for result in results for line in result.lines]
        for number, line in lines[shown:]:
            missed = ", the aim is missed" if line.met is False else ""
            tell(f"{number}. {line.name}: {value_text(line)}{missed}")
        shown = len(lines)

    try:
        args.output.mkdir(parents=True, exist_ok=True)
        results = run_parts(
            args.parts or list(PARTS),
            device=args.device,
            seconds=60 * args.minutes - (time.monotonic() - start),
            folder=args.output,
            report=report,
        )
    except OSError as error:
        raise UserError(f"{args.output}: {error}") from error
    write((args.output / "gpu_check.md").read_text(encoding="utf-8").rstrip())
    if rehearsal:
        tell(REHEARSAL_NOTE)
    return int(any(result.gave_nothing for result in results))
