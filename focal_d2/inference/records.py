"""The records of a prediction run: one JSON line an image, written as they come, and continued after a stop.

In the output folder:

    records.jsonl          a line for each image, in the order of the inputs:
                           {"file", "width", "height", "boxes", "scores", "classes", "labels"}, in videos also
                           "frame" and "seconds"; or {"file", "error"} for one that can't be read
    run.json               what the run is made of: a change of it makes --resume impossible
    records_2_of_8.jsonl   of a shard, with run_2_of_8.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch

from focal_d2.errors import UserError, first_few, reason
from focal_d2.inference.results import Detections
from focal_d2.storage.files import open_file, open_records, read_file, write_aside

LONGEST_RUN_FILE = 2**24  # bytes; 1,203 class names take 20 kB
LONGEST_RECORDS = 2**44
_ERROR = '"error": '


@dataclass(frozen=True)
class Settings:
    """What a run is made of.

    Attributes:
        weights: digest of the model's weights.
        config: digest of its config.
        threshold: of the scores, one a class.
        inputs: digest of the list of files.
        number: of files.
        batch_size: images that are computed together: other batches give other last digits.
        pictures: whether pictures are written.
        shard: this one and the number of all, from 1.
        class_names: K names.
        root: see `Inputs`.
        start: see `Inputs`.
        doubles: see `Inputs`.
    """

    weights: str
    config: str
    threshold: list[float]
    inputs: str
    number: int
    batch_size: int
    pictures: bool
    shard: tuple[int, int]
    class_names: list[str]
    root: str
    start: str
    doubles: list[str]

    @property
    def suffix(self) -> str:
        """What the names of the run's files have of the shard."""
        i, shards = self.shard
        return f"_{i}_of_{shards}" if shards > 1 else ""

    @property
    def part(self) -> range:
        """The files of this shard: whole batches, so that the results do not depend on the shards."""
        i, shards = self.shard
        batches = -(-self.number // self.batch_size)
        first, last = ((batches * k // shards) * self.batch_size for k in (i - 1, i))
        return range(first, min(last, self.number))

    def difference(self, earlier: Settings) -> str:
        """Say in words what has changed since an earlier run; "" if nothing has."""
        for name, words in _IN_WORDS.items():
            before, now = getattr(earlier, name), getattr(self, name)
            if before != now:
                shown = "" if isinstance(now, str) else f" ({_short(before)}, now {_short(now)})"
                return f"{words}{shown}"
        return ""


_IN_WORDS = {
    "weights": "the weights",
    "config": "the config",
    "class_names": "the class names",
    "threshold": "the threshold",
    "number": "the number of inputs",
    "inputs": "the list of inputs",
    "root": "the folder of the inputs",
    "start": "the working folder",
    "doubles": "the list of inputs",
    "batch_size": "the batch size",
    "pictures": "whether pictures are written",
    "shard": "the shard",
}


def _short(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return first_few(dict.fromkeys(value), 3)
    return str(value)


def weights_digest(model: torch.nn.Module) -> str:
    """Return a text that changes with a model's weights."""
    total = hashlib.sha256()
    for name, x in model.state_dict().items():
        total.update(name.encode())
        total.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def record_of(file: str, result: Detections, **more: Any) -> dict[str, Any]:
    """Return the record of an image."""
    boxes, scores, labels = result.rounded()
    return {
        "file": file,
        **more,
        "width": result.width,
        "height": result.height,
        "boxes": boxes,
        "scores": scores,
        "classes": result.names,
        "labels": labels,
    }


class Records:
    """The file of records of a run, open and locked.

    Attributes:
        done: images whose record was there already.
        failed: of them, those that could not be read.
    """

    def __init__(self, folder: Path, settings: Settings, *, resume: bool) -> None:
        """Begin the files of a run, or continue them: a line that is not complete is cut off.

        Raises:
            UserError: if they can't be written, another process writes them, an unfinished run is there and
                `resume` is not given, or the earlier run was made of something else.
        """
        self.path = folder / f"records{settings.suffix}.jsonl"
        run = folder / f"run{settings.suffix}.json"
        self.done = self.failed = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = open_records(self.path)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another process writes it") from error
        except OSError as error:
            raise UserError(f"output folder {folder}: {error}") from error
        try:
            earlier = read_run(run) if run.exists() else None
            if earlier is not None:
                self._continue(settings, earlier, resume=resume)
            elif self._file.read(1):
                raise UserError(
                    f"{self.path} is there without {run.name}: remove it, or choose another --output"
                )
            # The whole of the settings is there before the first record.
            text = json.dumps(asdict(settings), indent=1)
            write_aside(str(run), lambda file: file.write(text.encode()))
        except OSError as error:
            self._file.close()
            raise UserError(f"output folder {folder}: {error}") from error
        except UserError:
            self._file.close()
            raise

    def _continue(self, settings: Settings, earlier: Settings, *, resume: bool) -> None:
        done, end, failed = count_records(self._file)
        if not resume or not done:
            if 0 < done < len(earlier.part):
                raise UserError(
                    f"{self.path} is of a run that has not ended ({done} of {len(earlier.part)} images): "
                    f"--resume continues it; to begin again, remove {self.path.name}"
                )
            self._file.truncate(0)
            self._file.seek(0)
            return
        if change := settings.difference(earlier):
            raise UserError(
                f"--resume: {change} changed since {self.path} was begun; another run needs another --output"
            )
        self.done, self.failed = done, failed
        self._file.truncate(end)
        self._file.seek(end)

    def write(self, lines: Iterable[str]) -> None:
        """Add records, each a line of JSON."""
        try:
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {reason(error)}; --resume continues") from error

    def close(self) -> None:
        """Bring the file to the disk and close it."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def count_records(file: IO[bytes]) -> tuple[int, int, int]:
    """Count the complete records of a file.

    A line is complete if it ends, and is JSON: a disk may hold zeros where a machine lost its power.

    Returns:
        Their number, the position after the last, and how many are of images that could not be read.
    """
    file.seek(0)
    number = end = failed = 0
    for line in file:
        if not line.endswith(b"}\n"):
            break
        number, end = number + 1, end + len(line)
        failed += _ERROR.encode() in line and "error" in json.loads(line)
    return number, end, failed


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a file.

    Raises:
        UserError: naming the line that is no record.
    """
    try:
        with open_file(path, limit=LONGEST_RECORDS) as file:
            for number, line in enumerate(file, 1):
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}, line {number}: no record: {error}") from error
                yield record
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error


def read_run(path: Path) -> Settings:
    """Read what a run is made of.

    Raises:
        UserError: if the file can't be read.
    """
    try:
        content = json.loads(read_file(path, limit=LONGEST_RUN_FILE))
        return Settings(**{**content, "shard": tuple(content["shard"])})
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged; remove it to begin the run again") from error


def join_shards(folder: Path) -> Settings:
    """Put the records of all shards together as records.jsonl, in the order of the inputs.

    Without shards nothing is done.

    Returns:
        The settings of the whole run.

    Raises:
        UserError: naming the shard that is missing, not complete, or made of something else.
    """
    runs = {path: read_run(path) for path in sorted(folder.glob("run_*_of_*.json"))}
    if not runs:
        if not (folder / "run.json").exists():
            raise UserError(f"--join: {folder} has no records of a run")
        return read_run(folder / "run.json")
    numbers = {x.shard[1] for x in runs.values()}
    if len(numbers) > 1:
        raise UserError(f"--join: {folder} has shards of {first_few(sorted(numbers))}; remove those of one")
    (shards,) = numbers
    of_shard = {x.shard[0]: x for x in runs.values()}
    if missing := [str(i) for i in range(1, shards + 1) if i not in of_shard]:
        raise UserError(f"--join: {folder} lacks shard {first_few(missing)} of {shards}")
    first = of_shard[1]
    parts = []
    for i, settings in sorted(of_shard.items()):
        alike = Settings(**{**asdict(settings), "shard": first.shard})
        if change := alike.difference(first):
            raise UserError(f"--join: shard {i} of {shards} differs from shard 1 in {change}")
        parts.append(folder / f"records{settings.suffix}.jsonl")
        with _opened(parts[-1]) as file:
            done = count_records(file)[0]
        if done != len(settings.part):
            raise UserError(
                f"--join: shard {i} of {shards} has {done} of {len(settings.part)} images: --resume "
                "continues it"
            )

    def join(whole: IO[bytes]) -> None:
        for part in parts:
            with _opened(part) as file:
                shutil.copyfileobj(file, whole)

    whole = Settings(**{**asdict(first), "shard": (1, 1)})
    write_aside(str(folder / "records.jsonl"), join)
    text = json.dumps(asdict(whole), indent=1)
    write_aside(str(folder / "run.json"), lambda file: file.write(text.encode()))
    return whole


def _opened(path: Path) -> IO[bytes]:
    try:
        return open_file(path, limit=LONGEST_RECORDS)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from error
