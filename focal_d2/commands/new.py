"""Make a config from a folder of images and annotations (COCO, VOC, YOLO, CSV).

It finds the data, proposes a split where there is none, chooses starting weights, image size, anchors, batch,
augmentations, learning rate and iterations from what it measures, and writes each choice with its reason. It
runs the doctor and prints the next command. It replaces no file and changes nothing in the folder. See
docs/new.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path

from focal_d2.commands.cli import Parser
from focal_d2.console import tell, write
from focal_d2.errors import UserError, escaped, first_few

_MOST_LINES = 10


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("folder", type=Path, help="images and annotations, also in folders below it")
    parser.add_argument("--output", type=Path, default=Path("mine.yaml"), help="the config (mine.yaml)")
    parser.add_argument(
        "--annotations",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a file or folder of annotations, if the folder has several kinds; may be given again",
    )
    parser.add_argument("--minutes", type=_minutes, default=60.0, help="that the training may take (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the anchors and the training (0)")
    parser.add_argument("--json", action="store_true", help="print all facts, choices and findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Make it, and print what was chosen."""
    if not os.path.isdir(args.folder):
        what = "a file, where a folder is needed" if os.path.exists(args.folder) else "no such folder"
        raise UserError(f"{args.folder}: {what}")
    from focal_d2.analysis.doctor.text import findings_text
    from focal_d2.analysis.new.make import make_config
    from focal_d2.analysis.study import check_seeds

    for name in ("detectron2", "fvcore"):  # their warnings are about the trial, whose model is thrown away
        logging.getLogger(name).addHandler(logging.NullHandler())
    (seed,) = check_seeds([args.seed], "--seed")
    made = make_config(
        str(args.folder),
        str(args.output),
        annotations=[str(path) for path in args.annotations],
        minutes=args.minutes,
        seed=seed,
        say=lambda line: tell(f"{line} …"),
    )
    if args.json:
        write(json.dumps(made.as_dict(), indent=1))
        return 0 if made.healthy else 1
    lines = [f"note: {note}" for note in made.notes]
    if made.sets is not None:
        lines.append(f"split: {made.sets.reason}")
    lines += [
        f"{choice.name}: {choice.reason}"
        for choice in made.choices
        if choice.name != "split" and choice.reason
    ]
    if made.report is not None:
        lines += ["", findings_text(made.report)]
    if made.problems:
        lines.append(f"items of the annotations that can't be read: {len(made.problems)}")
        lines.append(first_few([f"  {x}" for x in made.problems], _MOST_LINES, "\n"))
    if made.config is None:
        lines += ["", "Nothing was written: correct these errors first, and run the command again."]
    else:
        written = [made.config, *made.lists]
        lines += ["", f"written: {first_few(written, 8)}", f"next: {made.command}"]
    write(escaped("\n".join(lines), keep="\t\n"))
    return 0 if made.healthy else 1


def _minutes(text: str) -> float:
    """Read an option's value, a number of minutes above 0."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 100_000:
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes above 0")
    return minutes
