"""Find out why a training step was not finite: the examination, its report, and the saved step's replay."""

from focal_d2.engine.nonfinite.examination import examine
from focal_d2.engine.nonfinite.facts import Step
from focal_d2.engine.nonfinite.policy import BadStep, NonfinitePolicy
from focal_d2.engine.nonfinite.report import Report
from focal_d2.engine.nonfinite.saved_step import load_step, replay, save_step

__all__ = [
    "BadStep",
    "NonfinitePolicy",
    "Report",
    "Step",
    "examine",
    "load_step",
    "replay",
    "save_step",
]
