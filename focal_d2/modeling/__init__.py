"""The detector: registered meta-architecture and backbone, head, losses."""

from focal_d2.modeling.backbones.resnet_fpn import build_focal_resnet_fpn_backbone
from focal_d2.modeling.head import FocalRetinaNetHead
from focal_d2.modeling.lazy import build_focal_retinanet
from focal_d2.modeling.retinanet import FocalRetinaNet

__all__ = [
    "FocalRetinaNet",
    "FocalRetinaNetHead",
    "build_focal_resnet_fpn_backbone",
    "build_focal_retinanet",
]
