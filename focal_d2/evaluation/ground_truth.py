"""The boxes of a registered dataset, in the columns that AP is computed from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from focal_d2.annotations import Table, registered_table
from focal_d2.errors import UserError
from focal_d2.evaluation.backends import Truth
from focal_d2.ops.common import ANY_CLASS
from focal_d2.storage.files import LARGEST_ANNOTATIONS, read_data


class GroundTruth(NamedTuple):
    """What a dataset says there is in N images of K classes.

    Attributes:
        image_ids: N ids as detections name them, ascending; the place of an id in this list is the image's
            number in `Truth`.
        labels: the dataset's own number of each class -> label in [0, K).
        truth: the boxes; None: a test set whose objects are not published.
    """

    image_ids: list[Any]
    labels: dict[int, int]
    truth: Truth | None


class _Box(NamedTuple):
    """A box of a file or of records."""

    image_id: Any
    label: int
    corners: Sequence[float]  # left, top, width, height, pixels
    area: float
    ignored: bool


def read_ground_truth(name: str) -> GroundTruth:
    """Return the boxes of a dataset: those of its metadata's `json_file`, else its table, else its records.

    Raises:
        UserError: if the annotations can't be read.
    """
    metadata = MetadataCatalog.get(name)
    labels = metadata.get("thing_dataset_id_to_contiguous_id")
    if metadata.get("json_file") is not None:
        return _of_file(metadata.json_file, labels)
    table = registered_table(name)
    if table is not None:
        return _of_table(table.whole())
    return _of_records(name, DatasetCatalog.get(name), metadata.get("thing_classes"), labels)


def _of_table(table: Table) -> GroundTruth:
    labels = {number: label for label, number in enumerate(table.category_ids)}
    image_ids, image = np.unique(table.image_ids, return_inverse=True)
    if not table.annotated:
        return GroundTruth(image_ids.tolist(), labels, None)
    # The boxes that training sees: no detection can match one without area.
    rows = np.flatnonzero(table.usable)
    truth = Truth(
        images=len(image_ids),
        classes=len(labels),
        image=image[table.image[rows]],
        boxes=table.boxes[rows],
        labels=table.labels[rows],
        areas=table.areas[rows],
        ignored=table.ignored[rows],
    )
    return GroundTruth(image_ids.tolist(), labels, _with_a_region_of_each_class(truth))


def _of_file(path: str, labels: Mapping[int, int] | None) -> GroundTruth:
    """Read a COCO file, of which area and iscrowd may be missing."""
    try:
        content = msgspec.json.decode(read_data(path, limit=LARGEST_ANNOTATIONS))
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{path}: {error}") from error
    image_ids = {image["id"] for image in content.get("images", ())}
    if labels is None:
        numbers = sorted({category["id"] for category in content.get("categories", ())})
        labels = {number: label for label, number in enumerate(numbers)}
    if content.get("annotations") is None:
        return GroundTruth(sorted(image_ids), dict(labels), None)
    boxes = [
        _box(a["image_id"], labels[a["category_id"]], a["bbox"], a)
        for a in content["annotations"]
        if a["category_id"] in labels and a["image_id"] in image_ids
    ]
    return _of_boxes(image_ids, labels, boxes)


def _of_records(
    name: str,
    records: Sequence[Mapping[str, Any]],
    classes: Sequence[str] | None,
    labels: Mapping[int, int] | None,
) -> GroundTruth:
    """Read detectron2's records; a missing image id is replaced by the record's index."""
    image_ids = [record.get("image_id", i) for i, record in enumerate(records)]
    boxes = [
        _box(
            image_id,
            a["category_id"],
            BoxMode.convert(list(a["bbox"]), a["bbox_mode"], BoxMode.XYWH_ABS),
            a,
        )
        for image_id, record in zip(image_ids, records, strict=True)
        for a in record.get("annotations", ())
    ]
    if labels is None:
        highest = max((box.label for box in boxes), default=-1)
        labels = {k: k for k in range(1 + highest if classes is None else len(classes))}
    for label in {box.label for box in boxes}:
        if not ANY_CLASS <= label < len(labels):
            raise UserError(f'dataset "{name}": a box has class {label}, but there are {len(labels)} classes')
    if not any("annotations" in record for record in records):
        return GroundTruth(sorted(set(image_ids)), dict(labels), None)
    return _of_boxes(image_ids, labels, boxes)


def _box(image_id: Any, label: int, corners: Sequence[float], item: Mapping[str, Any]) -> _Box:
    area = item.get("area")
    area = corners[2] * corners[3] if area is None else area
    return _Box(image_id, label, corners, area, bool(item.get("iscrowd")))


def _of_boxes(image_ids: Collection[Any], labels: Mapping[int, int], boxes: Sequence[_Box]) -> GroundTruth:
    ids = sorted(set(image_ids))
    number_of = {image_id: i for i, image_id in enumerate(ids)}
    truth = Truth(
        images=len(ids),
        classes=len(labels),
        image=np.array([number_of[box.image_id] for box in boxes], dtype=np.int64),
        boxes=np.array([box.corners for box in boxes], dtype=np.float64).reshape(-1, 4),
        labels=np.array([box.label for box in boxes], dtype=np.int64),
        areas=np.array([box.area for box in boxes], dtype=np.float64),
        ignored=np.array([box.ignored for box in boxes], dtype=bool),
    )
    return GroundTruth(ids, dict(labels), _with_a_region_of_each_class(truth))


def _with_a_region_of_each_class(truth: Truth) -> Truth:
    """Repeat a region of any class as one of each class: COCO's evaluation goes class by class."""
    any_class = truth.labels == ANY_CLASS
    if not any_class.any():
        return truth
    rows = np.repeat(np.arange(len(any_class)), np.where(any_class, truth.classes, 1))
    labels = truth.labels[rows]
    labels[any_class[rows]] = np.tile(np.arange(truth.classes), int(any_class.sum()))
    columns = {name: getattr(truth, name)[rows] for name in ("image", "boxes", "areas", "ignored")}
    return truth._replace(labels=labels, **columns)
