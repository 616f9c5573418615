"""Time and memory of the detector's parts beside detectron2's RetinaNet, in one process, taking turns.

Seconds depend on the machine and on its other work; ratios of runs that take turns depend on them least.
Beside each figure is a limit: a part of the work that remains, whatever is done to the rest.

`setting` says what is timed, `timing` measures, `models` builds both detectors and their inputs; every other
module but `report` is one benchmark.
"""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode

from focal_d2.analysis.benchmark.assignment import time_assign
from focal_d2.analysis.benchmark.evaluation import time_evaluation
from focal_d2.analysis.benchmark.exported import time_export
from focal_d2.analysis.benchmark.inference import time_inference
from focal_d2.analysis.benchmark.input import time_input
from focal_d2.analysis.benchmark.loss import time_loss
from focal_d2.analysis.benchmark.memory import measure_memory
from focal_d2.analysis.benchmark.postprocessing import time_postprocessing
from focal_d2.analysis.benchmark.setting import PRECISIONS, Setting, hardware, keep_memory
from focal_d2.analysis.benchmark.step import time_step
from focal_d2.analysis.benchmark.timing import Row

__all__ = ["BENCHMARKS", "PRECISIONS", "Row", "Setting", "hardware", "keep_memory"]

# The first line of each docstring is the help of its subcommand.
BENCHMARKS: dict[str, Callable[[CfgNode, Setting], list[Row]]] = {
    "loss": time_loss,
    "assign": time_assign,
    "step": time_step,
    "inference": time_inference,
    "export": time_export,
    "postprocessing": time_postprocessing,
    "input": time_input,
    "memory": measure_memory,
    "evaluation": time_evaluation,
}
