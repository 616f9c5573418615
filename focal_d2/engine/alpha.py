"""α from the training set's imbalance."""

from __future__ import annotations

import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model

from focal_d2.data import FocalDatasetMapper
from focal_d2.errors import UserError
from focal_d2.modeling.losses import LOSSES

# Beyond these a few wrong labels would own the gradient (paper, table 1a: α = 0.999 loses 6 AP).
ALPHA_RANGE = (0.01, 0.99)
# Counting more images changes the third digit and costs minutes.
_MOST_IMAGES = 1000

logger = logging.getLogger(__name__)


def resolve_alpha(cfg: CfgNode) -> CfgNode:
    """Replace `MODEL.FOCAL.LOSS.ALPHA: auto` by the number that balances the training set.

    With m positive and n negative anchors, α / (1 - α) = n / m (paper, section 3.1: "inverse class
    frequency"), clipped to `ALPHA_RANGE`.

    Args:
        cfg: full config.

    Returns:
        The config itself if ALPHA is not "auto", else a copy with the number, frozen.

    Raises:
        UserError: if no anchor is positive, or the loss has no use for such an α.
    """
    if cfg.MODEL.FOCAL.LOSS.ALPHA != "auto":
        return cfg
    counting = sorted(name for name, loss in LOSSES.items() if getattr(loss, "counts_alpha", False))
    if cfg.MODEL.FOCAL.LOSS.NAME not in counting:
        raise UserError(
            f"MODEL.FOCAL.LOSS.ALPHA is auto, which {cfg.MODEL.FOCAL.LOSS.NAME} does not take; these do: "
            f"{', '.join(counting)}"
        )
    positives, negatives = count_anchors(cfg)
    if positives == 0:
        raise UserError("MODEL.FOCAL.LOSS.ALPHA is auto, but no anchor of DATASETS.TRAIN is positive")
    balanced = negatives / (positives + negatives)
    alpha = min(max(balanced, ALPHA_RANGE[0]), ALPHA_RANGE[1])
    logger.info(
        f"MODEL.FOCAL.LOSS.ALPHA auto: {positives} positive and {negatives} negative anchors "
        f"(1 : {negatives / positives:.0f}) give {balanced:.4f}; using {alpha:.4f}"
    )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOCAL.LOSS.ALPHA = alpha
    cfg.freeze()
    return cfg


def count_anchors(cfg: CfgNode) -> tuple[int, int]:
    """Count positive and negative anchors over the training set, without augmentation.

    Args:
        cfg: full config; the images are taken at `INPUT.MIN_SIZE_TEST`, the first 1000 of them.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOCAL.LOSS.ALPHA = -1.0
    model: Any = build_model(cfg)
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    mapper = FocalDatasetMapper(cfg, is_train=True, augmentations=build_augmentation(cfg, is_train=False))
    positives = negatives = 0
    for record in records[:_MOST_IMAGES]:
        sample = mapper(record)
        anchors = model.anchors_for(model.preprocess_image([sample]))
        labels = model.label_anchors(anchors, [sample["instances"]], [sample.get("ignored_boxes")])
        positives += int(labels.positive.sum())
        negatives += int((labels.labels == model.num_classes).sum())
    return positives, negatives
