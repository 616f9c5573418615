"""Time from predictions to COCO's metrics."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import draw_boxes
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.evaluation import FocalCOCOEvaluator
from focal_d2.evaluation.backends import Detections, Truth, coco_curves


def time_evaluation(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """From a list of predictions to COCO's metrics: ours, and detectron2's evaluator with pycocotools."""
    name = "benchmark_of_evaluation"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        content, detected = make_predictions(setting, cfg.TEST.DETECTIONS_PER_IMAGE)
        path.write_text(json.dumps(content))
        MetadataCatalog.get(name).set(
            json_file=str(path), thing_classes=[str(k) for k in range(setting.classes)]
        )

        def evaluating(kind: type[COCOEvaluator], **kwargs: Any) -> Callable[[], Any]:
            evaluator = kind(name, ("bbox",), False, **kwargs)
            evaluator.reset()
            for image_id, instances in enumerate(detected):
                evaluator.process([{"image_id": image_id}], [{"instances": instances}])
            return partial(_silently, evaluator.evaluate)

        ours = evaluating(FocalCOCOEvaluator)
        columns = _columns_of(content, detected)
        times = timing.take_turns(
            {
                "ours": ours,
                "detectron2": evaluating(COCOEvaluator, use_fast_impl=False),
                "limit": partial(coco_curves, *columns, backend="hotcoco", max_dets=(1, 10, 100)),
            },
            setting,
        )
        with_files = timing.take_turns(
            {
                "ours": evaluating(FocalCOCOEvaluator, output_dir=folder),
                "detectron2": evaluating(COCOEvaluator, use_fast_impl=False, output_dir=folder),
                "limit": ours,
            },
            setting,
        )
    MetadataCatalog.remove(name)
    size = f"{setting.batch} images × {cfg.TEST.DETECTIONS_PER_IMAGE}"
    return [
        timing.timed(f"evaluation, {size}", times, "hotcoco, from columns of numbers to its arrays"),
        timing.timed("the same with files, of ours also analysis.json", with_files, "without files"),
    ]


def _silently(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def make_predictions(setting: Setting, detections: int) -> tuple[dict[str, Any], list[Instances]]:
    """Make ground truth as a COCO file's content, and of each image as many detections around its boxes.

    Args:
        setting: N images, K classes, boxes an image.
        detections: an image.
    """
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    detected = []
    annotations: list[dict[str, Any]] = []
    for i in range(setting.batch):
        truth = draw_boxes(setting, generator)
        boxes, labels = truth.gt_boxes.tensor.numpy(), truth.gt_classes.numpy()
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": [*box[:2], width, height],
                    "area": width * height,
                    "iscrowd": int(random.random() < 0.01),
                }
            )
        near = random.integers(0, len(boxes), detections)
        sides = np.tile(boxes[near, 2:] - boxes[near, :2], 2)
        moved = boxes[near] + sides * random.normal(0, 0.1, (detections, 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        other = random.integers(0, setting.classes, detections)
        instances = Instances(truth.image_size)
        instances.pred_boxes = Boxes(torch.from_numpy(moved))
        instances.scores = torch.from_numpy(np.sort(random.beta(0.5, 3, detections))[::-1].copy())
        instances.pred_classes = torch.from_numpy(
            np.where(random.random(detections) < 0.7, labels[near], other)
        )
        detected.append(instances)
    content = {
        "images": [{"id": i, "width": setting.size, "height": setting.size} for i in range(setting.batch)],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(setting.classes)],
    }
    return content, detected


def _columns_of(content: dict[str, Any], detected: list[Instances]) -> tuple[Truth, Detections]:
    annotations = content["annotations"]
    boxes = np.concatenate([x.pred_boxes.tensor.numpy() for x in detected])
    boxes[:, 2:] -= boxes[:, :2]
    return (
        Truth(
            len(content["images"]),
            len(content["categories"]),
            *(
                np.array([a[key] for a in annotations])
                for key in ("image_id", "bbox", "category_id", "area", "iscrowd")
            ),
        ),
        Detections(
            np.repeat(np.arange(len(detected)), [len(x) for x in detected]),
            boxes,
            torch.cat([x.pred_classes for x in detected]).numpy(),
            torch.cat([x.scores for x in detected]).numpy(),
        ),
    )
