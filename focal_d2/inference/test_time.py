"""Test-time augmentation: detect in several sizes, mirrored and turned, and keep the best of all.

Boxes are XYXY in absolute pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances

from focal_d2.data.augmentations import Resize, TurnTransform
from focal_d2.data.mapper import build_reader
from focal_d2.modeling import FocalRetinaNet

if TYPE_CHECKING:
    from focal_d2.data.pixels import ImageReader


class AugmentedViews:
    """Detects objects in several views of an image: `FocalRetinaNet.views`.

    The candidates of all views are moved back to the image, and are suppressed together. One view is computed
    at a time, and of each the model keeps at most `TOPK_CANDIDATES_TEST` candidates a level: the memory is
    that of the largest view.
    """

    def __init__(
        self, reader: ImageReader, *, sizes: list[int], max_size: int, flip: bool, turns: bool
    ) -> None:
        """Say which views.

        Args:
            reader: of `INPUT.FORMAT`; it resizes as in training, and reads images again that were resized.
            sizes: of the shorter side; 0: as it is.
            max_size: limit on the longer side.
            flip: each view also mirrored, left to right.
            turns: each view also turned by 90, 180 and 270 degrees.
        """
        self.reader, self.sizes, self.max_size, self.flip, self.turns = reader, sizes, max_size, flip, turns

    def __call__(
        self, model: FocalRetinaNet, batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Instances]]:
        """Return "instances" of each image, as the model does."""
        return [{"instances": self._detect(model, x)} for x in batched_inputs]

    def _detect(self, model: FocalRetinaNet, sample: dict[str, Any]) -> Instances:
        image = self._original(sample)
        size = (image.shape[0], image.shape[1])
        merged = model.suppress(
            Instances.cat([self._candidates(model, *view) for view in self._views(image)])
        )
        return detector_postprocess(merged, sample.get("height", size[0]), sample.get("width", size[1]))

    def _original(self, sample: dict[str, Any]) -> np.ndarray:
        """Return the pixels (H, W, C) before resizing, if the sample says where they are."""
        image = sample["image"]
        height, width = image.shape[-2:]
        resized = (sample.get("height", height), sample.get("width", width)) != (height, width)
        if resized and "file_name" in sample:
            return self.reader.read(sample["file_name"])
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy())

    def _views(self, image: np.ndarray) -> Iterator[tuple[torch.Tensor, T.TransformList, tuple[int, int]]]:
        """Return for each view its pixels (C, h, w), what was done to the image, and the image's size."""
        angles = (0, 90, 180, 270) if self.turns else (0,)
        for size, angle, mirrored in itertools.product(self.sizes, angles, (False, True)[: 1 + self.flip]):
            view = self.reader.augmentation_input(image)
            transforms: list[T.Transform] = [Resize(size, self.max_size).get_transform(view.image)]
            view.transform(transforms[0])
            if angle:
                transforms.append(TurnTransform(*view.image.shape[:2], angle))
                view.transform(transforms[-1])
            if mirrored:
                transforms.append(T.HFlipTransform(view.image.shape[1]))
                view.transform(transforms[-1])
            yield self.reader.to_tensor(view.image), T.TransformList(transforms), image.shape[:2]

    def _candidates(
        self, model: FocalRetinaNet, pixels: torch.Tensor, transforms: T.TransformList, size: tuple[int, int]
    ) -> Instances:
        """Return the candidates of a view, in the image's pixels."""
        images = model.preprocess_image([{"image": pixels}])
        features, predictions = model.network(images)
        (candidates,) = model.candidates(images, features, predictions)
        boxes = candidates.pred_boxes.tensor
        back = transforms.inverse().apply_box(boxes.double().cpu().numpy().reshape(-1, 4))
        moved = Instances(size, scores=candidates.scores, pred_classes=candidates.pred_classes)
        moved.pred_boxes = Boxes(torch.from_numpy(back).to(boxes))
        return moved


def build_augmented_views(cfg: CfgNode) -> AugmentedViews | None:
    """Read `TEST.AUG.*`; None if it is not enabled.

    Raises:
        UserError: for an `INPUT.FORMAT` that does not exist.
    """
    augmentation, test = cfg.TEST.AUG, cfg.TEST.FOCAL
    if not augmentation.ENABLED:
        return None
    return AugmentedViews(
        build_reader(cfg),
        sizes=list(augmentation.MIN_SIZES),
        max_size=augmentation.MAX_SIZE,
        flip=augmentation.FLIP,
        turns=test.AUG_TURNS,
    )
