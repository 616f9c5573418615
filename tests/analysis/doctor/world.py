"""A good dataset to train on and one to test on, small enough to break in many ways."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from torch import nn

from focal_d2.analysis.doctor import Report, examine
from focal_d2.modeling.build import build_without_memory
from tests.conftest import make_cfg

HEIGHT, WIDTH = 96, 128


class World:
    """12 images to train on and 6 to test on, of noise, with one box of each of three classes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rng = np.random.default_rng(0)
        self.classes = {"train": ["cat", "dog", "owl"], "test": ["cat", "dog", "owl"]}
        self.records: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
        self.settings: dict[str, Any] = {"SOLVER__BASE_LR": 0.00125}  # 0.01 · 2 / 16 images
        for name, images in (("train", 12), ("test", 6)):
            for _ in range(images):
                record = self.add_image(name)
                for label in range(3):
                    self.add_box(record, [3 + 41 * label, 20, 38, 40], label)

    def add_image(self, name: str, like: dict[str, Any] | None = None) -> dict[str, Any]:
        records = self.records.setdefault(name, [])
        path = self.folder / f"{name}_{len(records)}.png"
        pixels = self.rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        (Image.open(like["file_name"]) if like else Image.fromarray(pixels)).save(path, compress_level=1)
        record = {"file_name": str(path), "height": HEIGHT, "width": WIDTH, "image_id": len(records)}
        records.append({**record, "annotations": []})
        return records[-1]

    def add_box(self, record: dict[str, Any], box: list[float], label: int = 0, crowd: int = 0) -> None:
        record["annotations"].append(
            {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": label, "iscrowd": crowd}
        )

    def add_class(self, name: str) -> int:
        for classes in self.classes.values():
            classes.append(name)
        return len(self.classes["train"]) - 1

    def add_dataset(self, name: str) -> list[dict[str, Any]]:
        """Another one to train on, as good as the first."""
        self.classes[name] = self.classes["train"]
        for _ in range(12):
            record = self.add_image(name)
            for label in range(3):
                self.add_box(record, [3 + 41 * label, 20, 38, 40], label)
        return self.records[name]

    def config(self) -> CfgNode:
        for name, records in self.records.items():
            DatasetCatalog.register(name, lambda records=records: records)
            MetadataCatalog.get(name).thing_classes = self.classes[name]
        settings = {
            "DATASETS__TRAIN": tuple(name for name in self.records if name != "test"),
            "DATASETS__TEST": ("test",),
            "MODEL__RETINANET__NUM_CLASSES": len(self.classes["train"]),
            **self.settings,
        }
        return make_cfg(**settings)

    def examine(self, *, decode: bool = True) -> Report:
        return examine(self.config(), self.model(), decode=decode)

    @staticmethod
    @cache
    def model() -> nn.Module:
        return build_without_memory(make_cfg())
