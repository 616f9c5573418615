"""Checks of the datasets that a run names, before anything expensive starts: names, files, classes."""

from __future__ import annotations

import importlib.util
import os

import msgspec
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_d2.annotations import has_table
from focal_d2.config import key_value
from focal_d2.config.architectures import class_key, needs_beyond_boxes
from focal_d2.data.datasets import (
    READ_ERRORS,
    dataset_class_names,
    is_annotated,
    known_class_names,
    load_table,
    missing_annotations,
    unreadable,
)
from focal_d2.errors import UserError, did_you_mean, first_few
from focal_d2.storage.files import LARGEST_ANNOTATIONS, read_data


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Check the names, files and classes of the datasets that a run will use.

    Args:
        cfg: the full config.
        training: whether `DATASETS.TRAIN` and `DATASETS.VAL` are used, besides `DATASETS.TEST`.

    Raises:
        UserError: for a name that is not registered, a file that is missing or can't be read, or classes
            that do not fit the model's number of classes or each other; in training also for a dataset to
            validate or test on that has no box, and for an architecture that needs more than boxes, which the
            datasets of `DATASETS.FOCAL` do not have.
    """
    if training:
        check_has_training_data(cfg)
    first: tuple[str, list[str]] | None = None
    counted_by = class_key(cfg)
    num_classes = key_value(cfg, counted_by) if counted_by else None
    needed = needs_beyond_boxes(cfg) if training else None
    if not training:
        _check_order(cfg)
    for key in ("DATASETS.TRAIN", "DATASETS.VAL", "DATASETS.TEST") if training else ("DATASETS.TEST",):
        for name in key_value(cfg, key):
            what = f'{key}: dataset "{name}"'
            check_files(key, name)
            if needed and key == "DATASETS.TRAIN" and has_table(name):
                raise UserError(f"{what} has boxes only, but {needed}")
            if key != "DATASETS.TEST" and not is_annotated(name):
                raise UserError(f"{what} has no annotations: it can be in DATASETS.TEST only")
            if training and key != "DATASETS.TRAIN":
                _check_truth(key, name)
            classes = dataset_class_names(name)
            if first is not None and classes != first[1]:
                raise UserError(
                    f"{what} has the classes {first_few(classes)} ({len(classes)}), {first[0]} has "
                    f"{first_few(first[1])} ({len(first[1])}): give both the same CLASSES in DATASETS.FOCAL"
                )
            first = first or (what, classes)
            if num_classes not in (None, len(classes)):
                raise UserError(
                    f"{what} has {len(classes)} classes ({first_few(classes)}) but {counted_by} is "
                    f"{num_classes}: set it to {len(classes)}, or to auto"
                )


def datasets_of(cfg: CfgNode, *, training: bool) -> list[str]:
    """Return the names of the datasets that a job uses, each once; an evaluation uses the test sets."""
    sets = cfg.DATASETS
    return list(dict.fromkeys([*sets.TRAIN, *sets.VAL, *sets.TEST] if training else sets.TEST))


def held_out(cfg: CfgNode) -> list[str]:
    """Return the names of the datasets to validate and to test on, each once."""
    return list(dict.fromkeys([*cfg.DATASETS.VAL, *cfg.DATASETS.TEST]))


def check_has_training_data(cfg: CfgNode) -> None:
    """Check that `DATASETS.TRAIN` names a dataset.

    Raises:
        UserError: if it is empty.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on")


class _Annotation(msgspec.Struct):
    iscrowd: int | bool | None = None


class _Annotations(msgspec.Struct):
    # None: a file like that of COCO's test-dev, of which only predictions are written.
    annotations: list[_Annotation] | None = None


def _check_truth(key: str, name: str) -> None:
    """Refuse a dataset to validate or test on that is annotated but has no box: its metrics would be NaN."""
    metadata = MetadataCatalog.get(name)
    if has_table(name):
        has_boxes = not is_annotated(name) or bool(load_table(name).objects.any())
    elif metadata.get("json_file"):
        # As the evaluator reads it; detectron2's own reader would take longer.
        try:
            data = read_data(metadata.json_file, limit=LARGEST_ANNOTATIONS)
            annotations = msgspec.json.decode(data, type=_Annotations).annotations
        except (OSError, msgspec.MsgspecError) as error:
            raise unreadable(name, error) from error
        has_boxes = annotations is None or any(not a.iscrowd for a in annotations)
    else:
        try:
            records = DatasetCatalog.get(name)
            given = [record["annotations"] for record in records if "annotations" in record]
        except READ_ERRORS as error:
            raise unreadable(name, error) from error
        has_boxes = not given or any(not a.get("iscrowd", 0) for annotations in given for a in annotations)
    if not has_boxes:
        raise UserError(
            f'{key}: dataset "{name}" has no box to test on, so that AP would be nan: check its '
            f"annotations, or leave it out of {key}"
        )


def _check_order(cfg: CfgNode) -> None:
    """Refuse a test dataset with the classes of `DATASETS.TRAIN` in another order, if those can be read."""
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
                    f'DATASETS.TEST: dataset "{name}" has the classes {first_few(classes)}, DATASETS.TRAIN: '
                    f'dataset "{train}" has {first_few(expected)}: '
                    "give both the same CLASSES in DATASETS.FOCAL"
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
    annotations = missing_annotations(name)
    if annotations:
        hint = "; run `focal-d2 data neon_trees`" if name.startswith("neon_trees_") else ""
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
        names = load_table(name).whole().file_names
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
    for name in datasets_of(cfg, training=True):
        try:
            classes = known_class_names(name)
        except UserError:
            continue  # training reports it; evaluation and the doctor continue without the dataset
        if classes is not None:
            return len(classes)
    for key in ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            check_files(f"DATASETS.{key}", name)
    raise UserError(f"{key} is auto, but DATASETS.TRAIN and DATASETS.TEST are empty")
