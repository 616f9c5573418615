"""Datasets named in YAML: registering them, and checking them before anything expensive starts."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from focal_d2.annotations import Table
from focal_d2.config import key_value
from focal_d2.config.architectures import class_key, needs_beyond_boxes
from focal_d2.data.entries import check_entry, expand_paths, images_of, read_entry
from focal_d2.data.readers.common import listed
from focal_d2.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


def register_datasets(entries: list[dict[str, Any]]) -> None:
    """Register the datasets of `DATASETS.FOCAL`; a name given again replaces the earlier one.

    The files are read when a dataset is first asked for, and once.

    Args:
        entries: each a mapping with the keys that docs/data.md lists.

    Raises:
        UserError: for a missing or unknown key, a value of the wrong type, or a name that detectron2 already
            has.
    """
    for i, entry in enumerate(entries):
        place = f"DATASETS.FOCAL[{i}]"
        check_entry(place, entry)
        entry = expand_paths(entry)
        name = entry["NAME"]
        if any(name == earlier["NAME"] for earlier in entries[:i]):
            raise UserError(f'{place}.NAME "{name}" stands in an earlier entry, too')
        if name in DatasetCatalog:
            if not MetadataCatalog.get(name).get("from_focal_yaml", False):
                raise UserError(f'{place}.NAME "{name}" is the name of another dataset')
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        read = functools.partial(read_entry, dict(entry))
        register_table(
            name,
            functools.cache(read),
            from_focal_yaml=True,
            source=entry["ANNOTATIONS"],
            images=images_of(entry),
        )


def register_table(name: str, read: Callable[[], Table], **metadata: Any) -> None:
    """Register a dataset with detectron2.

    Args:
        name: in detectron2's catalogs.
        read: returns its table; called whenever the dataset is asked for.
        **metadata: what else detectron2's catalog shall hold.
    """
    announce = functools.cache(functools.partial(_announce, name))

    def records() -> list[dict[str, Any]]:
        table = _whole_table(name)
        announce()
        return table.records()

    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).set(read_table=read, announce=announce, evaluator_type="coco", **metadata)


def announce(name: str) -> None:
    """Log what reading a dataset made of its annotations; once, and only of datasets with a table.

    It is logged when the dataset's records are first asked for, too.

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
    metadata = MetadataCatalog.get(name)
    read = metadata.get("read_table")
    if read is None:
        try:
            records = DatasetCatalog.get(name)
            return Table.from_records(records, _named_classes(name, records))
        except _BROKEN as error:
            raise _unreadable(name, error) from error
    table = read()
    metadata.set(
        thing_classes=list(table.classes),
        thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(table.category_ids)},
    )
    return table


def load_known_tables(names: Iterable[str]) -> dict[str, Table]:
    """Return the tables of those datasets that have one, by name; others would be read as records."""
    return {name: load_table(name) for name in names if MetadataCatalog.get(name).get("read_table")}


# What detectron2's readers, and a program's own, raise for files that they can't read.
_BROKEN = (OSError, ValueError, KeyError, TypeError, AssertionError, AttributeError)


def _unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error  # it names what is wrong already
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if len(reason) > 200:  # detectron2's quotes all class names
        reason = f"{reason[:200]} …"
    source = MetadataCatalog.get(name).get("json_file")
    return UserError(f'dataset "{name}"{f" ({source})" if source else ""} cannot be read: {reason}')


