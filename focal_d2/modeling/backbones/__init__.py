"""Backbones with FPN levels P3 to P7, or P2 to P6. Importing it registers them."""

from focal_d2.modeling.backbones.resnet_fpn import build_focal_resnet_fpn_backbone
from focal_d2.modeling.backbones.timm_fpn import build_focal_timm_fpn_backbone

__all__ = ["build_focal_resnet_fpn_backbone", "build_focal_timm_fpn_backbone"]
