#!/usr/bin/env python
"""Fetch the embedded aerial pictures and cut them into tiles for training and testing."""

import json
from pathlib import Path

from focal_d2.data.embedded.folder import datasets_root
from focal_d2.data.embedded.neon_trees import SPLITS, prepare
from focal_d2.engine.cli import Parser, command_line


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--root", type=Path, default=datasets_root(), help="dataset folder")
    parser.add_argument("--wheel", type=Path, help="a deepforest wheel that is already here")
    args = parser.parse_args()
    folder = prepare(args.root, args.wheel)
    for split in SPLITS:
        coco = json.loads((folder / f"{split}.json").read_text())
        print(
            f"neon_trees_{split}: {len(coco['images'])} tiles, {len(coco['annotations'])} boxes "
            f"in {folder / split}"
        )


if __name__ == "__main__":
    with command_line():
        main()