def _whole_table(name: str) -> Table:
    """Return the annotations of a dataset of which every item can be read."""
    table = load_table(name)
    if table.problems:
        more = f" (and {len(table.problems) - 1} more)"
        raise UserError(table.problems[0] + (more if len(table.problems) > 1 else ""))
    return table


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Check the names, files and classes of the datasets that a run will use.

    Args:
        cfg: the full config.
        training: whether `DATASETS.TRAIN` is used, besides `DATASETS.TEST`.

    Raises:
        UserError: for a name that is not registered, a file that is missing or can't be read, or classes
            that do not fit the model's number of classes or each other; in training also for a dataset to
            test on that has no box, and for an architecture that needs more than boxes, which the datasets
            of `DATASETS.FOCAL` do not have.
    """
    if training and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on")
    first: tuple[str, list[str]] | None = None
    counted_by = class_key(cfg)
    num_classes = key_value(cfg, counted_by) if counted_by else None
    needed = needs_beyond_boxes(cfg) if training else None
    if not training:
        _check_order(cfg)
    for key, names in (("DATASETS.TRAIN", cfg.DATASETS.TRAIN), ("DATASETS.TEST", cfg.DATASETS.TEST)):
        for name in names if training or key == "DATASETS.TEST" else ():
            what = f'{key}: dataset "{name}"'
            check_files(key, name)
            if needed and key == "DATASETS.TRAIN" and MetadataCatalog.get(name).get("read_table"):
                raise UserError(f"{what} has boxes only, but {needed}")
            if key == "DATASETS.TRAIN" and not is_annotated(name):
                raise UserError(f"{what} has no annotations: it can be in DATASETS.TEST only")
            if training and key == "DATASETS.TEST":
                _check_truth(name)
            classes = _class_names(name)
            if first is not None and classes != first[1]:
                raise UserError(
                    f"{what} has the classes {listed(classes)} ({len(classes)}), {first[0]} has "
                    f"{listed(first[1])} ({len(first[1])}): give both the same CLASSES in DATASETS.FOCAL"
                )
            first = first or (what, classes)
            if num_classes not in (None, len(classes)):
                raise UserError(
                    f"{what} has {len(classes)} classes ({listed(classes)}) but {counted_by} is "
                    f"{num_classes}: set it to {len(classes)}, or to auto"
                )


def is_annotated(name: str) -> bool:
    """Tell whether a dataset of `DATASETS.FOCAL` has annotations; of others, that is not looked at: True."""
    return not MetadataCatalog.get(name).get("from_focal_yaml", False) or load_table(name).annotated


class _Annotation(msgspec.Struct):
    iscrowd: int | bool | None = None


class _Annotations(msgspec.Struct):
    # None: a file like that of COCO's test-dev, of which only predictions are written.
    annotations: list[_Annotation] | None = None


def _check_truth(name: str) -> None:
    """Refuse a dataset to test on that has annotations, but no box: all of its metrics would be NaN."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("read_table"):
        has_boxes = not is_annotated(name) or bool(load_table(name).objects.any())
    elif metadata.get("json_file"):
        # As the evaluator reads it; detectron2's own reader would take longer.
        try:
            with PathManager.open(metadata.json_file, "rb") as file:
                annotations = msgspec.json.decode(file.read(), type=_Annotations).annotations
        except (OSError, msgspec.MsgspecError) as error:
            raise _unreadable(name, error) from error
        has_boxes = annotations is None or any(not a.iscrowd for a in annotations)
    else:
        try:
            records = DatasetCatalog.get(name)
            given = [record["annotations"] for record in records if "annotations" in record]
        except _BROKEN as error:
            raise _unreadable(name, error) from error
        has_boxes = not given or any(not a.get("iscrowd", 0) for annotations in given for a in annotations)
    if not has_boxes:
        raise UserError(
            f'DATASETS.TEST: dataset "{name}" has no box to test on, so that AP would be nan: check its '
            "annotations, or leave it out of DATASETS.TEST"
        )


def _check_order(cfg: CfgNode) -> None:
    """Refuse to evaluate on the classes of `DATASETS.TRAIN`, where that is here, in another order."""
    for train in cfg.DATASETS.TRAIN:
        if train not in DatasetCatalog or not MetadataCatalog.get(train).get("from_focal_yaml", False):
            continue
        try:
            expected = known_class_names(train) or []
        except UserError:
            continue  # evaluation needs none of it
        for name in cfg.DATASETS.TEST:
            classes = known_class_names(name) or expected
            if classes != expected and sorted(classes) == sorted(expected):
                raise UserError(
                    f'DATASETS.TEST: dataset "{name}" has the classes {listed(classes)}, DATASETS.TRAIN: '
                    f'dataset "{train}" has {listed(expected)}: give both the same CLASSES in DATASETS.FOCAL'
                )


