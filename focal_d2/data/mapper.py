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

from focal_d2.annotations import box_areas
from focal_d2.config import check_choice
from focal_d2.config.architectures import check_boxes_only, known_architecture
from focal_d2.config.legal_values import check_values
from focal_d2.data.augmentations import build_augmentations, never_empty
from focal_d2.data.image_files import UNREADABLE, check_for_detectron2, why_unreadable
from focal_d2.data.pixels import FORMATS, ImageReader
from focal_d2.detectron2_compat import MapperHooks
from focal_d2.errors import UserError


class FocalDatasetMapper(MapperHooks, DatasetMapper):
    """detectron2's mapper with the augmentations of `INPUT.FOCAL.*` and an error that names the file.

    A training sample also has "ignored_boxes", (G, 4) float32 XYXY in its own pixels: regions that are
    neither object nor background, from crowds and from boxes of which the crop left too little.
    """

    @configurable
    def __init__(
        self, is_train: bool, *, reader: ImageReader, min_visible: float | None, **kwargs: Any
    ) -> None:
        """Take detectron2's arguments and two more.

        Args:
            is_train: whether to augment and to return boxes.
            reader: of `INPUT.FORMAT`.
            min_visible: share of a box's area that must be left for it to be an object; None: any, and
                no augmentation asks for boxes.
            **kwargs: detectron2's.
        """
        super().__init__(is_train, **kwargs)
        self.reader = reader
        self.min_visible = min_visible

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read `INPUT.*`; augmentations apply in training only.

        Raises:
            UserError: for a value that is not legal, or keys that do not fit together.
        """
        check_values(cfg, "INPUT.")
        reader = build_reader(cfg)
        inputs = cfg.INPUT.FOCAL
        kwargs = {
            **super().from_config(cfg, is_train),
            "reader": reader,
            "min_visible": inputs.BOX_CROP.MIN_VISIBLE if is_train and inputs.BOX_CROP.SIZE else None,
        }
        kwargs["augmentations"] = never_empty(kwargs["augmentations"])
        if is_train:
            kwargs["augmentations"] = build_augmentations(cfg, kwargs["augmentations"])
        return kwargs

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """See detectron2's `DatasetMapper`.

        Raises:
            UserError: if the image cannot be read or has another size than annotated.
        """
        needs_detectron2 = self.use_instance_mask or self.use_keypoint or self.proposal_topk is not None
        name = dataset_dict["file_name"]
        try:
            if needs_detectron2 or "sem_seg_file_name" in dataset_dict:
                for key in ("file_name", "sem_seg_file_name"):
                    if key in dataset_dict:
                        name = dataset_dict[key]
                        check_for_detectron2(name, max_pixels=self.reader.max_pixels)
                sample = super().__call__(dataset_dict)
                if sample["image"].dtype == torch.float64:  # detectron2's YUV-BT.601
                    sample["image"] = sample["image"].float()
                return sample
            return self._map(dataset_dict)
        except (*UNREADABLE, SizeMismatchError) as error:
            raise UserError(f"cannot read image {name}: {why_unreadable(name, error)}") from error

    def _map(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Do what detectron2's `__call__` does to an image and its boxes."""
        if get_worker_info() is not None:
            cv2.setNumThreads(0)  # as PyTorch limits its own: each worker has one core
        record = dict(dataset_dict)  # what it holds is read only
        annotations = record.pop("annotations", None)
        image = self.reader.read(record["file_name"])
        inputs = self.reader.augmentation_input(image)
        check_image_size(record, image)
        if self.min_visible is not None:
            inputs.boxes = boxes_within(
                [x for x in annotations or () if not x.get("iscrowd", 0)], image.shape[:2]
            )
        transforms = self.augmentations(inputs)
        size = inputs.image.shape[:2]
        record["image"] = self.reader.to_tensor(inputs.image)
        if self.is_train:
            objects, record["ignored_boxes"] = split_ignored(
                annotations or [], transforms, image.shape[:2], size, self.min_visible
            )
            if annotations is not None:
                record["instances"] = transform_boxes(objects, transforms, size)
        return record

    def transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        """Keep the ignored regions of a record that detectron2's `__call__` maps."""
        size = dataset_dict["height"], dataset_dict["width"]
        dataset_dict["annotations"], dataset_dict["ignored_boxes"] = split_ignored(
            dataset_dict["annotations"], transforms, size, image_shape, self.min_visible
        )
        super().transform_annotations(dataset_dict, transforms, image_shape)


