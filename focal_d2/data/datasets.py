"""Datasets named in YAML: registering them, and checking them before anything expensive starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from focal_d2.data.coco import load_coco
from focal_d2.errors import UserError

_ENTRY_KEYS = {"NAME", "ANNOTATIONS", "IMAGES"}


def register_coco_datasets(entries: list[dict[str, str]]) -> None:
    """Register the datasets of `DATASETS.FOCAL`; a name given again replaces the earlier one.

    Args:
        entries: each {NAME, ANNOTATIONS: COCO json file, IMAGES: folder of the images}.

    Raises:
        UserError: for a missing or unknown key, or a name that detectron2 already has.
    """
    for i, entry in enumerate(entries):
        fits = isinstance(entry, dict) and set(entry) == _ENTRY_KEYS
        if not fits or not all(isinstance(value, str) for value in entry.values()):
            raise UserError(
                f"DATASETS.FOCAL[{i}] is {entry!r}; it needs {', '.join(sorted(_ENTRY_KEYS))}, each a text"
            )
        name, annotations, images = entry["NAME"], entry["ANNOTATIONS"], entry["IMAGES"]
        if name in DatasetCatalog:
            if not MetadataCatalog.get(name).get("from_focal_yaml", False):
                raise UserError(f'DATASETS.FOCAL[{i}].NAME "{name}" is the name of another dataset')
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        DatasetCatalog.register(name, lambda n=name, a=annotations, r=images: load_coco(a, r, n))
        MetadataCatalog.get(name).set(
            json_file=annotations, image_root=images, evaluator_type="coco", from_focal_yaml=True
        )


def check_datasets(cfg: CfgNode, *, training: bool) -> None:
    """Check the names, files and class counts of the datasets that a run will use.

    Args:
        cfg: the full config.
        training: whether `DATASETS.TRAIN` is used, besides `DATASETS.TEST`.

    Raises:
        UserError: for a name that is not registered, an annotation file that is missing, or classes
            that do not fit `MODEL.RETINANET.NUM_CLASSES`.
    """
    if training and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on")
    for key in ("DATASETS.TRAIN", "DATASETS.TEST") if training else ("DATASETS.TEST",):
        for name in cfg.DATASETS[key.split(".")[1]]:
            check_dataset(key, name, cfg.MODEL.RETINANET.NUM_CLASSES)


def check_dataset(key: str, name: str, num_classes: int) -> None:
    """Check one dataset; see `check_datasets`. `key` is the config key that names it."""
    if name not in DatasetCatalog:
        known = ", ".join(sorted(DatasetCatalog.list()))
        raise UserError(f'{key}: dataset "{name}" is not registered; registered: {known}')
    annotations = _missing_annotations(name)
    if annotations:
        hint = "; run `make data`" if name.startswith("neon_trees_") else ""
        raise UserError(f'{key}: dataset "{name}": annotation file not found: {annotations}{hint}')
    classes = _class_names(name)
    if len(classes) != num_classes:
        names = ", ".join(classes[:5]) + (", …" if len(classes) > 5 else "")
        raise UserError(
            f'{key}: dataset "{name}" has {len(classes)} classes ({names}) but '
            f"MODEL.RETINANET.NUM_CLASSES is {num_classes}: set MODEL.RETINANET.NUM_CLASSES {len(classes)}"
        )


def known_class_names(name: str) -> list[str] | None:
    """Return a dataset's class names, or None if it is not registered or its annotations are not here."""
    if name not in DatasetCatalog or _missing_annotations(name):
        return None
    return _class_names(name)


def _missing_annotations(name: str) -> str | None:
    annotations = MetadataCatalog.get(name).get("json_file")
    if annotations and "://" not in annotations and not PathManager.isfile(annotations):
        return annotations
    return None


def _class_names(name: str) -> list[str]:
    """Class names, or numbers where nobody named them."""
    metadata = MetadataCatalog.get(name)
    if metadata.get("thing_classes") is None:
        # COCO files tell their classes only when they are read. Reading now costs seconds; finding out
        # after training costs the night.
        records = DatasetCatalog.get(name)
        if metadata.get("thing_classes") is None:
            ids = (a["category_id"] for record in records for a in record.get("annotations", ()))
            return [str(k) for k in range(1 + max(ids, default=-1))]
    return list(metadata.thing_classes)


def ground_truth(name: str) -> dict[Path, np.ndarray]:
    """Return the boxes of each image file of a registered dataset, (M, 4) float64, XYXY absolute pixels."""
    return {
        Path(record["file_name"]): np.array(
            [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in record["annotations"]]
        ).reshape(-1, 4)
        for record in DatasetCatalog.get(name)
    }
