"""From a dataset record to the model's input."""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.structures import BoxMode

from focal_d2.data.boxes import clip_to_window
from focal_d2.errors import UserError


class FocalDatasetMapper(DatasetMapper):
    """detectron2's mapper with the augmentations of `INPUT.FOCAL.*` and an error that names the file."""

    @configurable
    def __init__(self, is_train: bool, *, min_visible: float, **kwargs: Any) -> None:
        """Build a mapper.

        Args:
            is_train: whether to augment and to keep annotations.
            min_visible: boxes of which a crop shows a smaller share of the area are dropped.
            kwargs: of detectron2's `DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.min_visible = min_visible

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT.*`; augmentations apply in training only."""
        kwargs = super().from_config(cfg, is_train)
        if is_train:
            kwargs["augmentations"] += build_augmentations(cfg.INPUT.FOCAL)
        return {**kwargs, "min_visible": cfg.INPUT.FOCAL.MIN_VISIBLE}

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.Transform, image_shape: tuple[int, int]
    ) -> None:
        if self.min_visible > 0 and dataset_dict["annotations"]:
            annotations = dataset_dict["annotations"]
            boxes = np.array(
                [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
            )
            height, width = image_shape
            _, visible = clip_to_window(transforms.apply_box(boxes), (0, 0, width, height))
            dataset_dict["annotations"] = [
                a for a, share in zip(annotations, visible, strict=True) if share >= self.min_visible
            ]
        super()._transform_annotations(dataset_dict, transforms, image_shape)

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See detectron2's `DatasetMapper`.

        Raises:
            UserError: if the image cannot be read or has another size than annotated.
        """
        try:
            return super().__call__(dataset_dict)
        except (OSError, SizeMismatchError) as error:
            raise UserError(f"cannot read image {dataset_dict['file_name']}: {error}") from error


def build_augmentations(inputs: CfgNode) -> list[T.Augmentation]:
    """List the augmentations that `INPUT.FOCAL.*` turns on, in the order in which they are applied."""
    augmentations: list[T.Augmentation] = []
    if inputs.VERTICAL_FLIP:
        augmentations.append(T.RandomFlip(horizontal=False, vertical=True))
    if inputs.ROTATE_90:
        augmentations.append(T.RandomRotation([0, 90, 180, 270], sample_style="choice"))
    if inputs.BRIGHTNESS:
        augmentations.append(T.RandomBrightness(1 - inputs.BRIGHTNESS, 1 + inputs.BRIGHTNESS))
    if inputs.CONTRAST:
        augmentations.append(T.RandomContrast(1 - inputs.CONTRAST, 1 + inputs.CONTRAST))
    return augmentations
