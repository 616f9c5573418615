"""ResNet with a feature pyramid P3 to P7 (paper, section 4 and footnote 2)."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from torch import nn

from focal_d2.config import check_choice, focal_config
from focal_d2.config.legal_values import check_values
from focal_d2.errors import UserError

_BASIC_BLOCK_DEPTHS = (18, 34)
_DEPTHS = (*_BASIC_BLOCK_DEPTHS, 50, 101, 152)


@BACKBONE_REGISTRY.register()
def build_focal_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Build ResNet-18 to 152 or ResNeXt with FPN levels P3 to P7, strides 8 to 128.

    P6 is a 3×3 convolution of stride 2 on C5 or P5 (`MODEL.FOCAL.FPN.P6_FROM`), P7 the same on ReLU(P6).
    The pyramid's convolutions start Xavier-uniform as detectron2's, or N(0, 0.01) as the paper's
    (`MODEL.FOCAL.FPN.INIT`). Parameter names are those of detectron2's
    `build_retinanet_resnet_fpn_backbone`. Norms come from `MODEL.RESNETS.NORM` and `MODEL.FPN.NORM`;
    ResNeXt from `MODEL.RESNETS.NUM_GROUPS` and `WIDTH_PER_GROUP`.

    Raises:
        UserError: for a value that is not legal, or widths that do not fit the depth.
    """
    resnets, fpn, p6_from = cfg.MODEL.RESNETS, cfg.MODEL.FPN, focal_config(cfg).FPN.P6_FROM
    check_values(cfg, "MODEL.FOCAL.FPN.", "MODEL.FPN.", "MODEL.RESNETS.", "MODEL.BACKBONE.")
    check_choice("MODEL.RESNETS.DEPTH", resnets.DEPTH, _DEPTHS)
    if resnets.DEPTH in _BASIC_BLOCK_DEPTHS and resnets.RES2_OUT_CHANNELS != 64:
        raise UserError(
            f"MODEL.RESNETS.RES2_OUT_CHANNELS is {resnets.RES2_OUT_CHANNELS}; ResNet-{resnets.DEPTH} needs 64"
        )
    bottom_up = build_resnet_backbone(cfg, input_shape)
    shapes = bottom_up.output_shape()
    missing = sorted({*fpn.IN_FEATURES, "res5"} - shapes.keys())
    if missing:
        raise UserError(f"MODEL.RESNETS.OUT_FEATURES lacks {', '.join(missing)}, which the FPN reads")
    p6_channels = shapes["res5"].channels if p6_from == "res5" else fpn.OUT_CHANNELS
    backbone = FPN(
        bottom_up=bottom_up,
        in_features=fpn.IN_FEATURES,
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelP6P7(p6_channels, fpn.OUT_CHANNELS, in_feature=p6_from),
        fuse_type=fpn.FUSE_TYPE,
    )
    if focal_config(cfg).FPN.INIT == "paper":
        for name, parameter in backbone.named_parameters():
            if name.endswith(".weight") and parameter.ndim == 4 and not name.startswith("bottom_up."):
                nn.init.normal_(parameter, std=0.01)
    return backbone
