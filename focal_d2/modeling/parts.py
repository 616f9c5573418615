"""Build the parts of `FocalRetinaNet` that detectron2's RetinaNet does not have, from `MODEL.FOCAL`."""

from __future__ import annotations

import logging
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.box_regression import Box2BoxTransform

from focal_d2.config import check_choice, focal_config, loss_parameters
from focal_d2.config.legal_values import check_values
from focal_d2.errors import UserError
from focal_d2.modeling.losses import BOX_LOSSES, BoxLoss, LossNormalizer, build_loss
from focal_d2.modeling.precision import configured_type
from focal_d2.ops.common import LOSS_KERNELS, MATCHING_KERNELS, import_kernels

logger = logging.getLogger(__name__)


def build_focal_parts(cfg: CfgNode, box2box_transform: Box2BoxTransform) -> dict[str, Any]:
    """Return the arguments of `FocalRetinaNet` that detectron2's RetinaNet does not have.

    Args:
        cfg: full config; it reads `MODEL.FOCAL`, and of `MODEL.RETINANET` the class count and losses' keys.
        box2box_transform: the model's.

    Raises:
        UserError: for a value outside a key's choices.
    """
    retinanet, focal = cfg.MODEL.RETINANET, focal_config(cfg)
    check_values(cfg, "MODEL.RETINANET.", "MODEL.FOCAL.")
    use_kernels = _use_kernels(cfg)
    return {
        "region_share": focal.IGNORE_OVERLAP,
        "cls_loss": build_loss(
            focal.LOSS.NAME,
            num_classes=retinanet.NUM_CLASSES,
            parameters=loss_parameters(cfg),
            implementation=focal.LOSS.IMPLEMENTATION,
            use_kernels=use_kernels,
        ),
        "box_loss": BoxLoss(
            kind=check_choice("MODEL.RETINANET.BBOX_REG_LOSS_TYPE", retinanet.BBOX_REG_LOSS_TYPE, BOX_LOSSES),
            transform=box2box_transform,
            smooth_l1_beta=retinanet.SMOOTH_L1_LOSS_BETA,
            ghm_mu=focal.GHM_R.MU,
            ghm_bins=focal.GHM_R.BINS,
            ghm_momentum=focal.GHM_R.MOMENTUM,
        ),
        "loss_normalizer": LossNormalizer(kind=focal.LOSS.NORMALIZER),
        "amp": configured_type(cfg),
        "channels_last": focal.CHANNELS_LAST,
        "fold_frozen_norms": focal.FOLD_FROZEN_NORMS,
        "use_kernels": use_kernels,
        "compile_network": focal.COMPILE,
    }


def _use_kernels(cfg: CfgNode) -> bool:
    """Return whether to use Triton kernels. "auto" does not use them: they have not run on a GPU yet."""
    value = focal_config(cfg).KERNELS
    if value != "on":
        return False
    if torch.device(cfg.MODEL.DEVICE).type != "cuda":
        logger.warning(
            f"MODEL.FOCAL.KERNELS is on, but MODEL.DEVICE is {cfg.MODEL.DEVICE}: kernels need a GPU"
        )
        return True
    try:
        modules = [import_kernels(name) for name in (LOSS_KERNELS, MATCHING_KERNELS)]
    except ImportError as error:
        raise UserError(
            f"MODEL.FOCAL.KERNELS is on, but the kernels can't be imported ({error}): install another "
            "version of triton, or set it off"
        ) from error
    if None in modules:
        raise UserError(
            "MODEL.FOCAL.KERNELS is on, but Triton is not installed: install triton, or set it off"
        )
    return True
