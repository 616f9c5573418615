"""Assigners: which anchors must detect which box. `MODEL.FOCAL.ASSIGNER.NAME` chooses one."""

from __future__ import annotations

from detectron2.config import CfgNode

from focal_d2.config import check_choice, focal_config
from focal_d2.modeling.assigners.atss import ATSSAssigner
from focal_d2.modeling.assigners.base import Assigner
from focal_d2.modeling.assigners.iou import IoUAssigner

__all__ = ["ASSIGNERS", "ATSSAssigner", "Assigner", "IoUAssigner", "assigner_name", "build_assigner"]

ASSIGNERS: dict[str, type[ATSSAssigner | IoUAssigner]] = {"iou": IoUAssigner, "atss": ATSSAssigner}


def assigner_name(cfg: CfgNode) -> str:
    """Return the name of the model's assigner; detectron2's own RetinaNet has iou only.

    Raises:
        UserError: for an unknown name.
    """
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return "iou"
    return check_choice("MODEL.FOCAL.ASSIGNER.NAME", focal_config(cfg).ASSIGNER.NAME, ASSIGNERS)


def build_assigner(cfg: CfgNode) -> Assigner:
    """Build the model's assigner.

    Raises:
        UserError: for an unknown name.
    """
    return ASSIGNERS[assigner_name(cfg)].from_config(cfg)
