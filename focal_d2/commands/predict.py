#!/usr/bin/env python
"""Detect objects in images and draw them; for a dataset, beside its ground truth."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from focal_d2.data import check_datasets, ground_truth
from focal_d2.data.pictures import (
    draw_detections,
    list_images,
    picture_files,
    read_image,
    write_picture,
)
from focal_d2.data.pixels import ImageReader
from focal_d2.engine import Parser, add_trust_flag, command_line, load_config
from focal_d2.inference import Predictor


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="an image, or a folder of images")
    source.add_argument("--dataset", help="a registered dataset's name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.3,
        help="lowest score that is shown; the model returns none below its own SCORE_THRESH_TEST",
    )
    parser.add_argument("--json", action="store_true", help="print the detections as JSON lines")
    add_trust_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE …")
    args = parser.parse_args()

    truth: dict[Path, np.ndarray] = {}
    overrides = args.opts
    if args.dataset is not None:
        overrides = [*overrides, "DATASETS.TEST", f"({args.dataset!r},)"]
    cfg = load_config(
        args.config_file, overrides, trust_files=args.trust_files, allow_download=args.allow_download
    )
    if args.dataset is not None:
        check_datasets(cfg, training=False)
        truth = ground_truth(args.dataset)
    paths = list(truth) or list_images(args.input)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit > 0:
        # One more than is shown tells whether there are more.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.DETECTIONS_PER_IMAGE = limit + 1
    predictor = Predictor(cfg, trust_files=args.trust_files, allow_download=args.allow_download)
    in_colours = ImageReader(
        "BGR", "pil", cfg.INPUT.FOCAL.MAX_PIXELS
    )  # drawn on, whatever the model is given
    targets = picture_files(paths, args.output)
    cut: list[Path] = []
    for path, target in zip(paths, targets, strict=True):
        boxes, scores, classes = predictor(path)
        shown = scores >= args.threshold
        if 0 < limit < shown.sum():
            cut.append(path)
            shown[limit:] = False  # the best come first
        picture = draw_detections(read_image(path, in_colours), boxes[shown], truth.get(path))
        write_picture(target, picture)
        if args.json:
            detections = {
                "file": str(path),
                "boxes": boxes[shown].tolist(),
                "scores": scores[shown].tolist(),
                "classes": [predictor.class_names[k] for k in classes[shown]],
            }
            print(json.dumps(detections))
    if not args.json:
        print(f"{len(paths)} pictures in {args.output}")
    if cut:
        print(
            f"TEST.DETECTIONS_PER_IMAGE {limit} cuts off detections with scores of {args.threshold:g} and "
            f"above in {len(cut)} of {len(paths)} images; the first is {cut[0]}",
            file=sys.stderr,
        )


if __name__ == "__main__":
    with command_line():
        main()
