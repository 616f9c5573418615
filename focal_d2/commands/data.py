"""Make the embedded datasets under the dataset folder: DETECTRON2_DATASETS, or datasets/.

neon_trees: aerial pictures of trees, downloaded with pip and cut into tiles for training and testing.
digits: handwritten digits in large scenes, drawn from scikit-learn's digits and photographs.
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
    parser.add_argument("--wheel", type=Path, help="a wheel of deepforest 2.1.0 (default: downloaded)")


def run(args: argparse.Namespace) -> None:
    """Make the datasets that do not exist, and print their numbers of images and boxes."""
    from focal_d2.data.embedded import digits, neon_trees
    from focal_d2.data.embedded.folder import datasets_root

    root = args.root or datasets_root()
    for name in dict.fromkeys(args.names):
        folder = neon_trees.prepare(root, args.wheel) if name == "neon_trees" else digits.prepare(root)
        for split in neon_trees.SPLITS if name == "neon_trees" else digits.SPLITS:
            coco = json.loads((folder / f"{split}.json").read_text(encoding="utf-8"))
            images, boxes = len(coco["images"]), len(coco["annotations"])
            write(f"{name}_{split}: {images} images, {boxes} boxes in {folder / split}")
