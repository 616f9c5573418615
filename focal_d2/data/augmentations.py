"""The augmentations of `INPUT.FOCAL.*`, with detectron2's, in the order in which they are applied.

1. `INPUT.CROP`: detectron2's crop of the file's pixels.
2. detectron2's resize to `INPUT.MIN_SIZE_TRAIN`, times `SCALE_JITTER`, of what `BOX_CROP` keeps.
3. `INPUT.RANDOM_FLIP`, `VERTICAL_FLIP`, `ROTATE_90`.
4. `BRIGHTNESS`, `CONTRAST`, `SATURATION`, `HUE`.

`mixing` then puts several images together.

All draw from NumPy's global generator, as detectron2's do. Images are (H, W, C) uint8, of YUV-BT.601 float32.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T

from focal_d2.config import check_choice
from focal_d2.config.architectures import check_boxes_only
from focal_d2.errors import UserError

_LUMA = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601), as detectron2's and Pillow's grey


class Resize(T.ResizeShortestEdge):
    """detectron2's resize, but a side has at least one pixel, also of an image of 1 × 3,000."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the size."""
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


class Crop(T.RandomCrop):
    """detectron2's crop, but a side has at least one pixel."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Draw the size."""
        height, width = super().get_crop_size(image_size)
        return max(1, height), max(1, width)


def never_empty(augmentations: list[T.Augmentation]) -> list[T.Augmentation]:
    """Replace detectron2's resize and crop, which leave no pixel of a very long or a very small image."""
    return [
        Resize(x.short_edge_length, x.max_size, "range" if x.is_range else "choice", x.interp)
        if type(x) is T.ResizeShortestEdge
        else Crop(x.crop_type, x.crop_size)
        if type(x) is T.RandomCrop
        else x
        for x in augmentations
    ]


class ResizeAndCrop(T.Augmentation):
    """detectron2's resize, times a random factor (arXiv 2012.07177, scale jitter), of a window of the image.

    The window is cut first, and its size is that of the crop over the scale: nothing is made that is larger
    than the crop. It starts and ends on whole pixels, so the two sides' scales may differ, by at most half
    a pixel over the window's side; boxes are moved by what was done.
    """

    def __init__(
        self,
        resize: T.ResizeShortestEdge,
        *,
        jitter: tuple[float, float],
        size: tuple[int, int] | None,
        around_box: float,
    ) -> None:
        """Take detectron2's resize and what to do beside it.

        Args:
            resize: gives the image's size before the factor.
            jitter: range of the factor, uniform.
            size: greatest height and width of the result; None: the whole image. A smaller image stays
                as it is; nothing is padded.
            around_box: how often the window is drawn among those that hold one box, each box as likely: all
                of it where it fits, nothing else where it is larger. Otherwise, and without boxes, all
                windows in the image are as likely.
        """
        super().__init__()
        self.resize, self.jitter, self.size, self.around_box = resize, jitter, size, around_box

    def __call__(self, aug_input: T.AugInput) -> T.TransformList:
        """Cut, then resize, with the input's own ways."""
        transforms = self.get_transform(aug_input.image, aug_input.boxes)
        for transform in transforms.transforms:
            aug_input.transform(transform)
        return transforms

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> T.TransformList:
        """Draw.

        Args:
            image: (H, W, 3).
            boxes: (M, 4) XYXY, or None.
        """
        old = image.shape[:2]
        resized = self.resize.get_transform(image)
        new = (resized.new_h, resized.new_w) if isinstance(resized, T.ResizeTransform) else old
        if self.jitter != (1, 1):
            factor = uniform(*self.jitter)
            new = tuple(max(1, round(side * factor)) for side in new)
        window = old
        if self.size is not None:
            window = tuple(
                a if b <= c else min(a, max(1, round(c * a / b)))
                for a, b, c in zip(old, new, self.size, strict=True)
            )
            new = tuple(map(min, new, self.size))
        transforms: list[T.Transform] = []
        if window != old:
            y, x = self._draw_start(old, window, boxes)
            transforms.append(T.CropTransform(x, y, window[1], window[0], old[1], old[0]))
        if new != window:
            transforms.append(T.ResizeTransform(*window, *new, self.resize.interp))
        return T.TransformList(transforms)

    def _draw_start(
        self, size: tuple[int, ...], window: tuple[int, ...], boxes: np.ndarray | None
    ) -> list[int]:
        spans: Any = (None, None)
        if boxes is not None:
            height, width = size
            boxes = boxes.clip(0, [width, height, width, height])
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
            if len(boxes) and uniform() < self.around_box:
                x0, y0, x1, y1 = boxes[int(uniform(0, len(boxes)))].tolist()
                spans = (y0, y1), (x0, x1)
        starts = []
        for side, length, span in zip(size, window, spans, strict=True):
            low, high = 0, side - length
            if span is not None:
                first, last = sorted((span[0], span[1] - length))
                low, high = (min(max(x, 0), high) for x in (math.ceil(first), math.floor(last)))
            starts.append(low + int(uniform(0, max(low, high) - low + 1)))
        return starts


