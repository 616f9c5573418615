#!/usr/bin/env python
"""Detect objects in images and draw them; for a dataset, beside its ground truth."""

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.data import DatasetCatalog

from focal_d2.data import check_datasets
from focal_d2.engine import Detections, Predictor, exit_on_user_error, load_config
from focal_d2.engine.predictor import draw_boxes, read_bgr
from focal_d2.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp"}
YELLOW, GREEN = (0, 220, 255), (80, 255, 80)  # BGR


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, help="an image, or a folder of images")
    source.add_argument("--dataset", help="a registered dataset's name")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score that is drawn")
    parser.add_argument("--json", action="store_true", help="print the detections as JSON lines")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE …")
    args = parser.parse_args()

    overrides = args.opts
    if args.dataset:
        overrides = [*overrides, "DATASETS.TEST", f"('{args.dataset}',)"]
    cfg = load_config(args.config_file, overrides)
    truth: dict[Path, Any] = {}
    if args.dataset:
        check_datasets(cfg, training=False)
        truth = {Path(r["file_name"]): r["annotations"] for r in DatasetCatalog.get(args.dataset)}
    paths = list(truth) if args.dataset else list_images(args.input)
    predictor = Predictor(cfg)
    args.output.mkdir(parents=True, exist_ok=True)
    for path in paths:
        image = read_bgr(path)
        found = predictor(image)
        shown = Detections(*(field[found.scores >= args.threshold] for field in found))
        picture = draw_boxes(image, shown.boxes, color=YELLOW)
        if path in truth:
            xywh = np.array([a["bbox"] for a in truth[path]]).reshape(-1, 4)
            xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
            gap = np.full((image.shape[0], 8, 3), 255, np.uint8)
            picture = np.hstack([draw_boxes(image, xyxy, color=GREEN), gap, picture])
        cv2.imwrite(str(args.output / f"{path.stem}.png"), picture)
        if args.json:
            names = [predictor.class_names[k] for k in shown.classes]
            fields = {"boxes": shown.boxes.tolist(), "scores": shown.scores.tolist()}
            print(json.dumps({"file": str(path), **fields, "classes": names}))
    if not args.json:
        print(f"{len(paths)} pictures in {args.output}")


def list_images(source: Path) -> list[Path]:
    if not source.exists():
        raise UserError(f"--input {source}: no such file or folder")
    paths = (
        sorted(p for p in source.iterdir() if p.suffix.lower() in SUFFIXES) if source.is_dir() else [source]
    )
    if not paths:
        raise UserError(f"--input {source}: no images in it ({', '.join(sorted(SUFFIXES))})")
    return paths


if __name__ == "__main__":
    with exit_on_user_error():
        main()
