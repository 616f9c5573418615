"""What is known of a step that was not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from focal_d2.engine.nonfinite.texts import box_text, many, number


class Step(NamedTuple):
    """An iteration as the training loop remembers it."""

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
    """Pixels of an image that are no colours."""

    image: ImageName
    why: str
    values: int
    channel: int  # of the first of them
    y: int
    x: int
    value: float

    def __str__(self) -> str:
        place = f"x {self.x}, y {self.y}, channel {self.channel}"
        count = many(self.values, "value")
        return f"{self.image} has {count} {self.why}, first {number(self.value)} at {place}"


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


class Place(NamedTuple):
    """The first anchor whose loss, or gradient, is not finite by itself."""

    term: str
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
    alike: int  # anchors like it, itself included
    complete: bool  # whether `alike` is all of them

    def __str__(self) -> str:
        x, y = self.cell
        count = f"{'' if self.complete else 'at least '}{many(self.alike, 'anchor')}"
        return (
            f"{self.term} is {number(self.value)} at {count}, first in {self.image}, level "
            f"{self.level} (stride {self.stride}), cell x {x}, y {y}"
        )


class BadGradient(NamedTuple):
    """A gradient whose norm is not finite."""

    first: str  # the module at whose output they first were, going backward; "" if at none
    parameters: list[str]  # whose gradient has such values, the last of the network first; may be none


@dataclass(frozen=True)
class Facts:
    """What an examination measured; see `examine`."""

    losses: dict[str, float]  # of the step as it was repeated
    normalizer: float | None  # what the losses were divided by; None: not told, the model's own was used
    boxes: list[BadBox]
    pixels: list[BadPixels]
    tensors: list[BadTensor]
    largest_weight: LargestWeight
    module: BadModule | None
    places: list[Place]
    gradient: BadGradient | None
    gradient_norm: float  # of all parameters together, of the step as it was repeated
    steps: list[Step]

    @property
    def bad_terms(self) -> list[str]:
        """The losses that are not finite."""
        return [name for name, value in self.losses.items() if not math.isfinite(value)]
