"""ResNet with a feature pyramid."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone

from focal_d2.config import check_choice
from focal_d2.config.legal_values import check_values
from focal_d2.errors import UserError
from focal_d2.modeling.backbones.pyramid import build_pyramid, has_p2

_BASIC_BLOCK_DEPTHS = (18, 34)
_DEPTHS = (*_BASIC_BLOCK_DEPTHS, 50, 101, 152)


@BACKBONE_REGISTRY.register()
def build_focal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNet-18 to 152 or ResNeXt with FPN levels P3 to P7, or P2 to P6 (`MODEL.FOCAL.FPN.LEVELS`).

    See `build_pyramid` for the pyramid. Parameter names are those of detectron2's
    `build_retinanet_resnet_fpn_backbone`. Norms come from `MODEL.RESNETS.NORM`; ResNeXt from
    `MODEL.RESNETS.NUM_GROUPS` and `WIDTH_PER_GROUP`. P2 to P6 add res2 to `MODEL.RESNETS.OUT_FEATURES` and
    `MODEL.FPN.IN_FEATURES`.

    Raises:
        UserError: for a value that is not legal, or widths that do not fit the depth.
    """
    check_values(cfg, "MODEL.FOCAL.FPN.", "MODEL.FPN.", "MODEL.RESNETS.", "MODEL.BACKBONE.")
    resnets = cfg.MODEL.RESNETS
    check_choice("MODEL.RESNETS.DEPTH", resnets.DEPTH, _DEPTHS)
    if resnets.DEPTH in _BASIC_BLOCK_DEPTHS and resnets.RES2_OUT_CHANNELS != 64:
        raise UserError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}; ResNet-{resnets.DEPTH} needs 64"
        )
    in_features = list(cfg.MODEL.FPN.IN_FEATURES)
    if has_p2(cfg):
        in_features = ["res2", *(x for x in in_features if x != "res2")]
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", *(x for x in resnets.OUT_FEATURES if x != "res2")]
    bottom_up = build_resnet_backbone(cfg, input_shape)
    missing = sorted({*in_features, "res5"} - bottom_up.output_shape().keys())
    if missing:
        raise UserError(f"MODEL.RESNETS.OUT_FEATURES lacks {', '.join(missing)}, which the FPN reads")
    return build_pyramid(cfg, bottom_up, in_features)
