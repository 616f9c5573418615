"""What training needs: legal values, a batch that the processes can share, and enough file handles."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.utils import comm

from focal_d2.config.legal_values import check_values
from focal_d2.data.workers import check_handles
from focal_d2.errors import UserError


def check_training(cfg: CfgNode) -> None:
    """Check the keys that training reads, the batch against the processes, and the limit on open files.

    Raises:
        UserError: for a value that is not legal, or too few file handles (`ulimit -n`).
    """
    check_values(cfg, "MODEL.FOCAL.AMP.", "INPUT.", "SOLVER.", "DATALOADER.", "TEST.", "VIS_PERIOD", "SEED")
    images, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size())
    if images < 1 or rest:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the number of "
            f"processes, {comm.get_world_size()}"
        )
    if (parts := cfg.SOLVER.FOCAL.ACCUMULATE) > images:
        raise UserError(
            f"SOLVER.FOCAL.ACCUMULATE is {parts}; it must be within 1 and the {images} images that a process "
            "has in a batch"
        )
    # An evaluation in the middle of training starts workers of its own.
    check_handles(cfg.DATALOADER.NUM_WORKERS, loaders=2 if cfg.DATASETS.TEST else 1)
