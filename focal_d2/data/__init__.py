"""Datasets and what happens to an image before the model sees it."""

from focal_d2.data import digits, neon_trees
from focal_d2.data.datasets import (
    check_datasets,
    ground_truth,
    known_class_names,
    register_coco_datasets,
)
from focal_d2.data.mapper import FocalDatasetMapper

digits.register()
neon_trees.register()

__all__ = [
    "FocalDatasetMapper",
    "check_datasets",
    "ground_truth",
    "known_class_names",
    "register_coco_datasets",
]
