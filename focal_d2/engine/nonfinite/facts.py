"""The facts about a step that was not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from focal_d2.engine.nonfinite.texts import box_text, many, number


class Step(NamedTuple):
    """The numbers of an iteration that the training loop keeps."""

    iteration: int
    learning_rate: float
    losses: dict[str, float]
    gradient_norm: float  # of all parameters together, before clipping


class ImageName(NamedTuple):
    """An image of the batch."""

    position: int  # in the batch
    file_name: str
    image_id: str

    def __str__(self) -> str:
        return f"image {self.file_name or self.position} (id {self.image_id})"


class BadBox(NamedTuple):
    """An annotation that cannot be trained on."""

    image: ImageName
    field: str  # "instances" or "ignored_boxes"
    position: int  # in that field
    box: list[float]  # XYXY in pixels of the image as it was trained on
    why: str

    def __str__(self) -> str:
        what = "box" if self.field == "instances" else "ignored box"
        return f"{what} {self.position} of {self.image} is {box_text(self.box)}: {self.why}"


class BadPixels(NamedTuple):
    """Pixels of an image whose values are not finite, or too large for a colour."""

    image: ImageName
    why: str
    values: int
    channel: int  # of the first of them
    y: int
    x: int
    value: float

    def __str__(self) -> str:
        pixel = f"x {self.x}, y {self.y}, channel {self.channel}"
        count = many(self.values, "value")
        return f"{self.image} has {count} {self.why}, first {number(self.value)} at {pixel}"


class BadTensor(NamedTuple):
    """A parameter or buffer that was not finite before the step."""

    name: str
    kind: str  # "parameter" or "buffer"
    values: int  # that are not finite
    size: int


class LargestWeight(NamedTuple):
    """The parameter with the largest finite magnitude."""

    name: str
    value: float  # the magnitude


class BadModule(NamedTuple):
    """The first module whose output was not finite though its inputs were."""

    name: str
    type: str
    precision: str  # of the output
    largest_input: float  # magnitude
    values: int  # of the output that are not finite
    size: int
    in_float32: float | None  # the output's largest magnitude without autocast; None: not computed


class BadAnchor(NamedTuple):
    """The first anchor whose own loss, or whose gradient, is not finite."""

    term: str  # the loss, or which gradient
    image: ImageName
    level: str  # as MODEL.RETINANET.IN_FEATURES names it
    stride: int  # pixels
    cell: tuple[int, int]  # x, y
    anchor: list[float]  # XYXY in pixels
    label: str
    matched_index: int | None  # of the box in the image's instances
    matched_box: list[float] | None
    logits: list[float]
    deltas: list[float]
    value: float  # the anchor's own loss, or the first value of its gradient that is not finite
    alike: int  # number of anchors with the same fault, this one included
    complete: bool  # whether all anchors were searched; if not, there may be more

    def __str__(self) -> str:
        x, y = self.cell
        count = f"{'' if self.complete else 'at least '}{many(self.alike, 'anchor')}"
        return (
            f"{self.term} is {number(self.value)} at {count}, first in {self.image}, level "
            f"{self.level} (stride {self.stride}), cell x {x}, y {y}"
        )


class BadGradient(NamedTuple):
    """A gradient whose norm is not finite."""

    first: str  # in the backward pass, the first module whose output has such a gradient; "" if none has
    parameters: list[str]  # those whose gradient is not finite, the network's last one first; may be empty


@dataclass(frozen=True)
class Facts:
    """The measurements of an examination; see `examine`."""

    losses: dict[str, float]  # of the step as it was repeated
    normalizer: float | None  # the divisor of the losses; None: not given, the model computed it
    boxes: list[BadBox]
    pixels: list[BadPixels]
    tensors: list[BadTensor]
    largest_weight: LargestWeight
    module: BadModule | None
    anchors: list[BadAnchor]  # one for each loss or gradient that is not finite, if it was found
    gradient: BadGradient | None
    gradient_norm: float  # of all parameters together, of the step as it was repeated
    steps: list[Step]

    @property
    def bad_terms(self) -> list[str]:
        """The losses that are not finite."""
        return [name for name, value in self.losses.items() if not math.isfinite(value)]
