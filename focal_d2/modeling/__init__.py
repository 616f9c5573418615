"""The detector: registered meta-architecture and backbones, head, losses."""

from focal_d2.modeling.backbones import build_focal_resnet_fpn_backbone, build_focal_timm_fpn_backbone
from focal_d2.modeling.head import FocalRetinaNetHead
from focal_d2.modeling.lazy import build_focal_retinanet
from focal_d2.modeling.retinanet import FocalRetinaNet

__all__ = [
    "FocalRetinaNet",
    "FocalRetinaNetHead",
    "build_focal_resnet_fpn_backbone",
    "build_focal_retinanet",
    "build_focal_timm_fpn_backbone",
]
