"""Datasets and what happens to an image before the model sees it."""

from focal_d2.annotations import Table
from focal_d2.data import embedded  # noqa: F401 - registers
from focal_d2.data.dataset_checks import check_annotations, check_datasets, check_files, count_classes
from focal_d2.data.datasets import (
    announce,
    ground_truth,
    is_annotated,
    known_class_names,
    load_table,
    register_datasets,
)
from focal_d2.data.mapper import FocalDatasetMapper

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