class QuarterTurns(T.RandomRotation):
    """detectron2's rotation by 0, 90, 180 or 270 degrees, each as likely, for any number of channels."""

    def __init__(self) -> None:
        super().__init__([0, 90, 180, 270], sample_style="choice")

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the angle."""
        turn = super().get_transform(image)
        return turn if isinstance(turn, T.NoOpTransform) else TurnTransform(turn.h, turn.w, turn.angle)


class TurnTransform(T.RotationTransform):
    """detectron2's rotation, which also keeps the axis of a single channel; OpenCV drops it."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Turn an image (H, W) or (H, W, C)."""
        turned = super().apply_image(img, interp)
        return turned if turned.ndim == img.ndim else turned[:, :, None]


class RandomSaturation(T.Augmentation):
    """detectron2's `RandomSaturation` for either order of channels: a blend with the grey image."""

    def __init__(self, intensity_min: float, intensity_max: float, image_format: str) -> None:
        """Take the range of the factor (0: grey, 1: as it is), and "BGR" or "RGB"."""
        super().__init__()
        self.intensity_min, self.intensity_max = intensity_min, intensity_max
        self.image_format = image_format

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the factor."""
        factor = uniform(self.intensity_min, self.intensity_max)
        luma = np.array(_LUMA if self.image_format == "RGB" else _LUMA[::-1])
        matrix = factor * np.eye(3) + (1 - factor) * luma  # (3, 3): new channels from old
        return T.ColorTransform(partial(cv2.transform, m=matrix))


class RandomHue(T.Augmentation):
    """Turn hues (of HSV) by a random angle."""

    def __init__(self, degrees: float, image_format: str) -> None:
        """Take the largest angle, and "BGR" or "RGB"."""
        super().__init__()
        self.degrees, self.image_format = degrees, image_format

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draw the angle."""
        angle = uniform(-self.degrees, self.degrees)
        return T.ColorTransform(partial(turn_hues, degrees=angle, image_format=self.image_format))


def uniform(low: float = 0.0, high: float = 1.0) -> float:
    """Draw from NumPy's global generator, as detectron2's augmentations do; each worker seeds it."""
    return float(np.random.uniform(low, high))  # noqa: NPY002


def turn_hues(image: np.ndarray, *, degrees: float, image_format: str) -> np.ndarray:
    """Turn all hues, from red to green to blue; value and saturation stay.

    Args:
        image: (H, W, 3) uint8.
        degrees: 120 makes green of red.
        image_format: "BGR" or "RGB".
    """
    to_hsv, from_hsv = (
        (cv2.COLOR_RGB2HSV, cv2.COLOR_HSV2RGB)
        if image_format == "RGB"
        else (cv2.COLOR_BGR2HSV, cv2.COLOR_HSV2BGR)
    )
    # As floats: HSV of 8 bits is up to 8 grey levels off after the way there and back.
    hsv = cv2.cvtColor(image.astype(np.float32), to_hsv)
    hsv[:, :, 0] = (
        hsv[:, :, 0] + degrees % 360
    )  # OpenCV takes what is above 360, but not always what is below 0
    return cv2.convertScaleAbs(cv2.cvtColor(hsv, from_hsv))


