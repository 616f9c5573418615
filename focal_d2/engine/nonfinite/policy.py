"""Handle a step that is not finite as `SOLVER.FOCAL.ON_NONFINITE` says: stop, skip, or halve the rate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import nn

from focal_d2.engine.nonfinite.examination import examine
from focal_d2.engine.nonfinite.facts import Step
from focal_d2.engine.nonfinite.saved_step import save_step
from focal_d2.errors import UserError, describe_error

logger = logging.getLogger(__name__)

# A training that skips steps saves so many of them at most, because each file contains the model.
_MOST_REPORTS = 5


class BadStep(NamedTuple):
    """A step that was not finite in some process, as one process of the job sees it."""

    iteration: int
    is_bad_here: bool  # whether the loss or gradient of this process was not finite
    model: nn.Module  # in the state from before the step, without DistributedDataParallel
    precision: Callable[[], AbstractContextManager[Any]]  # makes the autocast context of the forward pass
    parts: list[list[dict[str, Any]]]  # this process's batch, as the model got it
    losses: dict[str, float]  # the mean over the parts
    normalizer: float | None  # the losses of a part were divided by it
    steps: list[Step]  # the last iterations, oldest first


class NonfinitePolicy:
    """Examines a bad step, saves it with a report, and then stops, skips or halves the learning rate."""

    def __init__(self, cfg: CfgNode, *, halve_rates: Callable[[], None]) -> None:
        """Take the policy.

        Args:
            cfg: full config, with NUM_CLASSES and ALPHA as numbers.
            halve_rates: halves the learning rates of this iteration and of the schedule.
        """
        self._cfg = cfg
        self._halve_rates = halve_rates
        self._reports = 0

    def __call__(self, step: BadStep) -> None:
        """Handle a bad step; all processes of the job must call it, each with its own part.

        Raises:
            UserError: if the policy is to stop.
        """
        policy = self._cfg.SOLVER.FOCAL.ON_NONFINITE
        # All processes examine, because a model may exchange numbers with the others in its forward pass.
        failed_again, line = self._examine(step)
        # Averaged gradients are bad in every process. The cause is where the step fails again by itself.
        _, line = max(comm.all_gather((step.is_bad_here and failed_again, line if step.is_bad_here else "")))
        what = f"the loss or gradient became infinite or NaN at iteration {step.iteration}: {line}"
        if policy == "stop":
            raise UserError(what)
        logger.warning(f"{what}; the step is skipped (SOLVER.FOCAL.ON_NONFINITE {policy})")
        if policy == "halve_lr":
            self._halve_rates()

    def _examine(self, step: BadStep) -> tuple[bool, str]:
        """Repeat the step of this process. Return whether it failed again, and a line about the cause."""
        try:
            with step.precision():
                reports = [
                    examine(step.model, part, steps=step.steps, normalizer=step.normalizer)
                    for part in step.parts
                ]
        except (RuntimeError, MemoryError) as error:  # such as too little memory for a second step
            return False, f"its cause could not be examined ({describe_error(error)})"
        bad = [bool(report.bad_terms or report.gradient) for report in reports]
        which = bad.index(True) if any(bad) else 0
        report = reports[which]
        if not step.is_bad_here or self._reports >= _MOST_REPORTS:
            return any(bad), report.verdict
        self._reports += 1
        try:
            folder = save_step(
                self._cfg.OUTPUT_DIR,
                cfg=self._cfg,
                model=step.model,
                batch=step.parts[which],
                losses=step.losses if len(step.parts) == 1 else report.losses,
                steps=step.steps,
                normalizer=step.normalizer,
                iteration=step.iteration,
                rank=comm.get_rank(),
                report=report,
            )
        except OSError as error:
            return any(bad), f"{report.verdict} (the report could not be written: {error})"
        repeat = f"{folder}/report.txt; focal-d2 replay {folder} repeats the step"
        return any(bad), f"{report.verdict} ({repeat})"
