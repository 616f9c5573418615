"""α from the training set's imbalance."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts

from focal_d2.architectures import require_retinanet
from focal_d2.data.resolution import training_boxes
from focal_d2.data.table import Table
from focal_d2.errors import UserError
from focal_d2.modeling.anchors import build_layout
from focal_d2.modeling.losses import LOSSES
from focal_d2.modeling.targets import build_matcher, count_labels

# Beyond these a few wrong labels would own the gradient (paper, table 1a: α = 0.999 loses 6 AP).
ALPHA_RANGE = (0.01, 0.99)

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
    require_retinanet(cfg, "MODEL.FOCAL.LOSS.ALPHA auto and its count of anchors")
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
    """Count positive and negative anchors over the training set, at training resolution but not cropped.

    Args:
        cfg: full config; of a large training set 1000 images are counted.
    """
    records = get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    )
    found = training_boxes(cfg, Table.from_records(records, ()))
    counts = count_labels(
        found.boxes, found.image, found.sizes, layout=build_layout(cfg), matcher=build_matcher(cfg)
    )
    return sum(counts.positives), sum(counts.negatives)