def build_augmentations(cfg: CfgNode, standard: list[T.Augmentation]) -> list[T.Augmentation]:
    """Add what `INPUT.FOCAL.*` turns on to detectron2's augmentations; see the module's text for the order.

    Args:
        cfg: full config, its values checked.
        standard: detectron2's for training.

    Raises:
        UserError: for keys that do not fit together.
    """
    inputs = cfg.INPUT.FOCAL
    if inputs.BRIGHTNESS or inputs.CONTRAST:
        formats = ("BGR", "RGB", "L")
        check_choice("with INPUT.FOCAL.BRIGHTNESS or CONTRAST, INPUT.FORMAT", cfg.INPUT.FORMAT, formats)
    if inputs.SATURATION or inputs.HUE:
        check_choice("with INPUT.FOCAL.SATURATION or HUE, INPUT.FORMAT", cfg.INPUT.FORMAT, ("BGR", "RGB"))
    if cfg.INPUT.CROP.ENABLED:
        _check_crop(cfg.INPUT.CROP)
    augmentations = _with_crop(cfg, standard)
    if inputs.VERTICAL_FLIP:
        augmentations.append(T.RandomFlip(horizontal=False, vertical=True))
    if inputs.ROTATE_90:
        augmentations.append(QuarterTurns())
    if inputs.BRIGHTNESS:
        augmentations.append(T.RandomBrightness(1 - inputs.BRIGHTNESS, 1 + inputs.BRIGHTNESS))
    if inputs.CONTRAST:
        augmentations.append(T.RandomContrast(1 - inputs.CONTRAST, 1 + inputs.CONTRAST))
    if inputs.SATURATION:
        saturation = RandomSaturation(1 - inputs.SATURATION, 1 + inputs.SATURATION, cfg.INPUT.FORMAT)
        augmentations.append(saturation)
    if inputs.HUE:
        augmentations.append(RandomHue(inputs.HUE, cfg.INPUT.FORMAT))
    return augmentations


def _check_crop(crop: CfgNode) -> None:
    """Check `INPUT.CROP.SIZE`, whose unit is that of `INPUT.CROP.TYPE`; detectron2 finds out in an image."""
    first, second = crop.SIZE
    if crop.TYPE.startswith("relative"):
        legal = max(first, second) <= 1
        rule = "two shares of the image's height and width, above 0 and at most 1"
    else:
        legal = all(type(x) is int and x >= 1 for x in (first, second))
        rule = "two whole numbers of pixels, at least 1 and without a point: height and width"
        if crop.TYPE == "absolute_range":  # detectron2 takes 32.0 here
            legal = all(float(x).is_integer() for x in (first, second)) and 1 <= first <= second
            rule = "the least and the greatest number of pixels, whole and at least 1"
    if not legal:
        raise UserError(f"INPUT.CROP.SIZE is {crop.SIZE}; with INPUT.CROP.TYPE {crop.TYPE} it must be {rule}")


def _with_crop(cfg: CfgNode, standard: list[T.Augmentation]) -> list[T.Augmentation]:
    """Put `SCALE_JITTER` and `BOX_CROP` in the place of detectron2's resize."""
    inputs = cfg.INPUT.FOCAL
    jitter, size = tuple(inputs.SCALE_JITTER), tuple(inputs.BOX_CROP.SIZE)
    if jitter[1] > 1 and not size:
        raise UserError(
            f"INPUT.FOCAL.SCALE_JITTER {inputs.SCALE_JITTER} enlarges images: set INPUT.FOCAL.BOX_CROP.SIZE "
            "to [height, width], which bounds memory"
        )
    if size:
        check_boxes_only(cfg, "INPUT.FOCAL.BOX_CROP")
    if not size and jitter == (1, 1):
        return list(standard)
    around_box = inputs.BOX_CROP.AROUND_BOX
    return [
        ResizeAndCrop(x, jitter=jitter, size=size or None, around_box=around_box)
        if isinstance(x, T.ResizeShortestEdge)
        else x
        for x in standard
    ]
