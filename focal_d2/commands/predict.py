"""Detect objects in images and draw them; for a dataset, beside its ground truth."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from focal_d2.commands.cli import Parser, add_config_options, add_trust_flag
from focal_d2.console import tell, write
from focal_d2.errors import escaped

# The lowest score that is shown with a checkpoint that has no operating point.
_WITHOUT_POINT = 0.3


def add_options(parser: Parser) -> None:
    """Add the options."""
    add_config_options(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="an image, or a folder of images")
    source.add_argument("--dataset", help="a registered dataset's name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score that is shown (default: the checkpoint's operating point, or 0.3 if it has none); "
        "the model returns none below SCORE_THRESH_TEST",
    )
    parser.add_argument("--json", action="store_true", help="print the detections as JSON lines")
    add_trust_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Detect, draw and print."""
    from focal_d2.data.dataset_checks import check_datasets
    from focal_d2.data.datasets import ground_truth
    from focal_d2.data.pictures import draw_detections, list_images, picture_files, read_image, write_picture
    from focal_d2.data.pixels import ImageReader
    from focal_d2.engine import load_config
    from focal_d2.inference import Predictor

    trust = {"trust_files": args.trust_files, "allow_download": args.allow_download}
    truth: dict[Path, Any] = {}  # boxes (M, 4) of an image
    overrides = args.opts
    if args.dataset is not None:
        overrides = [*overrides, "DATASETS.TEST", f"({args.dataset!r},)"]
    cfg = load_config(args.config_file, overrides, **trust)
    if args.dataset is not None:
        check_datasets(cfg, training=False)
        truth = ground_truth(args.dataset)
    paths = list(truth) or list_images(args.input)
    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit > 0:
        # One detection above the limit shows that the limit cuts detections off.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.DETECTIONS_PER_IMAGE = limit + 1
    predictor = Predictor(cfg, threshold=args.threshold, **trust)
    if args.threshold is None:
        point = predictor.operating_point
        if point is None:
            predictor.threshold = _WITHOUT_POINT
        where = point or f"score {_WITHOUT_POINT:g}, because the checkpoint has no operating point"
        tell(f"threshold: {where}; --threshold sets another")
    # The pictures have colours, whatever INPUT.FORMAT the model reads.
    in_colours = ImageReader("BGR", "pil", cfg.INPUT.FOCAL.MAX_PIXELS)
    targets = picture_files(paths, args.output)
    cut: list[Path] = []
    for path, target in zip(paths, targets, strict=True):
        result = predictor(path)
        boxes, scores, classes = result.boxes, result.scores, result.classes
        if 0 < limit < len(boxes):
            cut.append(path)
            boxes, scores, classes = boxes[:limit], scores[:limit], classes[:limit]  # the best come first
        picture = draw_detections(read_image(path, in_colours), boxes, truth.get(path))
        write_picture(target, picture)
        if args.json:
            detections = {
                "file": str(path),
                "boxes": boxes.tolist(),
                "scores": scores.tolist(),
                "classes": [predictor.class_names[k] for k in classes],
            }
            write(json.dumps(detections))
    if not args.json:
        write(escaped(f"{len(paths)} pictures in {args.output}"))
    if cut:
        tell(
            f"TEST.DETECTIONS_PER_IMAGE {limit} cuts off detections with scores of {predictor.threshold:g} "
            f"and above in {len(cut)} of {len(paths)} images; the first is {cut[0]}"
        )
