"""The plugin's keys: defaults, legal values, which of them a job reads, and the files that set them."""

from focal_d2.config.keys import (
    DETECTRON2_RANGES,
    KEYS,
    LOSS_DEFAULTS,
    MOST_ITERATIONS,
    RANGES,
    add_focal_config,
    check_choice,
    focal_config,
    key_value,
    leaves,
    loss_parameters,
    set_value,
)

__all__ = [
    "DETECTRON2_RANGES",
    "KEYS",
    "LOSS_DEFAULTS",
    "MOST_ITERATIONS",
    "RANGES",
    "add_focal_config",
    "check_choice",
    "focal_config",
    "key_value",
    "leaves",
    "loss_parameters",
    "set_value",
]
