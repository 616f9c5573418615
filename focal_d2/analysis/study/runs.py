"""Run a study: each cell and seed is an ordinary training run with its own process and folder.

If a study is stopped, the same command continues it: the results of finished runs are read, and a run that
was interrupted resumes from its last checkpoint. Runs that ended on another machine come from a results.csv.
"""

from __future__ import annotations

import csv
import fcntl
import functools
import hashlib
import io
import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import get_cfg

from focal_d2.analysis.study.grid import Cell, Grid
from focal_d2.config import add_focal_config, leaves
from focal_d2.errors import UserError, one_line
from focal_d2.storage.files import create_file, read_file, write_aside
from focal_d2.storage.yaml_text import parse_yaml

_RECORD = "run.json"
_LARGEST_RECORD = 2**30  # bytes of it and of metrics.json
_BOX_METRIC = re.compile(r"(^|/)bbox/")
# The trainer's message about a loss that is not finite.
DIVERGED = re.compile(r"became infinite or NaN at iteration (\d+)")


class Run(NamedTuple):
    """A training run of a study."""

    cell: Cell
    seed: int
    folder: Path
    command: list[str]
    config: str  # the whole config as YAML; a folder with another config belongs to another run

    @property
    def fingerprint(self) -> str:
        """16 hex digits for the values of the config that are not the defaults.

        It stays the same if a later version adds a key.
        """
        values, defaults = leaves(_parse_config(self.config, f"cell {self.cell.name}")), _default_values()
        changed = {key: x for key, x in values.items() if key not in defaults or defaults[key] != x}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:16]


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


