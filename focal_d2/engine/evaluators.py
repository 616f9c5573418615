"""The evaluators of a job's datasets."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator

from focal_d2.evaluation import FocalCOCOEvaluator, FocalLVISEvaluator
from focal_d2.evaluation.operating_point import Goal, OperatingPoint

# Detections of a class in a picture that is detected in tiles: no limit in practice.
_IN_TILES = 100_000


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Build the evaluator of boxes, as COCO does; datasets that are evaluated as LVIS get detectron2's.

    Raises:
        UserError: for keys under TEST.FOCAL that can't be used.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
    if MetadataCatalog.get(dataset_name).get("evaluator_type") == "lvis":
        return FocalLVISEvaluator(dataset_name, tasks=("bbox",), output_dir=folder)
    test = cfg.TEST.FOCAL
    return FocalCOCOEvaluator(
        dataset_name,
        output_dir=folder,
        backend=test.EVAL_BACKEND,
        max_dets_per_image=detection_limits(cfg),
        goal=goal_of(cfg),
        validation=dataset_name in cfg.DATASETS.VAL,
    )


def detection_limits(cfg: CfgNode) -> list[int] | int:
    """Return the limits on the detections of a class in an image, or only the last one."""
    test = cfg.TEST.FOCAL
    whole = _IN_TILES if test.TILES.ENABLED else max(100, cfg.TEST.DETECTIONS_PER_IMAGE)
    return list(test.MAX_DETS) or whole


def goal_of(cfg: CfgNode) -> Goal:
    """Return what the config chooses the operating point for."""
    test = cfg.TEST.FOCAL
    return Goal(test.OPERATING_POINT, test.WANTED)


def evaluators_at(
    trainer: type[DefaultTrainer], cfg: CfgNode, point: OperatingPoint | None
) -> list[DatasetEvaluator] | None:
    """Build the evaluators of the test sets for an operating point that was chosen elsewhere.

    Args:
        trainer: builds each of them.
        cfg: full config.
        point: the operating point; None: there is none.

    Returns:
        The argument of `DefaultTrainer.test`; None: each set is evaluated at an operating point of its own.
    """
    if point is None:
        return None
    evaluators = [trainer.build_evaluator(cfg, name) for name in cfg.DATASETS.TEST]
    for evaluator in evaluators:
        if isinstance(evaluator, FocalCOCOEvaluator):
            evaluator.operating_point = point
    return evaluators
