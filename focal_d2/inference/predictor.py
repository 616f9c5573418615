"""Detect objects in single images with a trained model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from focal_d2.config import key_value
from focal_d2.config.architectures import CLASS_KEYS, class_key
from focal_d2.data.augmentations import Resize
from focal_d2.data.datasets import known_class_names
from focal_d2.data.mapper import build_reader
from focal_d2.data.pictures import read_image
from focal_d2.data.pixels import from_array
from focal_d2.errors import UserError
from focal_d2.evaluation.operating_point import saved_point
from focal_d2.modeling.build import building, resolve_device
from focal_d2.storage.checkpoint import FocalCheckpointer

logger = logging.getLogger(__name__)


class Detections(NamedTuple):
    """The detections of one image, best first."""

    boxes: np.ndarray  # (D, 4) float32, XYXY in pixels of the image
    scores: np.ndarray  # (D,) float32 in (0, 1)
    classes: np.ndarray  # (D,) int64 in [0, K)


class Predictor:
    """A trained detector for single images.

    Example:
        cfg = focal_d2.engine.load_config("output/config.yaml", ["MODEL.WEIGHTS", "output/model_final.pth"])
        predictor = focal_d2.Predictor(cfg)
        for box, score, label in zip(*predictor("field.png")):
            print(predictor.class_names[label], score, box)

    Attributes:
        threshold: the lowest score of the detections that are returned; the model itself returns none below
            `SCORE_THRESH_TEST`.
        operating_point: of the checkpoint; None if it has none.
        class_names: K names.
    """

    def __init__(
        self,
        cfg: CfgNode,
        *,
        threshold: float | None = None,
        trust_files: bool = False,
        allow_download: bool = False,
    ) -> None:
        """Build the model and load `MODEL.WEIGHTS`.

        Args:
            cfg: full config; see `focal_d2.engine.load_config`. The class names are those of the first
                dataset of `DATASETS.TEST`, or numbers if it is missing or has another number of classes.
            threshold: see the attributes; None: that of the checkpoint's operating point, or 0 if there is
                none. A line of the log says which.
            trust_files: let the checkpoint import and run code.
            allow_download: let `MODEL.WEIGHTS` be an address outside detectron2's stores.

        Raises:
            UserError: if the weights are missing or do not fit, the machine does not have the device, or
                detectron2 refuses the config.
        """
        self.reader = build_reader(cfg)
        cfg = cfg.clone()
        cfg.defrost()
        resolve_device(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: prediction needs a checkpoint")
        with building("model"):
            self.model = build_model(cfg).eval()
        content = FocalCheckpointer(
            self.model, partial=False, trust_files=trust_files, allow_download=allow_download
        ).load(cfg.MODEL.WEIGHTS)
        self.operating_point = saved_point(content, cfg.MODEL.WEIGHTS)
        self.threshold = threshold if threshold is not None else 0.0
        if threshold is None and self.operating_point is not None:
            self.threshold = self.operating_point.score
            logger.info(f"threshold: {self.operating_point}, from {cfg.MODEL.WEIGHTS}")
        self.resize = Resize(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
        names = known_class_names(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else None
        counted_by = class_key(cfg)
        if counted_by and (names is None or len(names) != key_value(cfg, counted_by)):
            names = None
        most = max(key_value(cfg, key) for key in ([counted_by] if counted_by else CLASS_KEYS))
        self.class_names = names or [str(k) for k in range(most)]

    @torch.no_grad()
    def __call__(self, image: np.ndarray | str | Path) -> Detections:
        """Detect objects with scores of at least `threshold`.

        Args:
            image: a file, or pixels as OpenCV reads them: (H, W, 3) uint8 in BGR order, or (H, W) or
                (H, W, 1) uint8 grey. They are converted to `INPUT.FORMAT`.

        Raises:
            UserError: if the file cannot be read as an image, or the pixels have another shape or type.
        """
        if isinstance(image, np.ndarray):
            pixels = from_array(image, self.reader.image_format)
        elif isinstance(image, (str, Path)):
            pixels = read_image(image, self.reader)
        else:
            each = "; call the predictor once for each image" if isinstance(image, (list, tuple)) else ""
            raise UserError(
                f"an image must be the name of a file or an array of pixels, not {type(image).__name__}{each}"
            )
        height, width = pixels.shape[:2]
        resized = self.reader.augmentation_input(pixels)
        self.resize(resized)
        tensor = self.reader.to_tensor(resized.image)
        (output,) = self.model([{"image": tensor, "height": height, "width": width}])
        if "instances" not in output:
            raise UserError(
                f"{type(self.model).__name__} returns {', '.join(output)} of an image; prediction needs "
                "instances"
            )
        instances = output["instances"].to("cpu")
        instances = instances[instances.scores >= self.threshold]
        return Detections(
            instances.pred_boxes.tensor.numpy(),
            instances.scores.numpy(),
            instances.pred_classes.numpy(),
        )
