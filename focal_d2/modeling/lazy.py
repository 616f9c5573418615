"""FocalRetinaNet for detectron2's LazyConfig, in which a function call instead of YAML builds the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import RetinaNet
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from focal_d2.config import DETECTRON2_RANGES, add_focal_config, loss_parameters
from focal_d2.config.ranges import check_value
from focal_d2.errors import UserError
from focal_d2.modeling.assigners import IoUAssigner, assigner_name, build_assigner
from focal_d2.modeling.losses import ClassificationLoss
from focal_d2.modeling.losses.elementwise import AUTO, AUTO_PER_CLASS, best_alpha
from focal_d2.modeling.parts import build_focal_parts
from focal_d2.modeling.retinanet import FocalRetinaNet

# Keys of MODEL.FOCAL for parts that a LazyConfig passes as finished modules.
_KEYS_OF_PARTS = {
    "FPN.INIT": "backbone",
    "FPN.LEVELS": "backbone",
    "FPN.P6_FROM": "backbone.top_block",
    "HEAD.CHANNELS": "head.conv_dims",
    "LOW_QUALITY_MATCHES": "anchor_matcher.allow_low_quality_matches",
    "TIMM.BATCH_NORM": "backbone",
    "TIMM.NAME": "backbone",
}
# Arguments of detectron2's RetinaNet, and the keys with the same legal values.
_NUMBERS = {
    "focal_loss_alpha": "MODEL.RETINANET.FOCAL_LOSS_ALPHA",
    "focal_loss_gamma": "MODEL.RETINANET.FOCAL_LOSS_GAMMA",
}


def build_focal_retinanet(*, focal: Mapping[str, Any] | None = None, **arguments: Any) -> FocalRetinaNet:
    """Build `FocalRetinaNet` from the arguments of detectron2's `RetinaNet`.

    For a LazyConfig: `cfg.model._target_ = focal_d2.build_focal_retinanet`.

    Args:
        focal: keys of `MODEL.FOCAL`, such as `{"LOSS": {"NAME": "quality_focal"}}`; None: their defaults.
        arguments: detectron2's, with its defaults; `vis_period` and `input_format` change nothing, and
            `anchor_matcher` counts only with `ASSIGNER.NAME` iou.

    Raises:
        UserError: for a key that does not exist or has no effect in a LazyConfig, a value outside its
            choices, or a head without the logits that the loss needs.
        TypeError: for an argument that detectron2's RetinaNet does not have, and for one that is missing.
    """
    signature = inspect.signature(RetinaNet.__init__).bind(None, **arguments)
    signature.apply_defaults()
    given = {name: value for name, value in signature.arguments.items() if name != "self"}
    cfg = get_cfg()
    add_focal_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    _merge(cfg.MODEL.FOCAL, focal or {})
    for name, key in _NUMBERS.items():
        check_value(f"model.{name}", given[name], DETECTRON2_RANGES[key])
    retinanet = cfg.MODEL.RETINANET
    retinanet.NUM_CLASSES = given["num_classes"]
    retinanet.FOCAL_LOSS_ALPHA = given.pop("focal_loss_alpha")
    retinanet.FOCAL_LOSS_GAMMA = given.pop("focal_loss_gamma")
    retinanet.SMOOTH_L1_LOSS_BETA = given.pop("smooth_l1_beta")
    retinanet.BBOX_REG_LOSS_TYPE = given.pop("box_reg_loss_type")
    _resolve_alpha(cfg)
    del given["vis_period"], given["input_format"]
    parts = build_focal_parts(cfg, given["box2box_transform"])
    _fit_head(given["head"], parts["cls_loss"], given["anchor_generator"].num_anchors[0])
    matcher = given.pop("anchor_matcher")
    given["assigner"] = IoUAssigner(matcher) if assigner_name(cfg) == "iou" else build_assigner(cfg)
    return FocalRetinaNet(**given, **parts)


def _merge(node: CfgNode, focal: Mapping[str, Any]) -> None:
    """Merge `focal` into `MODEL.FOCAL`."""
    focal = _plain(focal, node, "model.focal")
    for key, part in _KEYS_OF_PARTS.items():
        section, _, name = key.rpartition(".")
        if name in (focal.get(section, {}) if section else focal):
            raise UserError(f"model.focal.{key} has no effect in a LazyConfig: set model.{part}")
    try:
        node.merge_from_other_cfg(CfgNode(focal))
    except (KeyError, ValueError) as error:
        raise UserError(f"model.focal: {error.args[0]}") from error


def _plain(value: Any, default: Any, key: str) -> Any:
    """Return a key's value without OmegaConf's types; a section must be a mapping, as its default is."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    if not isinstance(default, CfgNode):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{key} is {value!r}; it must be a mapping with keys among {', '.join(default)}")
    return {name: _plain(item, default.get(name), f"{key}.{name}") for name, item in value.items()}


def _resolve_alpha(cfg: CfgNode) -> None:
    """Replace ALPHA "auto" of the focal loss by the best α for its γ; refuse values that need a dataset.

    A loss that takes no such text refuses it when it is built.
    """
    node = cfg.MODEL.FOCAL.LOSS
    if node.ALPHA == AUTO and node.NAME == "focal":
        gamma = loss_parameters(cfg)["GAMMA"]
        check_value("model.focal.LOSS.GAMMA", gamma, DETECTRON2_RANGES["MODEL.RETINANET.FOCAL_LOSS_GAMMA"])
        node.ALPHA = best_alpha(gamma)
    elif node.ALPHA in (AUTO, AUTO_PER_CLASS):
        raise UserError(
            f"model.focal.LOSS.ALPHA is {node.ALPHA}, which needs a dataset to count: give a number, or "
            "a list of one for each class"
        )


def _fit_head(head: nn.Module, cls_loss: ClassificationLoss, num_anchors: int) -> None:
    """Check that a head of detectron2 has the loss's logits, and set their bias as the loss needs it."""
    last: Any = head.cls_score
    if last.out_channels != num_anchors * cls_loss.num_logits:
        raise UserError(
            f"model.head gives {last.out_channels} logits a cell; {num_anchors} anchors with "
            f"{cls_loss.num_logits} logits each need {num_anchors * cls_loss.num_logits}: "
            f"set model.head.num_classes to {cls_loss.num_logits}"
        )
    if cls_loss.num_logits != cls_loss.num_classes:
        with torch.no_grad():  # detectron2's head gave the prior to all logits, background included
            prior = last.bias[0].sigmoid().item()
            last.bias.copy_(cls_loss.prior_bias(prior).repeat(num_anchors))
