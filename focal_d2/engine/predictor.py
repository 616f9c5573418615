"""From an image to detections."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model

from focal_d2.engine.checkpoint import FocalCheckpointer
from focal_d2.errors import UserError


class Detections(NamedTuple):
    """What was found in one image, best first."""

    boxes: np.ndarray  # (D, 4) float32, XYXY in the image's own pixels
    scores: np.ndarray  # (D,) float32 in (0, 1)
    classes: np.ndarray  # (D,) int64 in [0, K)


class Predictor:
    """A trained detector for single images.

    Example:
        cfg = focal_d2.engine.load_config("output/config.yaml", ["MODEL.WEIGHTS", "output/model_final.pth"])
        predictor = focal_d2.Predictor(cfg)
        for box, score, label in zip(*predictor("field.png")):
            print(predictor.class_names[label], score, box)
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build the model and load `MODEL.WEIGHTS`.

        Args:
            cfg: full config; see `focal_d2.engine.load_config`. The class names are those of the first
                of `DATASETS.TEST`, where it has any.

        Raises:
            UserError: if the weights are missing or do not fit.
        """
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: prediction needs a checkpoint")
        self.model = build_model(cfg).eval()
        FocalCheckpointer(self.model, partial=False).load(cfg.MODEL.WEIGHTS)
        self.input_format = cfg.INPUT.FORMAT
        self.resize = T.ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
        names = metadata.get("thing_classes") if metadata else None
        self.class_names = names or [str(k) for k in range(cfg.MODEL.RETINANET.NUM_CLASSES)]

    @torch.no_grad()
    def __call__(self, image: np.ndarray | str | Path) -> Detections:
        """Detect objects.

        Args:
            image: a file, or (H, W, 3) uint8 pixels in BGR order as OpenCV reads them.

        Raises:
            UserError: if the file cannot be read as an image.
        """
        pixels = image if isinstance(image, np.ndarray) else read_bgr(image)
        height, width = pixels.shape[:2]
        if self.input_format == "RGB":
            pixels = pixels[:, :, ::-1]
        pixels = self.resize.get_transform(pixels).apply_image(pixels)
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        instances = output["instances"].to("cpu")
        return Detections(
            instances.pred_boxes.tensor.numpy(),
            instances.scores.numpy(),
            instances.pred_classes.numpy(),
        )


def read_bgr(path: str | Path) -> np.ndarray:
    """Read an image as detectron2's loader does, EXIF orientation applied: (H, W, 3) uint8 BGR.

    Raises:
        UserError: naming the file, if it cannot be read.
    """
    try:
        return read_image(str(path), format="BGR")
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error}") from error


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    *,
    color: tuple[int, int, int],
    captions: list[str] | None = None,
) -> np.ndarray:
    """Return a copy of a BGR image with boxes (M, 4) XYXY drawn, and a caption above each if given."""
    canvas = np.ascontiguousarray(image).copy()
    thickness = max(1, round(min(image.shape[:2]) / 400))
    for i, box in enumerate(boxes):
        x0, y0, x1, y1 = (round(float(v)) for v in box)
        cv2.rectangle(canvas, (x0, y0), (x1, y1), color, thickness, cv2.LINE_AA)
        if captions:
            origin = (x0, max(y0 - 2, 8))
            cv2.putText(canvas, captions[i], origin, cv2.FONT_HERSHEY_SIMPLEX, 0.35, color, 1, cv2.LINE_AA)
    return canvas
