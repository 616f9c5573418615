"""From a dataset record to the model's input."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError, check_image_size, filter_empty_instances
from detectron2.structures import Boxes, BoxMode, Instances
from torch.utils.data import get_worker_info

from focal_d2.config import check_choice
from focal_d2.data.pixels import UNREADABLE, OpenCVInput, read_pixels, to_planes
from focal_d2.errors import UserError


class FocalDatasetMapper(DatasetMapper):
    """detectron2's mapper with the augmentations of `INPUT.FOCAL.*` and an error that names the file."""

    @configurable
    def __init__(self, is_train: bool, *, backend: str, **kwargs: Any) -> None:
        """Take detectron2's arguments and one more.

        Args:
            is_train: whether to augment and to return boxes.
            backend: "pil" or "opencv".
            **kwargs: detectron2's.
        """
        super().__init__(is_train, **kwargs)
        self.backend = backend

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT.*`; augmentations apply in training only."""
        backend = input_backend(cfg)
        kwargs = {**super().from_config(cfg, is_train), "backend": backend}
        if is_train:
            kwargs["augmentations"] += build_augmentations(cfg.INPUT.FOCAL)
        return kwargs

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See detectron2's `DatasetMapper`.

        Raises:
            UserError: if the image cannot be read or has another size than annotated.
        """
        try:
            return self._map(dataset_dict) if self.backend == "opencv" else super().__call__(dataset_dict)
        except (*UNREADABLE, SizeMismatchError) as error:
            raise UserError(f"cannot read image {dataset_dict['file_name']}: {error}") from error

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Do what detectron2's `__call__` does to an image and its boxes, with OpenCV."""
        if get_worker_info() is not None:
            cv2.setNumThreads(0)  # as PyTorch limits its own: each worker has one core
        record = dict(dataset_dict)  # what it holds is read only
        image = read_pixels(record["file_name"], self.image_format)
        check_image_size(record, image)
        inputs = OpenCVInput(image)
        transforms = self.augmentations(inputs)
        record["image"] = to_planes(inputs.image)
        annotations = record.pop("annotations", None)
        if self.is_train and annotations is not None:
            record["instances"] = transform_boxes(annotations, transforms, inputs.image.shape[:2])
        return record


def input_backend(cfg: CfgNode) -> str:
    """Return `INPUT.FOCAL.BACKEND`.

    Raises:
        UserError: if there is no such backend, or it cannot do what the config asks for.
    """
    inputs = cfg.INPUT.FOCAL
    backend = check_choice("INPUT.FOCAL.BACKEND", inputs.BACKEND, ("pil", "opencv"))
    if backend == "opencv":
        check_choice("with INPUT.FOCAL.BACKEND opencv, INPUT.FORMAT", cfg.INPUT.FORMAT, ("BGR", "RGB"))
        for key in ("MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"):
            if cfg.MODEL[key]:
                raise UserError(f"INPUT.FOCAL.BACKEND opencv knows boxes only: MODEL.{key} must be False")
    return backend


def transform_boxes(
    annotations: list[dict[str, Any]], transforms: T.TransformList, image_size: tuple[int, int]
) -> Instances:
    """Transform an image's boxes, all at once; detectron2 does so one by one, with the same result.

    Args:
        annotations: of M objects, in detectron2's format; crowds are left out.
        transforms: what the image went through.
        image_size: height and width after that.

    Returns:
        `gt_boxes` (M', 4) and `gt_classes` (M',), without boxes that are empty after clipping.
    """
    annotations = [x for x in annotations if not x.get("iscrowd", 0)]
    # detectron2 computes with the type in which a box is written; boxes of integers are rounded down.
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, annotation in enumerate(annotations):
        kind = (annotation["bbox_mode"], *map(type, annotation["bbox"]))
        alike[kind].append(i)
    height, width = image_size
    boxes = np.zeros((len(annotations), 4))
    for (mode, *_), members in alike.items():
        group: Any = [annotations[i]["bbox"] for i in members]
        if mode != BoxMode.XYXY_ABS:
            group = BoxMode.convert(torch.tensor(group), mode, BoxMode.XYXY_ABS).tolist()
        moved = transforms.apply_box(np.array(group)).clip(min=0)
        boxes[members] = np.minimum(moved, [width, height, width, height])
    instances = Instances(image_size)
    instances.gt_boxes = Boxes(boxes)
    instances.gt_classes = torch.tensor([int(x["category_id"]) for x in annotations], dtype=torch.int64)
    return filter_empty_instances(instances)


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
