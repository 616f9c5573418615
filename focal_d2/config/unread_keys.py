"""Keys that a config sets and that nothing reads: a user is told that they have no effect.

What is read was recorded: `tests/test_unread_keys.py` runs jobs of all kinds with a config that remembers its
reads, and compares the lists here with them. A key of these lists that ends with a dot stands for a section.
"""

from __future__ import annotations

import json

from detectron2 import modeling
from detectron2.config import CfgNode, get_cfg

from focal_d2.config import add_focal_config, key_value, leaves
from focal_d2.config.architectures import is_retinanet

# Where other detectors of detectron2 keep what a RetinaNet keeps elsewhere, under MODEL.
_COUNTERPARTS = {
    "ROI_HEADS.NUM_CLASSES": "RETINANET.NUM_CLASSES",
    "ROI_HEADS.SCORE_THRESH_TEST": "RETINANET.SCORE_THRESH_TEST",
    "ROI_HEADS.NMS_THRESH_TEST": "RETINANET.NMS_THRESH_TEST",
    "ROI_HEADS.IOU_THRESHOLDS": "RETINANET.IOU_THRESHOLDS",
    "ROI_HEADS.IOU_LABELS": "RETINANET.IOU_LABELS",
    "ROI_HEADS.IN_FEATURES": "RETINANET.IN_FEATURES",
    "ROI_BOX_HEAD.NORM": "RETINANET.NORM",
    "ROI_BOX_HEAD.NUM_CONV": "RETINANET.NUM_CONVS",
    "ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "RETINANET.BBOX_REG_LOSS_TYPE",
    "ROI_BOX_HEAD.BBOX_REG_WEIGHTS": "RETINANET.BBOX_REG_WEIGHTS",
    "ROI_BOX_HEAD.SMOOTH_L1_BETA": "RETINANET.SMOOTH_L1_LOSS_BETA",
    "RPN.BBOX_REG_LOSS_TYPE": "RETINANET.BBOX_REG_LOSS_TYPE",
    "RPN.BBOX_REG_WEIGHTS": "RETINANET.BBOX_REG_WEIGHTS",
    "RPN.SMOOTH_L1_BETA": "RETINANET.SMOOTH_L1_LOSS_BETA",
    "RPN.IN_FEATURES": "RETINANET.IN_FEATURES",
    "RPN.IOU_THRESHOLDS": "RETINANET.IOU_THRESHOLDS",
    "RPN.IOU_LABELS": "RETINANET.IOU_LABELS",
    "RPN.NMS_THRESH": "RETINANET.NMS_THRESH_TEST",
    "RPN.PRE_NMS_TOPK_TEST": "RETINANET.TOPK_CANDIDATES_TEST",
    "SEM_SEG_HEAD.NUM_CLASSES": "RETINANET.NUM_CLASSES",
}
# Of no use to a job of focal_d2's trainer, whatever its architecture.
_UNUSED_BY_JOBS = ("GLOBAL.HACK", "TEST.KEYPOINT_OKS_SIGMAS")
# And to RetinaNets. The loader follows the first three, but no RetinaNet reads what it then loads.
_UNUSED_BY_RETINANETS = (
    "MODEL.MASK_ON",
    "MODEL.KEYPOINT_ON",
    "MODEL.LOAD_PROPOSALS",
    "MODEL.PROPOSAL_GENERATOR.",
    "MODEL.RPN.",
    "MODEL.ROI_HEADS.",
    "MODEL.ROI_BOX_HEAD.",
    "MODEL.ROI_BOX_CASCADE_HEAD.",
    "MODEL.ROI_MASK_HEAD.",
    "MODEL.ROI_KEYPOINT_HEAD.",
    "MODEL.SEM_SEG_HEAD.",
    "MODEL.PANOPTIC_FPN.",
)
# What only FocalRetinaNet makes use of, beside MODEL.FOCAL.
_ONLY_OURS = ("TEST.AUG.", "TEST.FOCAL.AUG_TURNS", "TEST.FOCAL.TILES.")
# What other architectures than FocalRetinaNet read of MODEL.FOCAL, in our backbone or in our trainer.
_FOCAL_FOR_ALL = ("MODEL.FOCAL.AMP.", "MODEL.FOCAL.FPN.", "MODEL.FOCAL.TF32", "MODEL.FOCAL.TIMM.")
# What only one assigner (MODEL.FOCAL.ASSIGNER.NAME) of FocalRetinaNet reads.
_OF_ASSIGNERS = {
    "atss": ("MODEL.FOCAL.ASSIGNER.TOPK",),
    "iou": (
        "MODEL.FOCAL.LOW_QUALITY_MATCHES",
        "MODEL.RETINANET.IOU_LABELS",
        "MODEL.RETINANET.IOU_THRESHOLDS",
    ),
}
# Where YAML names a part that anyone may register, and that gets the whole config.
_PARTS = {
    "MODEL.META_ARCHITECTURE": modeling.META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": modeling.RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": modeling.ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": modeling.ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": modeling.SEM_SEG_HEADS_REGISTRY,
}


