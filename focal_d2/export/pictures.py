"""The pictures on which files are checked and calibrated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from focal_d2.data.dataset_checks import check_files
from focal_d2.data.datasets import is_annotated
from focal_d2.errors import UserError
from focal_d2.inference.inputs import find_inputs


def choose_pictures(cfg: CfgNode, number: int, source: Path | None) -> list[Path]:
    """Return at most `number` pictures to compare on, evenly spread over where they come from.

    Args:
        cfg: full config.
        number: at least 1.
        source: an image or a folder of images; None: `DATASETS.VAL`, or `DATASETS.TRAIN` without it.

    Raises:
        UserError: if there are none.
    """
    if source is not None:
        return _spread([Path(file) for file in find_inputs([str(source)]).files], number)
    for key in ("VAL", "TRAIN"):
        if cfg.DATASETS[key]:
            return _of_datasets(cfg, key, number)
    raise UserError("DATASETS.VAL and DATASETS.TRAIN are empty: give pictures to compare on with --images")


def training_pictures(cfg: CfgNode, number: int) -> list[Path]:
    """Return at most `number` pictures of `DATASETS.TRAIN`, evenly spread over it.

    Raises:
        UserError: if there are none.
    """
    if not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: int8 is calibrated on training images")
    return _of_datasets(cfg, "TRAIN", number)


def check_validation_sets(cfg: CfgNode) -> None:
    """Check that AP can be measured on `DATASETS.VAL`.

    Raises:
        UserError: if it is empty, or a dataset is missing or has no annotations.
    """
    if not cfg.DATASETS.VAL:
        raise UserError("DATASETS.VAL is empty: the loss in AP of int8 is measured there")
    for name in cfg.DATASETS.VAL:
        check_files("DATASETS.VAL", name)
        if not is_annotated(name):
            raise UserError(f'DATASETS.VAL: dataset "{name}" has no annotations to measure AP with')


def _of_datasets(cfg: CfgNode, key: str, number: int) -> list[Path]:
    paths = []
    for name in cfg.DATASETS[key]:
        check_files(f"DATASETS.{key}", name)
        paths += [Path(record["file_name"]) for record in DatasetCatalog.get(name)]
    if not paths:
        raise UserError(f"DATASETS.{key} has no image")
    return _spread(paths, number)


def _spread(paths: list[Path], number: int) -> list[Path]:
    chosen = np.linspace(0, len(paths) - 1, min(number, len(paths)))
    return [paths[round(x)] for x in chosen]
