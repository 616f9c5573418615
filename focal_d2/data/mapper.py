"""From a dataset record to the model's input."""

from __future__ import annotations

import struct
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from PIL.Image import DecompressionBombError

from focal_d2.errors import UserError

# What Pillow raises for files that it cannot or will not read.
UNREADABLE = (OSError, SyntaxError, struct.error, DecompressionBombError)


class FocalDatasetMapper(DatasetMapper):
    """detectron2's mapper with the augmentations of `INPUT.FOCAL.*` and an error that names the file."""

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT.*`; augmentations apply in training only."""
        kwargs = super().from_config(cfg, is_train)
        if is_train:
            kwargs["augmentations"] += build_augmentations(cfg.INPUT.FOCAL)
        return kwargs

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See detectron2's `DatasetMapper`.

        Raises:
            UserError: if the image cannot be read or has another size than annotated.
        """
        try:
            return super().__call__(dataset_dict)
        except (*UNREADABLE, SizeMismatchError) as error:
            raise UserError(f"cannot read image {dataset_dict['file_name']}: {error}") from error


def build_augmentations(inputs: CfgNode) -> list[T.Augmentation]:
    """List the augmentations that `INPUT.FOCAL.*` turns on, in the order in which they are applied.

    Raises:
        UserError: for a range that is not within [0, 1).
    """
    for key in ("BRIGHTNESS", "CONTRAST"):
        if not 0 <= inputs[key] < 1:
            raise UserError(f"INPUT.FOCAL.{key} is {inputs[key]}; it must be at least 0 and below 1")
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
