"""COCO annotation files: reading those that somebody made by hand or with a script, and making one."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from detectron2.data.datasets import load_coco_json

from focal_d2.errors import UserError

_REQUIRED = {
    "images": ("id", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


def load_coco(annotations: str, images: str, name: str) -> list[dict[str, Any]]:
    """Read a COCO file in detectron2's dataset format, and set the dataset's class names.

    Args:
        annotations: the json file.
        images: folder of the images.
        name: the dataset's registered name.

    Raises:
        UserError: naming the file and the first item that is wrong.
    """
    for problem in _problems(annotations):
        raise UserError(f"{annotations}: {problem}")
    return load_coco_json(annotations, images, name)


def _problems(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            coco = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        yield f"not readable as JSON: {error}"
        return
    for section, required in _REQUIRED.items():
        items = coco.get(section) if isinstance(coco, dict) else None
        if not isinstance(items, list):
            yield f'no list "{section}"; a COCO file has {", ".join(_REQUIRED)}'
            return
        seen = set()
        for i, item in enumerate(items):
            missing = [k for k in required if not isinstance(item, dict) or k not in item]
            if missing:
                yield f"{section}[{i}] has no {', '.join(missing)}"
                return
            if not isinstance(item["id"], int) or item["id"] in seen:
                yield f"{section}[{i}] has the id {item['id']!r}; ids must be different whole numbers"
            seen.add(item["id"])
    if not coco["images"] or not coco["categories"]:
        yield "no images or no categories in it"
    images = {x["id"] for x in coco["images"]}
    categories = {x["id"] for x in coco["categories"]}
    for i, item in enumerate(coco["annotations"]):
        for key, known in (("image_id", images), ("category_id", categories)):
            if item[key] not in known:
                yield f"annotations[{i}] (id {item['id']}) has an unknown {key}: {item[key]!r}"
        box = item["bbox"]
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)) or min(box[2:]) < 0:
            yield f"annotations[{i}] (id {item['id']}) has the bbox {box!r}; it must be [x, y, width, height]"


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def coco_content(
    description: str,
    images: Iterable[tuple[str, Sequence[int], Sequence[Sequence[float]], Sequence[int]]],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Return what a COCO file of these images holds.

    Args:
        description: of the dataset.
        images: of each the file name, its (height, width), its boxes (M, 4) XYXY absolute pixels, and their
            classes (M,) in [0, K).
        classes: the K names.
    """
    content: dict[str, Any] = {
        "info": {"description": description},
        "images": [],
        "annotations": [],
        "categories": [{"id": k, "name": name} for k, name in enumerate(classes, 1)],
    }
    for image_id, (name, (height, width), boxes, labels) in enumerate(images, 1):
        content["images"].append({"id": image_id, "file_name": name, "width": width, "height": height})
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image_id,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    return content
