"""Pure maths on tensors: knows torch and torchvision, and nothing else."""

from focal_d2.ops.common import IGNORE_LABEL
from focal_d2.ops.focal_loss import sigmoid_focal_loss, sigmoid_focal_star_loss
from focal_d2.ops.fused import dense_focal_loss, dense_quality_focal_loss, dense_varifocal_loss
from focal_d2.ops.quality import paired_iou, quality_focal_loss, varifocal_loss
from focal_d2.ops.softmax_loss import softmax_focal_loss

__all__ = [
    "IGNORE_LABEL",
    "dense_focal_loss",
    "dense_quality_focal_loss",
    "dense_varifocal_loss",
    "paired_iou",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_star_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]
