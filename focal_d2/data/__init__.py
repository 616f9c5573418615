"""Datasets and what happens to an image before the model sees it."""

from focal_d2.data import digits, neon_trees
from focal_d2.data.datasets import (
    announce,
    check_annotations,
    check_datasets,
    check_files,
    count_classes,
    ground_truth,
    is_annotated,
    known_class_names,
    load_table,
    register_datasets,
)
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.data.table import Table

digits.register()
neon_trees.register()

__all__ = [
    "FocalDatasetMapper",
    "Table",
    "announce",
    "check_annotations",
    "check_datasets",
    "check_files",
    "count_classes",
    "ground_truth",
    "is_annotated",
    "known_class_names",
    "load_table",
    "register_datasets",
]