def check_annotations(key: str, name: str) -> None:
    """Check that a dataset is registered and its annotation file or folder is there.

    Args:
        key: the config key that names it.
        name: the dataset's.

    Raises:
        UserError: if not.
    """
    if name not in DatasetCatalog:
        known = sorted(DatasetCatalog.list())
        near = did_you_mean(name, known) or f"; registered: {', '.join(known)}"
        raise UserError(f'{key}: dataset "{name}" is not registered{near}')
    is_lvis = MetadataCatalog.get(name).get("evaluator_type") == "lvis"
    if is_lvis and importlib.util.find_spec("lvis") is None:
        raise UserError(f'{key}: detectron2 reads dataset "{name}" with the package lvis: pip install lvis')
    annotations = _missing_annotations(name)
    if annotations:
        hint = "; run `make data`" if name.startswith("neon_trees_") else ""
        raise UserError(f'{key}: dataset "{name}": annotation file not found: {annotations}{hint}')


def check_files(key: str, name: str) -> None:
    """Check that a dataset is registered and its files are there and can be read; see `check_annotations`.

    Raises:
        UserError: if not.
    """
    check_annotations(key, name)
    if MetadataCatalog.get(name).get("from_focal_yaml", False):
        # A look at every name takes a second for a hundred thousand; a missing image would stop the run at
        # whatever hour it is drawn.
        names = _whole_table(name).file_names
        missing = [file_name for file_name in names if not os.path.isfile(file_name)]
        if missing:
            of_how_many = f"{len(missing)} of {len(names)} images are"
            hint = MetadataCatalog.get(name).images.hint(missing[0])
            raise UserError(
                f'{key}: dataset "{name}": {of_how_many} missing; the first is {missing[0]}{hint}'
            )


def count_classes(cfg: CfgNode, key: str) -> int:
    """Return the number of classes of the run's first dataset whose annotations are here.

    Args:
        cfg: full config.
        key: that the number is for.

    Raises:
        UserError: if there is none.
    """
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        try:
            classes = known_class_names(name)
        except UserError:
            continue  # who trains on it is told so; evaluation and the doctor go on without
        if classes is not None:
            return len(classes)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            check_files(f"DATASETS.{key}", name)
    raise UserError(f"{key} is auto, but DATASETS.TRAIN and DATASETS.TEST are empty")


def known_class_names(name: str) -> list[str] | None:
    """Return a dataset's class names, or None if it is not registered or its annotations are not here."""
    if name not in DatasetCatalog or _missing_annotations(name):
        return None
    return _class_names(name)


def _missing_annotations(name: str) -> str | None:
    metadata = MetadataCatalog.get(name)
    annotations = metadata.get("source") or metadata.get("json_file")
    if annotations and "://" not in annotations and not PathManager.exists(annotations):
        return annotations
    return None


def _class_names(name: str) -> list[str]:
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is not None:
        return list(metadata.thing_classes)
    # Many files tell their classes only when they are read. Reading now costs seconds; finding out after
    # training costs the night.
    if metadata.get("read_table"):
        return list(load_table(name).classes)
    try:
        return _named_classes(name, DatasetCatalog.get(name))
    except _BROKEN as error:
        raise _unreadable(name, error) from error


def _named_classes(name: str, records: list[dict[str, Any]]) -> list[str]:
    """Class names, or numbers where nobody named them."""
    classes = MetadataCatalog.get(name).get("thing_classes")
    if classes is None:
        ids = (a["category_id"] for record in records for a in record.get("annotations", ()))
        return [str(k) for k in range(1 + max(ids, default=-1))]
    return list(classes)


def ground_truth(name: str) -> dict[Path, np.ndarray]:
    """Return the boxes of each image file of a registered dataset, (M, 4) float64, XYXY absolute pixels.

    Ignored regions are not among them.
    """
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