def plan(
    grid: Grid, seeds: Sequence[int], output: Path, command: Sequence[str], check: Callable[[list[str]], str]
) -> list[Run]:
    """List the runs of a study: all cells with the first seed, then all cells with the next.

    In this order a study that is stopped early has a complete table.

    Args:
        grid: the cells.
        seeds: of each cell.
        output: the study's folder.
        command: of a training run, to which KEY VALUE … are added.
        check: given a cell's KEY VALUE …, returns the whole config as YAML, or raises UserError. It is called
            for all cells before the first run, so that a mistake in the last cell is reported at once.

    Raises:
        UserError: naming the cell.
    """
    configs = []
    for cell in grid.cells:
        try:
            configs.append(check(cell.overrides))
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from error
    runs = []
    for seed in seeds:
        for cell, config in zip(grid.cells, configs, strict=True):
            folder = output / cell.folder / f"seed_{seed}"
            overrides = [*cell.overrides, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
            runs.append(Run(cell, seed, folder, [*command, *overrides], config))
    return runs


def run_study(
    runs: Sequence[Run],
    output: Path,
    after: Callable[[list[Result], Result | None], None],
    known: Mapping[tuple[str, int], Result] | None = None,
) -> list[Result]:
    """Run what has no result yet, one run after another, and read the results of the others.

    A run that diverges or fails does not stop the others. The same command repeats a run that failed, but not
    one that diverged.

    Args:
        runs: of one study.
        output: the study's folder.
        after: called with all results so far, in the order of `runs`, and the newest one: at the start with
            None for the newest, then after each run.
        known: results of runs on other machines, by cell and seed (`read_results`).

    Returns:
        A result for each run.

    Raises:
        UserError: if a study still runs in the folder, the folder has a run with another config or of
            unknown origin, or a file can't be written.
    """
    with _locked(output) as lock:
        for run in runs:
            _check_same_config(run)
        results = [_stored(run) or (known or {}).get((run.cell.name, run.seed)) for run in runs]
        after([result for result in results if result], None)
        for i, run in enumerate(runs):
            if results[i] is None:
                results[i] = _execute(run, lock)
                after([result for result in results if result], results[i])
    return [result for result in results if result]


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Lock the folder. The training process inherits the lock: it continues if the study is killed."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = create_file(output / ".lock")
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
    if record is None:
        # The run would resume from such a checkpoint, which another config may have written.
        if (run.folder / "last_checkpoint").exists():
            raise UserError(
                f"{run.folder} has checkpoints but no {_RECORD}: choose another output folder, or delete it"
            )
        return
    if record["config"] == run.config:
        return
    source = f"{run.folder / _RECORD}: config"
    before, now = (leaves(_parse_config(x, source)) for x in (record["config"], run.config))
    changed = [k for k in before.keys() | now.keys() if before.get(k) != now.get(k)]
    if not changed:
        return
    key = min(changed, key=str)
    values = f"{key} {before.get(key)}, not {now.get(key)}"
    raise UserError(f"{run.folder} was run with {values}: choose another output folder, or delete it")


@functools.cache
def _default_values() -> dict[str, Any]:
    cfg = get_cfg()
    add_focal_config(cfg)
    return leaves(_parse_config(cfg.dump(), "defaults"))


def _parse_config(text: str, source: str) -> dict[str, Any]:
    config = parse_yaml(text, source)
    return config if isinstance(config, dict) else {}


def _stored(run: Run) -> Result | None:
    record = _read_record(run)
    if record is None or record["status"] not in ("finished", "diverged"):
        return None
    return Result(run.cell.name, run.seed, record["status"], record["iteration"], record["metrics"], "")


def _execute(run: Run, lock: int) -> Result:
    run.folder.mkdir(parents=True, exist_ok=True)
    _write_record(run, Result(run.cell.name, run.seed, "running", None, {}, ""))
    console = run.folder / "console.txt"
    with create_file(console) as stream:
        process = subprocess.run(
            run.command, stdout=stream, stderr=subprocess.STDOUT, pass_fds=(lock,), check=False
        )
    text = console.read_text(encoding="utf-8", errors="replace")
    diverged = DIVERGED.search(text)
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


def _read_record(run: Run) -> dict[str, Any] | None:
    path = run.folder / _RECORD
    if not path.exists():
        return None
    try:
        record = json.loads(read_file(path, limit=_LARGEST_RECORD))
    except (OSError, ValueError, RecursionError):
        record = None
    if not _is_record(record):
        raise UserError(f"{path} is damaged: delete the folder to repeat the run")
    return dict(record)


def _is_record(record: Any) -> bool:
    """Return whether a file's content has the fields of a record; another program may have written it."""
    if not isinstance(record, dict) or not {*Result._fields, "config"} <= record.keys():
        return False
    metrics = record["metrics"]
    return (
        isinstance(record["config"], str)
        and isinstance(record["status"], str)
        and isinstance(record["iteration"], (int, type(None)))
        and isinstance(metrics, dict)
        and all(isinstance(x, (int, float)) for x in metrics.values())
    )


def _write_record(run: Run, result: Result) -> None:
    record = {**result._asdict(), "settings": run.cell.settings, "config": run.config}
    path = run.folder / _RECORD
    write_aside(str(path), lambda file: file.write(json.dumps(record, indent=1).encode()))


def read_results(path: Path, runs: Sequence[Run]) -> dict[tuple[str, int], Result]:
    """Read the runs that ended from a results.csv, which another machine may have written.

    Args:
        path: the file.
        runs: of the study. Rows of other cells and seeds are left out.

    Returns:
        Results that finished or diverged, by cell and seed.

    Raises:
        UserError: if the file is no results.csv, or a row was run with another config.
    """
    try:
        text = read_file(path, limit=_LARGEST_RECORD).decode()
        table = csv.DictReader(io.StringIO(text), strict=True)
        missing = {"cell", "seed", "status", "diverged at", "config"} - set(table.fieldnames or ())
        if missing:
            raise ValueError(f"it has no column {min(missing)}")
        rows = list(table)
        results = [_row_result(row) for row in rows]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is no results.csv of a study: {one_line(error)}") from error
    fingerprints = {(run.cell.name, run.seed): run.fingerprint for run in runs}
    known = {}
    for row, result in zip(rows, results, strict=True):
        key = (result.cell, result.seed)
        if key not in fingerprints or result.status not in ("finished", "diverged"):
            continue
        if row["config"] != fingerprints[key]:
            raise UserError(
                f"{path}: {result.cell}, seed {result.seed}, was run with another config "
                f"({row['config']}, not {fingerprints[key]})"
            )
        known[key] = result
    return known


def _row_result(row: dict[str, str]) -> Result:
    metrics = {key: float(x) for key, x in row.items() if _BOX_METRIC.search(key) and x}
    iteration = int(row["diverged at"]) if row["diverged at"] else None
    return Result(row["cell"], int(row["seed"]), row["status"], iteration, metrics, "")


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Return the lines of a run's metrics.json, in the order of their iterations."""
    path = folder / "metrics.json"
    text = read_file(path, limit=_LARGEST_RECORD).decode(errors="replace") if path.is_file() else ""
    metrics = []
    for line in text.splitlines():
        # A run that was killed may leave part of a line. The resumed run appends a complete one to it.
        with suppress(ValueError, RecursionError):
            metrics.append(json.loads(line[max(line.rfind("{"), 0) :]))
    metrics = [x for x in metrics if isinstance(x, dict) and isinstance(x.get("iteration"), int)]
    # The resumed run also repeats iterations after the last checkpoint.
    return sorted(metrics, key=lambda m: m["iteration"])


def last_metrics(folder: Path) -> dict[str, float]:
    """Return the box metrics of a run's last evaluation."""
    metrics: dict[str, float] = {}
    for line in read_metrics(folder):
        metrics.update({key: x for key, x in line.items() if _BOX_METRIC.search(key)})
    return metrics
