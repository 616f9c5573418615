"""Tiny detectors with many detections, and pictures."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode

from tests.conftest import make_cfg
from tests.modeling.test_traced import make_detector, make_picture


def make_checkpoint(folder: Path, **overrides: object) -> CfgNode:
    """Write a detector's checkpoint; return its config."""
    torch.save({"model": make_detector(**overrides).state_dict()}, folder / "model.pth")
    return make_cfg(MODEL__WEIGHTS=str(folder / "model.pth"), OUTPUT_DIR=str(folder), **overrides)


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[Path]:
    """Write coloured clouds as PNG files."""
    folder.mkdir()
    paths = [folder / f"{i}.png" for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        cv2.imwrite(str(path), make_picture(*size).numpy().transpose(1, 2, 0).astype(np.uint8))
    return paths