def validation_mapper(cfg: CfgNode) -> FocalDatasetMapper:
    """Return the mapper of evaluation that also returns the boxes, which losses need."""
    mapper = FocalDatasetMapper(cfg, is_train=False)
    mapper.is_train = True
    return mapper


def build_reader(cfg: CfgNode) -> ImageReader:
    """Read `INPUT.FORMAT`, `INPUT.FOCAL.BACKEND` and `INPUT.FOCAL.MAX_PIXELS`.

    Raises:
        UserError: for a format that does not exist, or a format or backend that does not fit other keys: the
            backend cannot do what they ask for, or the model takes another number of channels.
    """
    inputs = cfg.INPUT.FOCAL
    channels = FORMATS[check_choice("INPUT.FORMAT", cfg.INPUT.FORMAT, tuple(FORMATS))]
    means, deviations = len(cfg.MODEL.PIXEL_MEAN), len(cfg.MODEL.PIXEL_STD)
    # One channel is repeated for as many means as there are. Other models may not read these keys.
    if known_architecture(cfg) and not (channels in (1, means) and means == deviations):
        raise UserError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, which has {channels} channels, but MODEL.PIXEL_MEAN has "
            f"{means} numbers and MODEL.PIXEL_STD {deviations}: give both {channels}"
        )
    if inputs.BACKEND == "opencv":
        check_choice("with INPUT.FOCAL.BACKEND opencv, INPUT.FORMAT", cfg.INPUT.FORMAT, ("BGR", "RGB"))
        check_boxes_only(cfg, "INPUT.FOCAL.BACKEND opencv")
    return ImageReader(cfg.INPUT.FORMAT, inputs.BACKEND, inputs.MAX_PIXELS)


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


def split_ignored(
    annotations: list[dict[str, Any]],
    transforms: T.TransformList,
    old_size: tuple[int, int],
    new_size: tuple[int, int],
    min_visible: float | None,
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Divide an image's annotations into objects and ignored regions.

    Args:
        annotations: in detectron2's format.
        transforms: what the image went through, no box of which they tilt.
        old_size: height and width before.
        new_size: height and width after.
        min_visible: of a box's area in the image, the share that must be left; None: crowds only.

    Returns:
        The annotations that are objects, untransformed, and the ignored regions (G, 4) float32 XYXY,
        transformed and clipped, without those that are empty.
    """
    ignored = np.array([bool(x.get("iscrowd", 0)) for x in annotations], dtype=bool)
    if min_visible is None and not ignored.any():
        return annotations, torch.zeros(0, 4)
    height, width = new_size
    moved = transforms.apply_box(boxes_within(annotations, old_size))
    left = moved.clip(0, [width, height, width, height])
    if min_visible is not None:
        # The slack is for rounding: a turn by 90 degrees moves a box by some 1e-13 pixels.
        ignored |= box_areas(left) < (min_visible - 1e-9) * box_areas(moved)
    objects = [x for x, out in zip(annotations, ignored.tolist(), strict=True) if not out]
    return objects, torch.from_numpy(left[ignored & (box_areas(left) > 0)].astype(np.float32))


def boxes_within(annotations: list[dict[str, Any]], image_size: tuple[int, int]) -> np.ndarray:
    """Return the annotations' boxes (M, 4) float64 XYXY, clipped to the image's height and width."""
    boxes = [
        BoxMode.convert([float(v) for v in x["bbox"]], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations
    ]
    height, width = image_size
    return np.array(boxes, dtype=np.float64).reshape(-1, 4).clip(0, [width, height, width, height])
