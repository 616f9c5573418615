"""Going on where a run stopped: what its checkpoint must hold, and what an earlier run left."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from focal_d2.errors import UserError

logger = logging.getLogger(__name__)

_MOST_ITERATIONS = 10**9


def check_state(
    state: dict[str, Any], *, cfg: CfgNode, optimizer: torch.optim.Optimizer, schedule: dict[str, Any]
) -> None:
    """Check what PyTorch and detectron2 would take over as it is, and fail on later.

    Args:
        state: of the trainer, from a checkpoint.
        cfg: full config.
        optimizer: that shall take its part of the state.
        schedule: the attributes of the schedule that shall take its.

    Raises:
        UserError: if it is of another optimizer, or of a schedule for another number of processes.
        ValueError: if it does not hold the numbers that belong there: damaged, or hostile.
    """
    # Another version of PyTorch may have more settings, or fewer; another optimizer has both.
    groups = state["_trainer"]["optimizer"]["param_groups"]
    ours, theirs = optimizer.param_groups[0].keys(), groups[0].keys()
    if ours - theirs and theirs - ours:
        raise UserError(
            f"--resume: the checkpoint in {cfg.OUTPUT_DIR} was written with another optimizer than "
            f"SOLVER.FOCAL.OPTIMIZER {cfg.SOLVER.FOCAL.OPTIMIZER}"
        )
    before, now = state.get("processes", 1), comm.get_world_size()
    if before != now and cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"--resume: {before} processes wrote the checkpoint in {cfg.OUTPUT_DIR}, not {now}; "
            "SOLVER.REFERENCE_WORLD_SIZE made another schedule for them: take as many, or set it to 0 and "
            "the schedule as it was"
        )
    iteration = state["iteration"]
    if not isinstance(iteration, int) or not 0 <= iteration < _MOST_ITERATIONS:
        raise ValueError(f"iteration {iteration!r}")
    for name, value in state.get("hooks", {}).get("LRScheduler", {}).items():
        numbers = value if isinstance(value, list) else []
        if (
            name not in schedule
            or type(value) is not type(schedule[name])
            or not all(isinstance(x, (int, float)) for x in numbers)
        ):
            raise ValueError(f"the schedule's {name} {value!r}"[:100])


def set_aside(folder: Path) -> None:
    """Move an earlier run's checkpoints and figures away, lest they be taken for the new run's."""
    numbers = (int(x.name[8:]) for x in folder.glob("earlier_*") if x.name[8:].isdecimal())
    earlier = folder / f"earlier_{max(numbers, default=0) + 1}"
    earlier.mkdir()
    for path in [folder / "last_checkpoint", *folder.glob("model_*.pth")]:
        if path.exists():
            path.rename(earlier / path.name)
    figures = folder / "metrics.json"
    if figures.exists():
        # The new run has it open already, to append.
        shutil.copy(figures, earlier)
        os.truncate(figures, 0)
    logger.warning(
        f"checkpoints of an earlier run in {folder} are now in {earlier}; --resume would go on with them"
    )
