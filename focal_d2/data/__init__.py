"""Datasets and what happens to an image before the model sees it."""

from __future__ import annotations

import importlib
from typing import Any

# Imported when they are first asked for: whoever trains with plain detectron2 needs no reader.
_MODULES = {
    "FocalDatasetMapper": "focal_d2.data.mapper",
    "Table": "focal_d2.annotations",
    "announce": "focal_d2.data.datasets",
    "check_annotations": "focal_d2.data.dataset_checks",
    "check_datasets": "focal_d2.data.dataset_checks",
    "check_files": "focal_d2.data.dataset_checks",
    "count_classes": "focal_d2.data.dataset_checks",
    "ground_truth": "focal_d2.data.datasets",
    "is_annotated": "focal_d2.data.datasets",
    "known_class_names": "focal_d2.data.datasets",
    "load_table": "focal_d2.data.datasets",
    "register_datasets": "focal_d2.data.entries",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
