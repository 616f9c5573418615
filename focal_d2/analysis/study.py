"""Running a study: each cell and seed an ordinary training run in a process and folder of its own.

Whatever stops a study, the same command goes on with it: finished runs are read back, a run that was cut off
resumes from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from focal_d2.analysis.grid import Cell
from focal_d2.errors import UserError

# What detectron2's trainer says of a loss that is not finite.
_DIVERGED = re.compile(r"Loss became infinite or NaN at iteration=(\d+)")


class Run(NamedTuple):
    """A training run of a study."""

    cell: Cell
    seed: int
    folder: Path
    command: list[str]
    config: str  # the whole config; a run made with another one is not taken for this one


class Result(NamedTuple):
    """How a run ended."""

    cell: str
    seed: int
    status: str  # "finished", "diverged" or "failed"
    iteration: int | None  # where it diverged
    metrics: dict[str, float]  # of the last evaluation, per cent, by detectron2's names ("bbox/AP")
    message: str  # why it failed

    @property
    def line(self) -> str:
        """The result as a line of text."""
        end = self.message
        if self.status == "finished":
            end = ", ".join(f"{k} {v:.1f}" for k, v in self.metrics.items() if k.endswith(("/AP", "/AP50")))
        if self.status == "diverged":
            end = f"loss infinite or NaN at iteration {self.iteration}"
        return f"{self.cell}, seed {self.seed}: {self.status}: {end}"


def run_study(runs: Sequence[Run], output: Path, after: Callable[[list[Result]], None]) -> list[Result]:
    """Run what is missing, one after another, and read back what is there.

    A run that diverges or fails does not stop the others. A failed one is tried again next time, a diverged
    one is not.

    Args:
        runs: of one study.
        output: the study's folder.
        after: called with all results so far, after each run.

    Raises:
        UserError: if a study still runs in the folder, or the folder has a run with another config.
    """
    results: list[Result] = []
    with _locked(output) as lock:
        for run in runs:
            _check_same_config(run)
        for run in runs:
            results.append(_stored(run) or _execute(run, lock))
            after(results)
    return results


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Hold the folder. The training process inherits the lock, as it outlives a killed study."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{output}: {error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{output} is in use: a study, or a training run that one started, still runs there"
            ) from None
        yield file.fileno()


def _check_same_config(run: Run) -> None:
    record = _read_record(run)
    if record and record["config"] != _digest(run):
        raise UserError(
            f"{run.folder} was run with another config: choose another output folder, or delete this one"
        )


def _stored(run: Run) -> Result | None:
    record = _read_record(run)
    if record is None or record["status"] not in ("finished", "diverged"):
        return None
    return Result(run.cell.name, run.seed, record["status"], record["iteration"], record["metrics"], "")


def _execute(run: Run, lock: int) -> Result:
    run.folder.mkdir(parents=True, exist_ok=True)
    _write_record(run, Result(run.cell.name, run.seed, "running", None, {}, ""))
    console = run.folder / "console.txt"
    with console.open("w") as stream:
        process = subprocess.run(
            run.command, stdout=stream, stderr=subprocess.STDOUT, pass_fds=(lock,), check=False
        )
    text = console.read_text(errors="replace")
    diverged = _DIVERGED.search(text)
    result = Result(run.cell.name, run.seed, "finished", None, {}, "")
    if process.returncode == 0:
        result = result._replace(metrics=last_metrics(run.folder))
    elif diverged:
        result = result._replace(status="diverged", iteration=int(diverged.group(1)))
    else:
        last = (text.strip().splitlines() or ["it wrote nothing"])[-1]
        message = f"exit status {process.returncode}: {last} ({console})"
        result = result._replace(status="failed", message=message)
    _write_record(run, result)
    return result


def _record_file(run: Run) -> Path:
    return run.folder / "run.json"


def _read_record(run: Run) -> dict[str, Any] | None:
    path = _record_file(run)
    return json.loads(path.read_text()) if path.is_file() else None


def _write_record(run: Run, result: Result) -> None:
    record = {**result._asdict(), "settings": run.cell.settings, "config": _digest(run)}
    path = _record_file(run)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=1))
    os.replace(aside, path)


def _digest(run: Run) -> str:
    return hashlib.sha256(run.config.encode()).hexdigest()


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.json, in the order of their iterations."""
    path = folder / "metrics.json"
    lines = path.read_text().splitlines() if path.is_file() else []
    # A run that was killed may leave half a line, and its resumption writes some iterations again.
    return sorted(
        (json.loads(x) for x in lines if x.startswith("{") and x.endswith("}")), key=lambda m: m["iteration"]
    )


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the box metrics of a run's last evaluation."""
    metrics: dict[str, float] = {}
    for line in read_metrics(folder):
        metrics.update({key: x for key, x in line.items() if re.search(r"(^|/)bbox/", key)})
    return metrics
