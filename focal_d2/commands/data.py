"""Make the embedded datasets under the dataset folder: DETECTRON2_DATASETS, or datasets/.

neon_trees: aerial pictures of trees, fetched with pip and cut into tiles for training and testing.
digits: handwritten digits in large scenes, drawn here with what scikit-learn has.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from focal_d2.commands.cli import Parser
from focal_d2.console import write


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("names", nargs="+", metavar="NAME", choices=("neon_trees", "digits"))
    parser.add_argument("--root", type=Path, help="dataset folder")
    parser.add_argument("--wheel", type=Path, help="a wheel of deepforest 2.1.0 that is already here")


def run(args: argparse.Namespace) -> None:
    """Make the datasets that are not there, and say what they hold."""
    from focal_d2.data.embedded import digits, neon_trees
    from focal_d2.data.embedded.folder import datasets_root

    root = args.root or datasets_root()
    for name in dict.fromkeys(args.names):
        made = neon_trees.prepare(root, args.wheel) if name == "neon_trees" else digits.prepare(root)
        for split in neon_trees.SPLITS if name == "neon_trees" else digits.SPLITS:
            coco = json.loads((made / f"{split}.json").read_text(encoding="utf-8"))
            images, boxes = len(coco["images"]), len(coco["annotations"])
            write(f"{name}_{split}: {images} images, {boxes} boxes in {made / split}")
