"""Files for other programs, made of a run's records: CSV, COCO, YOLO. Memory does not grow with the run."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from focal_d2.errors import UserError, reason
from focal_d2.inference.inputs import Inputs
from focal_d2.inference.records import Settings, read_records
from focal_d2.inference.results import COLUMNS, coco_result, csv_rows
from focal_d2.storage.files import create_file, write_aside

_SHARE_DECIMALS = 6  # of YOLO's numbers


def write_formats(folder: Path, settings: Settings, formats: tuple[str, ...]) -> None:
    """Write files in the output folder.

    Args:
        folder: with records.jsonl.
        settings: of the run.
        formats: names of `FORMATS`.

    Raises:
        UserError: if a file can't be read or written.
    """
    inputs = Inputs([], settings.root, settings.start, frozenset(settings.doubles))
    for name in formats:
        try:
            FORMATS[name](folder, settings, inputs)
        except OSError as error:
            raise UserError(f"cannot write {name} to {folder}: {reason(error)}") from error


def _sound(folder: Path, inputs: Inputs) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the record of each image that could be read; a frame's name ends with its number."""
    for record in read_records(folder / "records.jsonl"):
        if "error" not in record:
            frame = f"#{record['frame']:06d}" if "frame" in record else ""
            yield f"{inputs.name(record['file'])}{frame}", record


def _write_csv(folder: Path, settings: Settings, inputs: Inputs) -> None:
    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="", write_through=True)
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for name, x in _sound(folder, inputs):
            writer.writerows(csv_rows(name, x["boxes"], x["scores"], x["labels"], settings.class_names))
        text.detach()

    write_aside(str(folder / "detections.csv"), write)


def _write_coco(folder: Path, settings: Settings, inputs: Inputs) -> None:
    def images() -> Iterator[dict[str, Any]]:
        for i, (name, x) in enumerate(_sound(folder, inputs), 1):
            yield {"id": i, "file_name": name, "width": x["width"], "height": x["height"]}

    def annotations() -> Iterator[dict[str, Any]]:
        number = 0
        for i, (_, x) in enumerate(_sound(folder, inputs), 1):
            for values in zip(x["boxes"], x["scores"], x["labels"], strict=True):
                number += 1
                result = coco_result(i, *values)
                area = round(result["bbox"][2] * result["bbox"][3], 2)
                yield {"id": number, **result, "area": area, "iscrowd": 0}

    def write(file: IO[bytes]) -> None:
        names = settings.class_names
        categories = iter([{"id": k + 1, "name": name} for k, name in enumerate(names)])
        for start, items in (
            ('{"images": [', images()),
            ('], "annotations": [', annotations()),
            ('], "categories": [', categories),
        ):
            file.write(start.encode())
            for i, item in enumerate(items):
                file.write(f"{',' if i else ''}\n{json.dumps(item)}".encode())
        file.write(b"]}\n")

    write_aside(str(folder / "detections.json"), write)


def _write_yolo(folder: Path, settings: Settings, inputs: Inputs) -> None:
    labels = folder / "labels"
    for _, x in _sound(folder, inputs):
        frame = f"_{x['frame']:06d}" if "frame" in x else ""
        path = labels / f"{inputs.stem(x['file'])}{frame}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for (x0, y0, x1, y1), label in zip(x["boxes"], x["labels"], strict=True):
            width, height = x["width"], x["height"]
            shares = ((x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height)
            lines.append(f"{label} {' '.join(f'{share:.{_SHARE_DECIMALS}f}' for share in shares)}\n")
        with create_file(path) as file:
            file.write("".join(lines).encode())
    names = "".join(f"{' '.join(name.split())}\n" for name in settings.class_names)
    os.makedirs(labels, exist_ok=True)
    write_aside(str(labels / "classes.txt"), lambda file: file.write(names.encode()))


# Name of --format -> what writes it.
FORMATS: dict[str, Callable[[Path, Settings, Inputs], None]] = {
    "csv": _write_csv,
    "coco": _write_coco,
    "yolo": _write_yolo,
}
