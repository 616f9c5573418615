"""Shared pieces: small models, small datasets, a seed before every test."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import EpsImagePlugin

import focal_d2
from focal_d2.modeling.precision import bfloat16_support
from tests import tiny  # noqa: F401 - registers a backbone

REPOSITORY = Path(__file__).parent.parent

# For tests that run a network in bfloat16: with layers of multiples of 32 channels, on images wider than 64
# pixels (narrower ones are computed in float32). Tests that only store numbers in bfloat16 need no mark.
_SUPPORT = bfloat16_support()
runs_bfloat16 = pytest.mark.skipif(
    not _SUPPORT.trusted, reason=f"bfloat16 is not trusted here: this CPU {_SUPPORT.reason}"
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - detectron2's augmentations draw from the global generator


def make_cfg(**overrides: object) -> CfgNode:
    """A RetinaNet with a tiny backbone; keyword arguments are keys, their dots written as two underscores."""
    cfg = get_cfg()
    focal_d2.add_focal_config(cfg)
    cfg.merge_from_file(str(REPOSITORY / "configs/Base-FocalRetinaNet.yaml"))
    settings = {
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.NAME": "TinyPyramid",
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.RETINANET.NUM_CONVS": 1,
        "MODEL.RETINANET.NUM_CLASSES": 3,
        "SOLVER.IMS_PER_BATCH": 2,
        "INPUT.MIN_SIZE_TRAIN": (0,),
        "INPUT.MIN_SIZE_TEST": 0,
        "DATALOADER.NUM_WORKERS": 0,
        "SEED": 1,
    }
    settings.update({key.replace("__", "."): value for key, value in overrides.items()})
    cfg.merge_from_list([x for pair in settings.items() for x in pair])
    return cfg


def make_resnet_cfg(**overrides: object) -> CfgNode:
    """The same with a ResNet-18 and its FPN, which are, thanks to group norm, sane with random weights."""
    resnet = {
        "MODEL__BACKBONE__NAME": "build_focal_resnet_fpn_backbone",
        "MODEL__RESNETS__DEPTH": 18,
        "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
        "MODEL__RESNETS__NORM": "GN",
    }
    return make_cfg(**{**resnet, **overrides})


class CocoDataset:
    """Grey images with one bright square a class, in COCO format on disk."""

    def __init__(self, folder: Path, *, images: int = 4, size: int = 64, classes: int = 3) -> None:
        self.name = f"squares_{folder.name}"
        self.images = folder / "images"
        self.annotations = folder / "annotations.json"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        records, boxes = [], []
        for i in range(images):
            pixels = rng.integers(90, 110, (size, size, 3), dtype=np.uint8)
            for k in range(classes):
                x, y = rng.integers(0, size - 24, 2).tolist()
                pixels[y : y + 24, x : x + 24, k % 3] = 255
                boxes.append(
                    {
                        "id": len(boxes) + 1,
                        "image_id": i,
                        "category_id": k + 1,
                        "bbox": [x, y, 24, 24],
                        "area": 576,
                        "iscrowd": 0,
                    }
                )
            cv2.imwrite(str(self.images / f"{i}.png"), pixels)
            records.append({"id": i, "file_name": f"{i}.png", "width": size, "height": size})
        categories = [{"id": k + 1, "name": f"class{k}"} for k in range(classes)]
        self.annotations.write_text(
            json.dumps({"images": records, "annotations": boxes, "categories": categories})
        )

    @property
    def entry(self) -> dict[str, str]:
        """As in `DATASETS.FOCAL`."""
        return {
            "NAME": self.name,
            "ANNOTATIONS": str(self.annotations),
            "IMAGES": str(self.images),
        }


@pytest.fixture
def coco_dataset(tmp_path: Path) -> Callable[..., CocoDataset]:
    """Make datasets in this test's folder; what it registers is forgotten afterwards."""
    return lambda name="train", **kwargs: CocoDataset(tmp_path / name, **kwargs)


@pytest.fixture(autouse=True)
def _forget_datasets() -> object:
    before = {*DatasetCatalog.list(), *MetadataCatalog.list()}
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in set(catalog.list()) - before:
            catalog.remove(name)


@pytest.fixture
def job(coco_dataset: Callable[..., CocoDataset], tmp_path: Path) -> tuple[Path, CocoDataset]:
    """Write a config for a tiny job; returns the config file and the dataset."""
    data = coco_dataset(images=6)
    config = {
        "_BASE_": str(REPOSITORY / "configs/Base-FocalRetinaNet.yaml"),
        "SEED": 1,
        "OUTPUT_DIR": str(tmp_path / "out"),
        "MODEL": {
            "DEVICE": "cpu",
            "BACKBONE": {"NAME": "TinyPyramid", "FREEZE_AT": 0},
            "FPN": {"OUT_CHANNELS": 64, "NORM": "BN"},
            "RETINANET": {
                "NUM_CLASSES": 3,
                "NUM_CONVS": 1,
                "NORM": "GN",
                "SCORE_THRESH_TEST": 0.001,
            },
        },
        "DATASETS": {"FOCAL": [data.entry], "TRAIN": [data.name], "TEST": [data.name]},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {
            "IMS_PER_BATCH": 2,
            "MAX_ITER": 8,
            "CHECKPOINT_PERIOD": 4,
            "WARMUP_ITERS": 2,
            "BASE_LR": 0.001,
            "FOCAL": {"OPTIMIZER": "AdamW"},
        },
        "INPUT": {"MIN_SIZE_TRAIN": [0], "MIN_SIZE_TEST": 0},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path, data


@pytest.fixture
def job_file(job: tuple[Path, CocoDataset]) -> Path:
    """The config file of a tiny job."""
    return job[0]


@pytest.fixture
def programs(tmp_path, monkeypatch) -> Path:
    """A file that names the programs that were started, of those that image libraries know."""
    folder, log = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    for name in ("gs", "djpeg", "cjpeg", "ppmtogif", "convert", "magick", "dwebp", "heif-dec"):
        (folder / name).write_text(f"#!/bin/sh\necho {name} >> {log}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # it is looked for once
    return log
