"""The detector from pixels to boxes, as it is recorded, and the metadata that a file needs beside it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from focal_d2.errors import UserError
from focal_d2.modeling import FocalRetinaNet, traced

INPUT = "images"
OUTPUTS = ("boxes", "scores", "classes", "counts")
# Formats of INPUT.FORMAT that `run.py` makes from an image.
_FORMATS = ("BGR", "RGB", "L")


class Graph(nn.Module):
    """Images of one size -> detections."""

    def __init__(self, model: FocalRetinaNet) -> None:
        """Take a model in evaluation mode."""
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Detect objects in images (N, H, W, channels) uint8; see `detect_batch` for what is returned."""
        with torch.no_grad(), self.model.precision():
            return traced.detect_batch(self.model, images.permute(0, 3, 1, 2))


def example(channels: int) -> Tensor:
    """Return images to record with. Their number and size must not be 1, which would be a constant."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 192, 256, channels), dtype=torch.uint8, generator=generator)


def for_recording(cfg: CfgNode) -> CfgNode:
    """Return the config with which a model is recorded: in float32, on the CPU, a picture whole and once."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.AUG.ENABLED = cfg.TEST.FOCAL.TILES.ENABLED = False
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.FOCAL.AMP.ENABLED = cfg.SOLVER.AMP.ENABLED = cfg.MODEL.FOCAL.COMPILE = False
    return cfg


def check_exportable(cfg: CfgNode) -> None:
    """Check that a model of this config can be exported.

    Raises:
        UserError: for another architecture, or an input format that `run.py` does not make.
    """
    if cfg.MODEL.META_ARCHITECTURE != "FocalRetinaNet":
        raise UserError(
            f"MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}; focal-d2 export writes "
            "FocalRetinaNet only"
        )
    if cfg.INPUT.FORMAT not in _FORMATS:
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT}; focal-d2 export takes {', '.join(_FORMATS)}")


def describe(cfg: CfgNode, *, class_names: list[str], threshold: float, precision: str) -> dict[str, Any]:
    """Return the metadata of a file, key -> value.

    Args:
        cfg: of the model.
        class_names: K names.
        threshold: lowest score that `run.py` returns without `--threshold`.
        precision: "float32" or "int8".
    """
    return {
        "format": 1,
        "classes": class_names,
        "threshold": threshold,
        "image_format": cfg.INPUT.FORMAT,
        "min_size": cfg.INPUT.MIN_SIZE_TEST,
        "max_size": cfg.INPUT.MAX_SIZE_TEST,
        "resize": "opencv" if cfg.INPUT.FOCAL.BACKEND == "opencv" else "pillow",
        "least_score": cfg.MODEL.RETINANET.SCORE_THRESH_TEST,
        "most_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "precision": precision,
    }


@contextmanager
def recording() -> Iterator[None]:
    """Hide PyTorch's warnings about recording inside this block; `check` compares what was recorded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield
