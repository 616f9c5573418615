"""Augmentations of several images: mosaic and copy-paste of boxes (`INPUT.FOCAL.MOSAIC`, `COPY_PASTE`).

They act on mapped samples, which all other augmentations have gone through. So they take any `INPUT.FORMAT`,
and the result has the size of the sample that was drawn. They draw from NumPy's global generator, which the
loader seeds by the number of the draw.

Both copy windows of a sample into another one. Of each box, a window shows a share of the area. From
`BOX_CROP.MIN_VISIBLE` on the box is an object, below it an ignored region. The share is that of the box in
its sample: what a crop cut off before does not count.

Shapes: images are (C, H, W); M boxes and G ignored regions of a sample, XYXY in its pixels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import Tensor

from focal_d2.config.architectures import check_boxes_only
from focal_d2.data.augmentations import uniform
from focal_d2.data.pixels import FORMATS
from focal_d2.errors import UserError

_Sample = dict[str, Any]

# Positions that are tried for a pasted box.
_TRIES = 10
# Where the four images of a mosaic meet, as a share of its sides.
_MEETING = (0.25, 0.75)


class _Content(NamedTuple):
    """An image and its boxes."""

    image: Tensor  # (C, H, W)
    boxes: Tensor  # (M, 4) float32
    classes: Tensor  # (M,) int64
    ignored: Tensor  # (G, 4) float32

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[1], self.image.shape[2]


class Step(NamedTuple):
    """One kind of mixing."""

    probability: float
    mix: Callable[[_Sample, Callable[[], _Sample]], _Sample]  # a sample, and what reads another one
    records: np.ndarray  # int64: positions of the records to draw from, each as likely


class Mixing:
    """What `INPUT.FOCAL.*` asks for, and until which draw."""

    def __init__(self, steps: Sequence[Step], *, end: int) -> None:
        """Set up the steps.

        Args:
            steps: in the order in which they are applied.
            end: draws from this one on stay as they are.
        """
        self.steps, self.end = steps, end

    def __call__(self, sample: _Sample, read: Callable[[int], _Sample]) -> _Sample:
        """Mix other samples into one.

        Args:
            sample: what was drawn. Its image is written to.
            read: maps the record at a position.

        Raises:
            UserError: if a sample has no annotations.
        """

        def read_one(records: np.ndarray) -> _Sample:
            return read(int(records[_whole(len(records) - 1)]))

        for step in self.steps:
            if uniform() < step.probability and len(step.records):
                sample = step.mix(sample, partial(read_one, step.records))
        return sample


def build_mixing(cfg: CfgNode, records: Sequence[dict[str, Any]]) -> Mixing | None:
    """Read `INPUT.FOCAL.MOSAIC`, `COPY_PASTE` and `PLAIN_SHARE`; return None if nothing is mixed.

    Args:
        cfg: full config, its values checked.
        records: what is trained on.

    Raises:
        UserError: if the model or the records have more than boxes.
    """
    names = _names(cfg)
    if not names:
        return None
    check_boxes_only(cfg, f"INPUT.FOCAL.{names[0]}")
    if any("sem_seg_file_name" in x for x in records):
        raise UserError(
            f"INPUT.FOCAL.{names[0]} knows boxes only, but DATASETS.TRAIN has semantic segmentation"
        )
    inputs = cfg.INPUT.FOCAL
    min_visible = inputs.BOX_CROP.MIN_VISIBLE
    steps = []
    if inputs.MOSAIC.PROBABILITY:
        mosaic = Mosaic(scale=tuple(inputs.MOSAIC.SCALE), fill=_fill(cfg), min_visible=min_visible)
        steps.append(Step(inputs.MOSAIC.PROBABILITY, mosaic, np.arange(len(records))))
    if inputs.COPY_PASTE.PROBABILITY:
        paste = CopyPaste(
            most=inputs.COPY_PASTE.BOXES, max_covered=inputs.COPY_PASTE.MAX_COVERED, min_visible=min_visible
        )
        with_boxes = [not all(a.get("iscrowd", 0) for a in x.get("annotations", ())) for x in records]
        steps.append(Step(inputs.COPY_PASTE.PROBABILITY, paste, np.flatnonzero(with_boxes)))
    # By the draw and not the iteration: then workers, which read ahead, need no iteration.
    iterations = math.floor(cfg.SOLVER.MAX_ITER * (1 - inputs.PLAIN_SHARE))
    return Mixing(steps, end=iterations * cfg.SOLVER.IMS_PER_BATCH)


def check_unmixed(cfg: CfgNode) -> None:
    """Check that nothing is mixed, where there is no list of records to draw from.

    Raises:
        UserError: naming the key.
    """
    if names := _names(cfg):
        raise UserError(
            f"INPUT.FOCAL.{names[0]} draws images from a list of records, which DATASETS.TRAIN does not "
            "have: set PROBABILITY 0"
        )


def _names(cfg: CfgNode) -> list[str]:
    return [name for name in ("MOSAIC", "COPY_PASTE") if cfg.INPUT.FOCAL[name].PROBABILITY]


def _fill(cfg: CfgNode) -> list[float]:
    """Return the mean colour, which is 0 for the network, as padding is."""
    mean: list[float] = list(cfg.MODEL.PIXEL_MEAN)
    return mean if FORMATS[cfg.INPUT.FORMAT] == len(mean) else [sum(mean) / len(mean)]


class Mosaic:
    """Four images side by side (arXiv 2004.10934), in the place of one."""

    def __init__(self, *, scale: tuple[float, float], fill: Sequence[float], min_visible: float) -> None:
        """Set up the mosaic.

        Args:
            scale: range of the factor, uniform, by which each image is resized before it is cut.
            fill: C values, for what no image covers.
            min_visible: share of a box's area from which it is an object.
        """
        self.scale, self.min_visible = scale, min_visible
        self.fill = torch.tensor(fill)

    def __call__(self, sample: _Sample, draw_other: Callable[[], _Sample]) -> _Sample:
        """Draw three other samples and put windows of all four around a point of the first one's size.

        The point is uniform in the middle half of the image. A window is uniform in its image. Where an image
        is smaller than its quarter, it touches the point, and the rest is filled.
        """
        samples = [sample, *(draw_other() for _ in range(3))]
        contents = [_content_of(x) for x in samples]
        height, width = contents[0].size
        row, column = (round(uniform(*_MEETING) * side) for side in (height, width))
        dtype = contents[0].image.dtype
        fill = self.fill if dtype.is_floating_point else self.fill.round()
        image = fill.to(dtype)[:, None, None].repeat(1, height, width)
        mosaic = _Content(image, *(x[:0] for x in contents[0][1:]))
        for content, place in zip(contents, _order(4), strict=True):
            below, right = divmod(place, 2)
            room = (height - row if below else row), (width - column if right else column)
            content = _resized(content, uniform(*self.scale))
            window = [min(a, b) for a, b in zip(room, content.size, strict=True)]
            top, left = (_whole(a - b) for a, b in zip(content.size, window, strict=True))
            at = row if below else row - window[0], column if right else column - window[1]
            part = _window(content, top, left, *window, min_visible=self.min_visible)
            mosaic = _pasted(mosaic, part, *at)
        return _sample_of(sample, mosaic, "mosaic with", samples[1:])


class CopyPaste:
    """Boxes of another image, pasted with their pixels (arXiv 2012.07177 pastes objects by their masks)."""

    def __init__(self, *, most: int, max_covered: float, min_visible: float) -> None:
        """Set up the pasting.

        Args:
            most: boxes to paste; their number is uniform from 1 on.
            max_covered: the largest share of a box's area that all pasted boxes together may cover.
            min_visible: share of a box's area from which it is an object.
        """
        self.most, self.max_covered, self.min_visible = most, max_covered, min_visible

    def __call__(self, sample: _Sample, draw_other: Callable[[], _Sample]) -> _Sample:
        """Draw another sample and paste some of its boxes at random positions.

        What else is inside a pasted box is pasted with it, as an object or as an ignored region. A box that
        does not fit into the image, or for which several positions would cover too much, is left out.
        """
        other = draw_other()
        content, source = _content_of(sample), _content_of(other)
        if not len(source.boxes):
            return sample
        covered = torch.zeros(len(content.boxes))  # (M,) area of each box that is covered
        number = 1 + _whole(min(self.most, len(source.boxes)) - 1)
        pasted = 0
        for left, top, right, bottom in source.boxes[_order(len(source.boxes))[:number]].tolist():
            corner = math.floor(top), math.floor(left)
            part = _window(
                source,
                *corner,
                math.ceil(bottom) - corner[0],
                math.ceil(right) - corner[1],
                min_visible=self.min_visible,
            )
            place = self._find_place(content, part.size, covered)
            if place is None:
                continue
            at, shares = place
            content, pasted = _pasted(content, part, *at), pasted + 1
            covered = torch.cat([covered + shares, torch.zeros(len(part.boxes))])
        return _sample_of(sample, content, "pasted from", [other]) if pasted else sample

    def _find_place(
        self, content: _Content, size: tuple[int, int], covered: Tensor
    ) -> tuple[tuple[int, int], Tensor] | None:
        """Draw where a rectangle goes; return its upper left corner and the area (M,) of boxes under it."""
        room = [a - b for a, b in zip(content.size, size, strict=True)]
        if min(room) < 0:
            return None
        whole = Boxes(content.boxes).area()
        for _ in range(_TRIES):
            top, left = map(_whole, room)
            low, high = torch.tensor([left, top]), torch.tensor([left + size[1], top + size[0]])
            sides = torch.minimum(content.boxes[:, 2:], high) - torch.maximum(content.boxes[:, :2], low)
            under = sides.clamp(min=0).prod(1)
            if (covered + under <= self.max_covered * whole).all():
                return (top, left), under
        return None


def _order(number: int) -> list[int]:
    """Draw an order of so many things."""
    order: list[int] = np.random.permutation(number).tolist()  # noqa: NPY002
    return order


def _whole(most: int) -> int:
    """Draw from 0 to `most`."""
    return int(np.random.randint(most + 1))  # noqa: NPY002


def _content_of(sample: _Sample) -> _Content:
    """Take a mapped sample apart."""
    if "instances" not in sample:
        raise UserError(
            f"{sample.get('file_name')} has no annotations, which INPUT.FOCAL.MOSAIC and COPY_PASTE need"
        )
    instances = sample["instances"]
    return _Content(
        sample["image"],
        instances.gt_boxes.tensor,
        instances.gt_classes,
        sample.get("ignored_boxes", torch.zeros(0, 4)),
    )


def _sample_of(first: _Sample, content: _Content, how: str, others: Sequence[_Sample]) -> _Sample:
    """Make a sample that is the first one with another content; its file name names all images."""
    instances = Instances(content.size)
    instances.gt_boxes, instances.gt_classes = Boxes(content.boxes), content.classes
    sample = {**first, "image": content.image, "instances": instances, "ignored_boxes": content.ignored}
    if "file_name" in first:
        names = ", ".join(os.fspath(x["file_name"]) for x in others)
        sample["file_name"] = f"{os.fspath(first['file_name'])} ({how} {names})"
    return sample


def _resized(content: _Content, factor: float) -> _Content:
    """Multiply the sides by a factor, smoothed where the image shrinks; they have at least one pixel."""
    old = content.size
    new = [max(1, round(side * factor)) for side in old]
    if new == list(old):
        return content
    image = torch.nn.functional.interpolate(content.image[None], new, mode="bilinear", antialias=True)[0]
    scale = torch.tensor([new[1] / old[1], new[0] / old[0]]).repeat(2)
    return _Content(image, content.boxes * scale, content.classes, content.ignored * scale)


def _window(
    content: _Content, top: int, left: int, height: int, width: int, *, min_visible: float
) -> _Content:
    """Cut a window out; boxes of which it shows too little become ignored regions."""
    move = torch.tensor([left, top, left, top])
    limits = torch.tensor([width, height, width, height])
    boxes, ignored = (
        torch.minimum((x - move).clamp(min=0), limits) for x in (content.boxes, content.ignored)
    )
    shown, whole = Boxes(boxes).area(), Boxes(content.boxes).area()
    # The slack is for rounding, as boxes are moved in float32.
    is_object = (shown > 0) & (shown >= (min_visible - 1e-5) * whole)
    rest = torch.cat([ignored, boxes[~is_object]])
    return _Content(
        content.image[:, top : top + height, left : left + width],
        boxes[is_object],
        content.classes[is_object],
        rest[Boxes(rest).area() > 0],
    )


def _pasted(content: _Content, part: _Content, top: int, left: int) -> _Content:
    """Add a part, with its upper left corner there. The image is written to; boxes below do not change."""
    height, width = part.size
    content.image[:, top : top + height, left : left + width] = part.image
    move = torch.tensor([left, top, left, top])
    return _Content(
        content.image,
        torch.cat([content.boxes, part.boxes + move]),
        torch.cat([content.classes, part.classes]),
        torch.cat([content.ignored, part.ignored + move]),
    )
