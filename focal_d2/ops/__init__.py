"""Pure maths on tensors: knows torch and nothing else."""

from focal_d2.ops.focal_loss import IGNORE_LABEL, sigmoid_focal_loss

__all__ = ["IGNORE_LABEL", "sigmoid_focal_loss"]