def unread_keys(cfg: CfgNode) -> list[str]:
    """Say which keys that differ from their defaults have no effect on a job.

    Args:
        cfg: full config. With a part that neither focal_d2 nor detectron2 registered, which may read any key,
            only those lines are given that name a RetinaNet's key instead.

    Returns:
        A line for each key of another detector for which a RetinaNet has its own, and for each key of another
        assigner; all others share one.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    defaults = get_cfg()
    add_focal_config(defaults)
    # Lists and tuples alike, as YAML has no tuples.
    changed = [k for k, x in leaves(defaults).items() if json.dumps(x) != json.dumps(key_value(cfg, k))]
    lines, unused = [], []
    if architecture == "FocalRetinaNet":
        assigner = cfg.MODEL.FOCAL.ASSIGNER.NAME
        lines = [
            f"{key} has no effect, because MODEL.FOCAL.ASSIGNER.NAME is {assigner}: only {name} reads it"
            for name, keys in _OF_ASSIGNERS.items()
            for key in keys
            if name != assigner and key in changed
        ]
    for key in changed:
        other = _COUNTERPARTS.get(key.removeprefix("MODEL."))
        if other and architecture in ("FocalRetinaNet", "RetinaNet"):
            value, other_value = key_value(cfg, key), key_value(cfg, f"MODEL.{other}")
            lines.append(
                f"{key} is {value}, which {architecture} does not read: it reads MODEL.{other}, which is "
                f"{other_value}"
            )
        elif is_unused(cfg, key):
            unused.append(key)
    if unused and has_known_parts(cfg):
        lines.append(f"{architecture} and focal_d2's trainer make no use of {', '.join(unused)}")
    return lines


def is_unused(cfg: CfgNode, key: str) -> bool:
    """Return whether no job with the config's architecture, one of detectron2's or ours, uses a key."""
    if key.startswith(_UNUSED_BY_JOBS) or is_of_other_backbone(cfg, key):
        return True
    if key.startswith(_ONLY_OURS):
        return bool(cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet")
    if key.startswith("MODEL.FOCAL.") and cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        return not key.startswith(_FOCAL_FOR_ALL)
    return key.startswith(_UNUSED_BY_RETINANETS if is_retinanet(cfg) else "MODEL.RETINANET.")


def is_of_other_backbone(cfg: CfgNode, key: str) -> bool:
    """Return whether a key of focal_d2 is for another backbone than the config's."""
    return key.startswith("MODEL.FOCAL.TIMM.") and cfg.MODEL.BACKBONE.NAME != "build_focal_timm_fpn_backbone"


def has_known_parts(cfg: CfgNode) -> bool:
    """Return whether detectron2 or focal_d2 registered all parts of the model that YAML names."""
    for key, registry in _PARTS.items():
        name = key_value(cfg, key)
        if name in registry and not registry.get(name).__module__.startswith(
            ("detectron2.modeling.", "focal_d2.")
        ):
            return False
    return True
