"""Legal values of the keys that training reads: all of them in one place."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils import comm

from focal_d2.config import check_choice, key_value
from focal_d2.data.resolution import check_crop_type
from focal_d2.errors import UserError

# The least value of a key, and what that value means where it is special.
_LEAST = {
    "DATALOADER.FOCAL.TIMEOUT": (0, "0: no limit"),
    "DATALOADER.NUM_WORKERS": (0, "0: training reads the images itself"),
    "SOLVER.BASE_LR": (0, ""),
    "SOLVER.CHECKPOINT_PERIOD": (1, ""),
    "SOLVER.MAX_ITER": (1, ""),
    "SOLVER.WARMUP_ITERS": (0, "0: no warm-up"),
    "TEST.EVAL_PERIOD": (0, "0: at the end only"),
    "VIS_PERIOD": (0, "0: no pictures"),
}
_CHOICES = {
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": ("value", "norm"),
    "SOLVER.FOCAL.ON_NONFINITE": ("stop", "skip", "halve_lr"),
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
}


def check_training(cfg: CfgNode) -> None:
    """Check the keys that training reads, each by itself, and the batch against the processes.

    Raises:
        UserError: for a value that is not legal.
    """
    for key, (least, meaning) in _LEAST.items():
        value = key_value(cfg, key)
        if not value >= least:  # NaN included
            raise UserError(f"{key} is {value}; it must be at least {least}{meaning and f' ({meaning})'}")
    for key, choices in _CHOICES.items():
        check_choice(key, key_value(cfg, key), choices)
    check_crop_type(cfg)
    solver = cfg.SOLVER.FOCAL
    if not 0 <= solver.EMA < 1:
        raise UserError(f"SOLVER.FOCAL.EMA is {solver.EMA}; it must be at least 0 (none) and below 1")
    images, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    if images < 1 or rest:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the number of "
            f"processes, {comm.get_world_size()}"
        )
    if not 1 <= solver.ACCUMULATE <= images:
        raise UserError(
            f"SOLVER.FOCAL.ACCUMULATE is {solver.ACCUMULATE}; it must be within 1 and the {images} images "
            "that a process has in a batch"
        )
