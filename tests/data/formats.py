"""One dataset on disk in each of the four formats."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from focal_d2.data import Table

STYLES = ("coco", "csv", "voc", "yolo")


def write(style: str, folder: Path, table: Table, images: Path, name: str | None = None) -> dict[str, Any]:
    """Write a table's annotations under a folder; returns the entry of `DATASETS.FOCAL`.

    COCO's ids run against the order of names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [os.path.relpath(path, images) for path in table.file_names]
    boxes = [
        [
            (table.classes[table.labels[b]], table.boxes[b].tolist(), bool(table.ignored[b]))
            for b in (table.image == i).nonzero()[0]
        ]
        for i in range(len(table))
    ]
    target = globals()[f"_write_{style}"](folder, table, files, boxes)
    return {
        "NAME": name or f"{style}_{folder.name}",
        "FORMAT": style,
        "IMAGES": str(images),
        "ANNOTATIONS": str(target),
        "CLASSES": list(table.classes),
    }


def _write_coco(folder: Path, table: Table, files: list[str], boxes: list[Any]) -> Path:
    content: dict[str, list[Any]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 3 * k + 1, "name": name} for k, name in enumerate(table.classes)],
    }
    for i, (name, objects) in enumerate(zip(files, boxes, strict=True)):
        height, width = table.sizes[i].tolist()
        content["images"].append({"id": 99 - i, "file_name": name, "height": height, "width": width})
        for label, box, ignored in objects:
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 99 - i,
                    "category_id": 3 * table.classes.index(label) + 1,
                    "bbox": box,
                    "iscrowd": int(ignored),
                }
            )
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def _write_csv(folder: Path, table: Table, files: list[str], boxes: list[Any]) -> Path:
    lines = ["image,xmin,ymin,xmax,ymax,label,ignored"]
    for name, objects in zip(files, boxes, strict=True):
        for label, (x, y, w, h), ignored in objects:
            lines.append(f"{name},{x!r},{y!r},{x + w!r},{y + h!r},{label},{int(ignored)}")
        if not objects:
            lines.append(f"{name},,,,,,")
    path = folder / "annotations.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def _write_voc(folder: Path, table: Table, files: list[str], boxes: list[Any]) -> Path:
    for i, (name, objects) in enumerate(zip(files, boxes, strict=True)):
        height, width = table.sizes[i].tolist()
        parts = [f"<filename>{name}</filename><size><width>{width}</width><height>{height}</height></size>"]
        for label, (x, y, w, h), ignored in objects:
            corners = zip(("xmin", "ymin", "xmax", "ymax"), (x + 1, y + 1, x + w, y + h), strict=True)
            box = "".join(f"<{key}>{value!r}</{key}>" for key, value in corners)
            parts.append(
                f"<object><name>{label}</name><difficult>{int(ignored)}</difficult>"
                f"<bndbox>{box}</bndbox></object>"
            )
        (folder / f"{Path(name).stem}.xml").write_text(f"<annotation>{''.join(parts)}</annotation>")
    return folder


def _write_yolo(folder: Path, table: Table, files: list[str], boxes: list[Any]) -> Path:
    for i, (name, objects) in enumerate(zip(files, boxes, strict=True)):
        height, width = table.sizes[i].tolist()
        lines = []
        for label, (x, y, w, h), ignored in objects:
            assert not ignored
            relative = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
            lines.append(" ".join([str(table.classes.index(label)), *(f"{v:.6f}" for v in relative)]))
        if lines:
            (folder / f"{Path(name).stem}.txt").write_text("\n".join(lines) + "\n")
    return folder
