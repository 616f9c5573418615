"""Time from a file to the model's input."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.structures import BoxMode

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import make_batch
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.data.pixels import write_image


def time_input(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """From a file to the model's input in one worker: ours with INPUT.FOCAL.BACKEND opencv."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FOCAL.BACKEND = "opencv"
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TRAIN[-1:]
    mappers = {"ours": FocalDatasetMapper(cfg, True), "detectron2": DatasetMapper(cfg, True)}
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)  # as a worker has
    cv2.setNumThreads(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("jpg", "png"):
            records = _write_images(Path(folder), kind, setting)
            files = [record["file_name"] for record in records]
            runs: dict[str, Callable[[], Any]] = {
                "ours": partial(_each, mappers["ours"], records),
                "detectron2": partial(_each, mappers["detectron2"], records),
                "limit": partial(_each, cv2.imread, files),
            }
            times = timing.take_turns(runs, setting)
            shape = f"{setting.size} × {records[0]['height']} to {cfg.INPUT.MIN_SIZE_TRAIN[0]}"
            rows.append(timing.timed(f"input, {setting.batch} {kind} of {shape}", times, "decoding alone"))
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    return rows


def _each(function: Callable[[Any], Any], items: list[Any]) -> None:
    for item in items:
        function(item)


def _write_images(folder: Path, kind: str, setting: Setting) -> list[dict[str, Any]]:
    """Write N images about as hard to decode as photographs; return their records."""
    random = np.random.default_rng(0)
    records = []
    for i, sample in enumerate(make_batch(setting)):
        height = setting.size * 3 // 4
        coarse = cv2.GaussianBlur(random.normal(0, 1, (height, setting.size, 3)), (0, 0), 4)
        image = 128 + coarse / coarse.std() * 40 + random.normal(0, 4, coarse.shape)
        path = folder / f"{i}.{kind}"
        write_image(path, image.clip(0, 255).astype(np.uint8))
        boxes = sample["instances"].gt_boxes
        boxes.clip((height, setting.size))
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes.tensor.tolist()
        ]
        records.append(
            {"file_name": str(path), "height": height, "width": setting.size, "annotations": annotations}
        )
    return records
