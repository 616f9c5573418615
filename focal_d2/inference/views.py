"""What a model detects in: images as they are, views of them (`TEST.AUG`), or tiles (`TEST.FOCAL.TILES`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from torch import nn

from focal_d2.data.mapper import build_reader
from focal_d2.data.pixels import ImageReader
from focal_d2.inference.test_time import AugmentedViews, build_augmented_views
from focal_d2.inference.tiled import TileSettings, open_picture, picture_of
from focal_d2.inference.tiles import TileDetections
from focal_d2.modeling import FocalRetinaNet


class TiledViews:
    """Detects objects in tiles of whole pictures: `FocalRetinaNet.views`."""

    def __init__(self, settings: TileSettings, reader: ImageReader, inner: AugmentedViews | None) -> None:
        """Take the tiles, the reader of the pictures, and the views of each tile."""
        self.settings, self.reader, self.inner = settings, reader, inner

    def __call__(
        self, model: FocalRetinaNet, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Return "instances" of each image; those with a "file_name" are read again, without resizing."""
        model.views = self.inner
        try:
            return [{"instances": self._detect(model, x)} for x in batched_inputs]
        finally:
            model.views = self

    def _detect(self, model: FocalRetinaNet, sample: dict[str, Any]) -> Instances:
        def detect(tiles: Any) -> list[TileDetections]:
            return [as_arrays(model([{"image": x, "height": h, "width": w}])[0]) for x, h, w in tiles]

        if "file_name" in sample:
            with open_picture(sample["file_name"], self.reader) as picture:
                found = self.settings.detect(picture, self.reader, detect, batch=1)
        else:
            picture = picture_of(np.ascontiguousarray(sample["image"].permute(1, 2, 0).numpy()))
            found = self.settings.detect(picture, self.reader, detect, batch=1)
        size = picture.height, picture.width
        instances = Instances(
            size,
            pred_boxes=Boxes(torch.from_numpy(found.boxes)),
            scores=torch.from_numpy(found.scores),
            pred_classes=torch.from_numpy(found.classes),
        )
        return detector_postprocess(instances, sample.get("height", size[0]), sample.get("width", size[1]))


def as_arrays(output: dict[str, Instances]) -> TileDetections:
    """Return what a model detected in an image."""
    instances = output["instances"].to("cpu")
    return TileDetections(
        instances.pred_boxes.tensor.numpy(), instances.scores.numpy(), instances.pred_classes.numpy()
    )


def use_views(cfg: CfgNode, model: nn.Module) -> None:
    """Let a FocalRetinaNet detect in views and tiles from now on; other models stay as they are.

    Args:
        cfg: full config.
        model: without `DistributedDataParallel`.

    Raises:
        UserError: for sizes of tiles that do not fit, or an `INPUT.FORMAT` that does not exist.
    """
    if isinstance(model, FocalRetinaNet):
        views, tiles = build_augmented_views(cfg), TileSettings.from_config(cfg, model)
        model.views = views if tiles is None else TiledViews(tiles, build_reader(cfg), views)
