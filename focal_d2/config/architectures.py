"""What is known of a config's meta-architecture: the key that counts its classes, and what it is.

A class that inherits from a known architecture counts as that one. Nothing is assumed of all other classes.
"""

from __future__ import annotations

import inspect

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import ROIHeads

from focal_d2.errors import UserError

_RETINANETS = ("FocalRetinaNet", "RetinaNet")
# The key that counts the classes of boxes; None: the architecture finds no boxes of classes.
# (`MODEL.SEM_SEG_HEAD.NUM_CLASSES` counts the classes of pixels, which datasets of boxes do not have.)
_CLASS_KEYS = {
    "FocalRetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "RetinaNet": "MODEL.RETINANET.NUM_CLASSES",
    "GeneralizedRCNN": "MODEL.ROI_HEADS.NUM_CLASSES",
    "ProposalNetwork": None,
    "SemanticSegmentor": None,
    "PanopticDeepLab": None,
}
_SEGMENTS = {"PanopticFPN", "SemanticSegmentor", "PanopticDeepLab"}
# All keys that count classes of boxes.
CLASS_KEYS = tuple(dict.fromkeys(key for key in _CLASS_KEYS.values() if key))


def _known_ancestors(cfg: CfgNode) -> list[str]:
    registered = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    classes = inspect.getmro(registered) if inspect.isclass(registered) else ()
    return [x.__name__ for x in classes if x.__module__.startswith(("detectron2.", "focal_d2."))]


def known_architecture(cfg: CfgNode) -> str | None:
    """Return the known architecture that `MODEL.META_ARCHITECTURE` is or inherits from, or None.

    An R-CNN with heads that do not inherit from detectron2's `ROIHeads` is not known.
    """
    name = next((x for x in _known_ancestors(cfg) if x in _CLASS_KEYS), None)
    if name == "GeneralizedRCNN":
        heads = ROI_HEADS_REGISTRY.get(cfg.MODEL.ROI_HEADS.NAME)
        if not (inspect.isclass(heads) and issubclass(heads, ROIHeads)):
            return None
    return name


def class_key(cfg: CfgNode) -> str | None:
    """Return the key with the model's number of classes; None if there is none or it is not known."""
    name = known_architecture(cfg)
    return None if name is None else _CLASS_KEYS[name]


def needs_beyond_boxes(cfg: CfgNode) -> str | None:
    """Return which key needs annotations that a dataset of boxes lacks, as a text; None if none is known."""
    if _SEGMENTS.intersection(_known_ancestors(cfg)):
        return f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE} needs classes of pixels"
    if cfg.MODEL.MASK_ON and known_architecture(cfg) == "GeneralizedRCNN":
        return "MODEL.MASK_ON True needs masks"
    if cfg.MODEL.KEYPOINT_ON:  # whatever the architecture: what reads images looks for the keypoints' names
        return "MODEL.KEYPOINT_ON True needs keypoints"
    return None


def check_boxes_only(cfg: CfgNode, what: str) -> None:
    """Check that the model reads no masks, keypoints or proposals.

    Args:
        cfg: full config.
        what: a key of which those know nothing.

    Raises:
        UserError: naming both keys.
    """
    for key in ("MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise UserError(f"{what} knows boxes only: MODEL.{key} must be False")


def is_retinanet(cfg: CfgNode) -> bool:
    """Whether the model reads its anchors and their labels from `MODEL.RETINANET`."""
    return known_architecture(cfg) in _RETINANETS


def require_retinanet(cfg: CfgNode, what: str) -> None:
    """Refuse other architectures.

    Args:
        cfg: full config.
        what: the part of focal_d2 that needs a RetinaNet, in the plural.

    Raises:
        UserError: if the config's architecture is not a RetinaNet.
    """
    if not is_retinanet(cfg):
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; {what} are for "
            f"{', '.join(_RETINANETS)}"
        )
