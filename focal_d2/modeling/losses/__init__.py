"""What the detector minimises: classification losses by name, box losses, and what divides both."""

from focal_d2.modeling.losses import elementwise, ghm, mining  # noqa: F401 - registers
from focal_d2.modeling.losses.base import (
    LOSSES,
    ClassificationLoss,
    DenseBatch,
    build_loss,
    gather_deltas,
    level_deltas,
    level_ranges,
    parameter_names,
    register_loss,
)
from focal_d2.modeling.losses.box import BOX_LOSSES, BoxLoss, LossNormalizer

__all__ = [
    "BOX_LOSSES",
    "LOSSES",
    "BoxLoss",
    "ClassificationLoss",
    "DenseBatch",
    "LossNormalizer",
    "build_loss",
    "gather_deltas",
    "level_deltas",
    "level_ranges",
    "parameter_names",
    "register_loss",
]
