"""Whether an exported file detects the same as the model in Python, and its AP.

D detections of one image in Python, E of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances, pairwise_iou

from focal_d2.errors import UserError, reason
from focal_d2.evaluation import FocalCOCOEvaluator
from focal_d2.export.run import Detections, Detector, read_image
from focal_d2.storage.files import check_regular

# Detections are the same if their class is, their boxes overlap so much, and their scores differ so little.
_IOU, _SCORE = 0.999, 1e-4


class Limits(NamedTuple):
    """Where the model cuts off detections: a rounding error there decides whether one is returned."""

    least_score: float
    most_detections: int


class Agreement(NamedTuple):
    """How detections of a file compare with those of the model in Python."""

    pictures: int
    detections: int  # in Python
    fewest: int  # in Python, of a picture
    different: int  # detections of either without a twin in the other, but for `at_limit`
    at_limit: int  # the same where the score is that of the threshold or of the last detection
    score_difference: float  # greatest of twins
    least_iou: float  # of twins

    @property
    def agrees(self) -> bool:
        """Whether there were detections, and all had a twin."""
        return self.detections > 0 and not self.different

    def __str__(self) -> str:
        if not self.detections:
            return f"nothing was detected in {self.pictures} pictures: there is nothing to compare"
        verdict = "the same" if self.agrees else f"{self.different} DIFFERENT"
        limit = f", {self.at_limit} more at the threshold or the limit" if self.at_limit else ""
        return (
            f"{self.detections} detections in {self.pictures} pictures (at least {self.fewest} in each): "
            f"{verdict}{limit}; score within {self.score_difference:.1e}, IoU at least {self.least_iou:.5f}"
        )


class Loss(NamedTuple):
    """AP in per cent that 8-bit integers cost."""

    before: float  # of the file in float32
    after: float
    largest: float  # that is allowed
    datasets: str

    @property
    def agrees(self) -> bool:
        """Whether the loss is allowed; not if an AP is NaN."""
        return self.before - self.after <= self.largest

    def __str__(self) -> str:
        text = (
            f"AP {self.after:.2f} on {self.datasets}, in float32 {self.before:.2f}: a loss of "
            f"{self.before - self.after:.2f} points"
        )
        if self.agrees:
            return text
        return f"{text}, which is above {self.largest:g}: the file is removed (--max-loss allows more)"


def compare(
    eager: Callable[[Path], Detections], other: Detector, pictures: Iterable[Path], limits: Limits
) -> Agreement:
    """Compare a file with the model in Python on pictures.

    Args:
        eager: picture -> what the model in Python detects, with all scores.
        other: the file, with the threshold 0.
        pictures: image files.
        limits: of the model.
    """
    parts = [compare_detections(eager(path), other([read_picture(path)])[0], limits) for path in pictures]
    if not parts:
        raise ValueError("no picture to compare on")
    pictures_, detections, fewest, different, at_limit, scores, ious = zip(*parts, strict=True)
    return Agreement(
        sum(pictures_),
        sum(detections),
        min(fewest),
        sum(different),
        sum(at_limit),
        max(scores),
        min(ious),
    )


def compare_detections(one: Detections, other: Detections, limits: Limits) -> Agreement:
    """Compare the detections of one picture: D in Python, E of a file."""
    iou = pairwise_iou(Boxes(torch.from_numpy(one.boxes)), Boxes(torch.from_numpy(other.boxes))).numpy()
    difference = np.abs(one.scores[:, None] - other.scores)
    twins = (iou >= _IOU) & (difference <= _SCORE) & (one.classes[:, None] == other.classes)  # (D, E)
    full = len(one.scores) == len(other.scores) == limits.most_detections
    last = max(one.scores.min(), other.scores.min()) if full else 0.0
    lowest = max(limits.least_score, last) + _SCORE
    alone = np.concatenate([one.scores[~twins.any(1)], other.scores[~twins.any(0)]])
    return Agreement(
        pictures=1,
        detections=len(one.scores),
        fewest=len(one.scores),
        different=int((alone > lowest).sum()),
        at_limit=int((alone <= lowest).sum()),
        score_difference=float(difference[twins].max(initial=0)),
        least_iou=float(iou[twins].min(initial=1)),
    )


def read_picture(path: str | Path) -> np.ndarray:
    """Read an image as `run.py` does.

    Raises:
        UserError: if it can't be read.
    """
    try:
        check_regular(path)
        return read_image(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read image {path}: {reason(error)}") from error


def average_precision(detector: Detector, dataset: str, cfg: CfgNode) -> float:
    """Return a file's AP in per cent on a registered dataset; its threshold must be 0."""
    evaluator = FocalCOCOEvaluator(
        dataset,
        distributed=False,
        backend=cfg.TEST.FOCAL.EVAL_BACKEND,
        max_dets_per_image=list(cfg.TEST.FOCAL.MAX_DETS) or max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
    )
    evaluator.reset()
    for record in DatasetCatalog.get(dataset):
        (detections,) = detector([read_picture(record["file_name"])])
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.from_numpy(detections.boxes))
        instances.scores = torch.from_numpy(detections.scores)
        instances.pred_classes = torch.from_numpy(detections.classes)
        evaluator.process([record], [{"instances": instances}])
    return float(evaluator.evaluate()["bbox"]["AP"])
