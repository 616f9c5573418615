"""Pure maths on tensors: knows torch and torchvision, and nothing else."""

from focal_d2.ops.common import IGNORE_LABEL
from focal_d2.ops.losses.dense import dense_focal_loss, dense_quality_focal_loss, dense_varifocal_loss
from focal_d2.ops.losses.focal import sigmoid_cross_entropy, sigmoid_focal_loss, sigmoid_focal_star_loss
from focal_d2.ops.losses.quality import paired_iou, quality_focal_loss, varifocal_loss
from focal_d2.ops.losses.softmax import softmax_focal_loss

__all__ = [
    "IGNORE_LABEL",
    "dense_focal_loss",
    "dense_quality_focal_loss",
    "dense_varifocal_loss",
    "paired_iou",
    "quality_focal_loss",
    "sigmoid_cross_entropy",
    "sigmoid_focal_loss",
    "sigmoid_focal_star_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]
