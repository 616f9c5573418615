"""Run the parts in order, each within its budget, and write the results after each line."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from focal_d2.analysis.gpu_check.lines import Check, Line, Measurement
from focal_d2.analysis.gpu_check.parts import PARTS
from focal_d2.analysis.gpu_check.processes import ProcessEnded, stream
from focal_d2.analysis.gpu_check.sizes import GPU, REHEARSAL
from focal_d2.errors import UserError, describe_error

# How parts get their processes: from a server that has imported what they need and has not used the GPU.
_METHOD = "forkserver"
_PACKAGE = "focal_d2.analysis.gpu_check"
# Seconds that a part may need for its last measurement beyond its budget, before it is killed.
_GRACE = 20.0
_FIRST = 120.0  # seconds for the import of PyTorch and detectron2, and for the GPU's first answer


class PartResult(NamedTuple):
    """What became of a part."""

    number: int
    title: str
    budget: float  # seconds; 0: it was not started
    seconds: float
    lines: list[Line]
    problem: str  # why it was not started, or did not come to its end

    @property
    def gave_nothing(self) -> bool:
        """Whether it had time and no figure came of it."""
        return self.budget > 0 and all(line.value is None for line in self.lines)

    @property
    def passed(self) -> bool:
        """Whether it ended, all its figures are there, and all aims are met."""
        complete = self.budget > 0 and not self.problem and bool(self.lines)
        return complete and all(not line.problem and line.met is not False for line in self.lines)


def find_device(device: str) -> str:
    """Return the device's name. It is the first to start a process, which imports what the parts need.

    Raises:
        UserError: if PyTorch finds no such device.
    """
    multiprocessing.set_forkserver_preload([f"{_PACKAGE}.{part.module}" for part in PARTS.values()])
    try:
        (name,) = stream(name_device, device, seconds=_FIRST, method=_METHOD)
    except ProcessEnded as ended:
        raise UserError(f"the {device} device does not answer: {ended}") from ended
    if name is None:
        raise UserError("PyTorch finds no CUDA device on this machine; --device cpu rehearses without one")
    return str(name)


def name_device(device: str) -> Iterator[str | None]:
    """Yield the name of the device, None if there is none."""
    from focal_d2.analysis.benchmark.cuda import cuda_calls

    cuda = cuda_calls(device)
    yield cuda.get_device_properties(device).name if cuda.is_available() else None


def run_parts(
    numbers: Sequence[int],
    *,
    device: str,
    seconds: float,
    folder: Path,
    report: Callable[[list[PartResult]], None],
) -> list[PartResult]:
    """Run parts one after another.

    Args:
        numbers: of `PARTS`.
        device: "cuda", or "cpu" for a rehearsal.
        seconds: for all of them.
        folder: where they write files.
        report: called with the results so far, after each line and at the end of each part.
    """
    sizes = REHEARSAL if device == "cpu" else GPU
    end = time.monotonic() + seconds
    done: list[PartResult] = []
    for number in numbers:
        part = PARTS[number]
        start = time.monotonic()
        budget = min(part.seconds or end - start, end - start)
        lines: list[Line] = []

        def result(budget: float, problem: str = "") -> PartResult:
            return PartResult(number, part.title, budget, time.monotonic() - start, lines, problem)  # noqa: B023

        if budget < part.least:
            problem = f"not started: {max(0.0, budget):.0f} s are left, and it needs {part.least:.0f}"
            done.append(result(0.0, problem))
            report(done)
            continue
        problem = ""
        try:
            check = Check(device, sizes, folder, start + budget)
            for line in stream(measure, number, check, seconds=budget + _GRACE, method=_METHOD):
                lines.append(line)
                report([*done, result(budget)])
        except ProcessEnded as ended:
            problem = str(ended)
        done.append(result(budget, problem))
        report(done)
    return done


def measure(number: int, check: Check) -> Iterator[Line]:
    """Yield the lines of a part, which runs in this process.

    A measurement that fails is a line as well, and the next one is tried.
    """
    import torch

    if not check.on_gpu:
        torch.set_num_threads(1)  # a fork has no other threads, and some libraries wait for them
    for name in ("focal_d2", "detectron2", "fvcore"):
        logging.getLogger(name).setLevel(logging.ERROR)  # the lines say what matters
    part = importlib.import_module(f"{_PACKAGE}.{PARTS[number].module}")
    measurements: Iterator[Measurement] = part.measurements(check)
    for measurement in measurements:
        left = check.seconds_left()
        if left < measurement.seconds or left < 0:
            needed = f", and it needs {measurement.seconds:.0f}" if measurement.seconds else ""
            problem = f"not measured: {max(0.0, left):.0f} s of the part are left{needed}"
            yield Line(measurement.name, problem=problem)
        else:
            yield from _lines_of(measurement, check)


def _lines_of(measurement: Measurement, check: Check) -> list[Line]:
    try:
        return measurement.run()
    except Exception as error:  # what fails is a result, and belongs into the table
        check.cuda.empty_cache()
        details: Any = traceback.format_exc()
        return [Line(measurement.name, problem=f"failed: {describe_error(error)}", details=details)]
