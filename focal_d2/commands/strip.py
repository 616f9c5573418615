"""Make a small checkpoint for use: the weights, the class names, the config and the operating point.

focal-d2 strip output/model_final.pth --output trees.pth

The weights are the moving average if the training kept one. A training can start from the file, but --resume
can't continue from it. A checkpoint of an older version has neither class names nor a config: give its
config.yaml with --config-file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from focal_d2.commands.cli import Parser, add_import_flag
from focal_d2.console import tell, write
from focal_d2.errors import escaped


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("file", type=Path, help="a checkpoint of a training")
    parser.add_argument("--output", type=Path, required=True, help="the file to write (.pth)")
    parser.add_argument(
        "--config-file",
        metavar="CFG",
        default="",
        help="the config.yaml of the training, for a checkpoint that has no config in it",
    )
    add_import_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Read, write and say what was written."""
    from focal_d2.engine import load_config
    from focal_d2.inference.strip import strip_file
    from focal_d2.model_card import card_of

    card = card_of(load_config(args.config_file, ["MODEL.DEVICE", "cpu"])) if args.config_file else None
    card = strip_file(args.file, args.output, card=card)
    if card is None:
        tell(f"{args.file} has no class names and no config in it; --config-file adds them")
    elif card.class_names is None:
        tell("the names of the classes are not known: the files of the datasets are missing")
    before, after = (path.stat().st_size / 1e6 for path in (args.file, args.output))
    write(escaped(f"{args.output}: {after:.1f} MB, of {before:.1f}"))
