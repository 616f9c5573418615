"""What the scripts share: the data, a schedule by the clock, and detections in COCO's format."""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

LIMIT = 100  # detections of an image, as COCO counts them
LOWEST_SCORE = 0.001
WARM_UP = 50  # iterations


def parse(description: str | None) -> argparse.Namespace:
    """Read the options, and set seed and threads."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder of `focal-d2 data neon_trees`")
    parser.add_argument("--output", type=Path, required=True, help="folder for the detections, a new one")
    parser.add_argument("--minutes", type=float, required=True, help="of training, on the clock")
    parser.add_argument(
        "--splits", nargs="+", default=["val"], help="to write detections for: val test other"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="images of a batch (4; ultralytics: 16)")
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="learning rate of AdamW; not for ultralytics"
    )
    parser.add_argument("--bfloat16", action="store_true", help="under autocast; not for ultralytics")
    parser.add_argument("--model", default="yolo11n.yaml", help="of ultralytics")
    args = parser.parse_args()
    args.data = args.data.resolve()
    args.output.mkdir(parents=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002 - detectron2's augmentations draw from it
    random.seed(args.seed)
    return args


def annotations(data: Path, split: str) -> dict[str, Any]:
    """Return the COCO file of a split; images have their path as "path"."""
    content = json.loads((data / f"{split}.json").read_text())
    for image in content["images"]:
        image["path"] = str(data / split / image["file_name"])
    return content


def write_detections(
    args: argparse.Namespace, detect: Callable[[str], list[tuple[list[float], float]]]
) -> None:
    """Detect in the images of some splits, and write a file for each of them.

    Args:
        args: of `parse`.
        detect: from the path of an image to boxes (left, top, right, bottom, in pixels) and their scores.
    """
    for split in args.splits:
        found = [
            {
                "image_id": image["id"],
                "category_id": 1,
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": score,
            }
            for image in annotations(args.data, split)["images"]
            for (x0, y0, x1, y1), score in detect(image["path"])
        ]
        (args.output / f"{split}.json").write_text(json.dumps(found))
        print(f"{split}: {len(found)} detections", flush=True)


def train(
    args: argparse.Namespace, model: torch.nn.Module, batches: Iterator[Any], losses: Callable[[Any], Any]
) -> None:
    """Train for some minutes with AdamW, gradients clipped to a norm of 10, and a cosine over the minutes.

    Args:
        args: of `parse`.
        model: in training mode.
        batches: without end.
        losses: from a batch to a dict of losses.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, weight_decay=0.05)
    start, seconds, iteration = time.monotonic(), 60 * args.minutes, 0
    while (passed := time.monotonic() - start) < seconds:
        rate = args.rate * min(1, (iteration + 1) / WARM_UP) * (1 + math.cos(math.pi * passed / seconds)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bfloat16):
            parts = losses(next(batches))
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        if iteration % 20 == 0:
            print(f"{passed:.0f} s, iteration {iteration}, loss {loss.item():.3f}", flush=True)
        iteration += 1
    seconds = time.monotonic() - start
    print(f"{iteration} iterations of {args.batch or 4} images in {seconds:.0f} s")
