"""Repeat a training step that was not finite, from the folder in which training saved it.

It prints whether the step fails again, and the report. Exit status: 0 if the same losses, or the gradient,
are not finite again, 1 if not, 2 for a mistake in the command or a damaged file. See docs/nonfinite.md.
"""

import argparse
import json
import logging
from pathlib import Path

from focal_d2.commands.cli import Parser, add_import_flag
from focal_d2.console import write
from focal_d2.errors import escaped


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, help="OUTPUT_DIR/nonfinite_NNNNNNN")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    add_import_flag(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: as in training, if it exists")


def run(args: argparse.Namespace) -> int:
    """Repeat the step, and print the report."""
    from focal_d2.engine.nonfinite import load_step, replay

    # detectron2's log records are not part of the report.
    logging.getLogger("detectron2").addHandler(logging.NullHandler())
    saved = load_step(args.folder)
    result = replay(saved, device=args.device)
    if args.json:
        facts = {"iteration": saved.iteration, "reproduced": result.reproduced, "terms": result.terms}
        write(json.dumps({**facts, **result.report.as_dict()}, indent=1, allow_nan=False))
    else:
        again = "reproduced" if result.reproduced else "NOT reproduced"
        lines = [f"Iteration {saved.iteration}, {saved.file.name}: {again}"]
        lines += [f"  {name}: {comparison}" for name, comparison in result.terms.items()]
        write("\n".join([*map(escaped, lines), "", result.report.text().rstrip("\n")]))
    return 0 if result.reproduced else 1
