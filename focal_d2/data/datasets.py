"""Datasets by name: registering them, their tables of annotations, and their class names."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from focal_d2.annotations import Table, has_table, registered_table
from focal_d2.errors import UserError, describe_error

logger = logging.getLogger(__name__)


def register_table(name: str, read: Callable[[], Table], **metadata: Any) -> None:
    """Register a dataset with detectron2.

    Args:
        name: in detectron2's catalogs.
        read: returns its table; called whenever the dataset is asked for.
        **metadata: what else detectron2's catalog shall hold.
    """
    announce = functools.cache(functools.partial(_announce, name))

    def records() -> list[dict[str, Any]]:
        table = load_table(name).whole()
        announce()
        return table.records()

    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(read_table=read, announce=announce, evaluator_type="coco", **metadata)


def announce(name: str) -> None:
    """Log the notes and warnings of reading a dataset, once. Datasets without a table have none.

    The first call for the dataset's records logs them, too.

    Args:
        name: a registered dataset's.
    """
    log = MetadataCatalog.get(name).get("announce")
    if log is not None:
        log()


def _announce(name: str) -> None:
    table = load_table(name)
    for note in table.notes:
        logger.info(note)
    for warning in table.warnings:
        logger.warning(warning)
    for fault, mask in (
        ("have no area", ~table.has_area),
        ("are outside their image", table.has_area & ~table.usable),
    ):
        dropped = np.flatnonzero(mask)
        if dropped.size:
            first = f"{table.file_names[table.image[dropped[0]]]}: {table.boxes[dropped[0]].tolist()}"
            logger.warning(
                f'dataset "{name}": {dropped.size} of {table.labels.size} boxes {fault} and are left out of '
                f"training and evaluation; the first (left, top, width, height): {first}"
            )


def load_table(name: str) -> Table:
    """Return the annotations of any registered dataset, items that can't be read in `problems`.

    Raises:
        UserError: if the files can't be read at all.
    """
    table = registered_table(name)
    if table is not None:
        return table
    try:
        records = DatasetCatalog.get(name)
        return Table.from_records(records, _named_classes(name, records))
    except READ_ERRORS as error:
        raise unreadable(name, error) from error


def load_known_tables(names: Iterable[str]) -> dict[str, Table]:
    """Return the tables of those datasets that have one, by name; others would be read as records."""
    return {name: load_table(name) for name in names if has_table(name)}


# What detectron2's readers, and a program's own, raise for files that they can't read.
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, AssertionError, AttributeError)


def unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error  # it names what is wrong already
    source = MetadataCatalog.get(name).get("json_file")
    return UserError(
        f'dataset "{name}"{f" ({source})" if source else ""} cannot be read: {describe_error(error)}'
    )


def is_annotated(name: str) -> bool:
    """Return whether a dataset of `DATASETS.FOCAL` has annotations; True for other datasets, unchecked."""
    return not MetadataCatalog.get(name).get("from_focal_yaml", False) or load_table(name).annotated


def known_class_names(name: str) -> list[str] | None:
    """Return a dataset's class names, or None if it is not registered or its annotations are not here."""
    if name not in DatasetCatalog or missing_annotations(name):
        return None
    return dataset_class_names(name)


def missing_annotations(name: str) -> str | None:
    metadata = MetadataCatalog.get(name)
    annotations = metadata.get("source") or metadata.get("json_file")
    if annotations and "://" not in annotations and not PathManager.exists(annotations):
        return annotations
    return None


def dataset_class_names(name: str) -> list[str]:
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is not None:
        return list(metadata.thing_classes)
    # Many files tell their classes only when they are read. Reading now costs seconds; finding out after
    # training costs the night.
    if has_table(name):
        return list(load_table(name).classes)
    try:
        return _named_classes(name, DatasetCatalog.get(name))
    except READ_ERRORS as error:
        raise unreadable(name, error) from error


def _named_classes(name: str, records: list[dict[str, Any]]) -> list[str]:
    """Return the class names of a dataset; numbers as texts if it has no names."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is None:
        ids = (a["category_id"] for record in records for a in record.get("annotations", ()))
        return [str(k) for k in range(1 + max(ids, default=-1))]
    return list(classes)


def ground_truth(name: str) -> dict[Path, np.ndarray]:
    """Return the boxes of each image file of a registered dataset, (M, 4) float64, XYXY absolute pixels.

    Ignored regions are not among them, nor are boxes without area of a dataset that has a table.
    """
    table = registered_table(name)
    if table is not None:
        corners = table.boxes[table.whole().objects]
        corners[:, 2:] += corners[:, :2]
        ends = np.searchsorted(table.image[table.objects], np.arange(1, len(table)))
        return dict(zip(map(Path, table.file_names), np.split(corners, ends), strict=True))
    return {
        Path(record["file_name"]): np.array(
            [
                BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
                for a in record["annotations"]
                if not a.get("iscrowd", 0)
            ]
        ).reshape(-1, 4)
        for record in DatasetCatalog.get(name)
    }
