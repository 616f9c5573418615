"""What is known of a step that was not finite, the verdict on it, and the page that a person reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import Any, NamedTuple

from focal_d2.errors import first_few

# No weight of a detector that trains is anywhere near this; those of a trained ResNet stay below 20.
HUGE_WEIGHT = 1e3
# Gradient norms and losses of neighbouring batches differ tenfold; a hundredfold of the usual is no batch's.
HUGE_GROWTH = 100.0
# The last iterations, which are compared with those before.
_LAST = 3


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
        return f"{what} {self.position} of {self.image} is {_box(self.box)}: {self.why}"


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
        number = _many(self.values, "value")
        return f"{self.image} has {number} {self.why}, first {_number(self.value)} at {place}"


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


class BadGradient(NamedTuple):
    """A gradient whose norm is not finite."""

    first: str  # the module at whose output they first were, going backward; "" if at none
    parameters: list[str]  # whose gradient has such values, the last of the network first; may be none


@dataclass(frozen=True)
class Report:
    """What an examination found; see `examine`."""

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

    @property
    def cause(self) -> str:
        """The name of the rule that explains the step: one of `RULES`."""
        return _judge(self)[0]

    @property
    def verdict(self) -> str:
        """The cause in one sentence."""
        return _judge(self)[1]

    def text(self) -> str:
        """Return a page for a person."""
        sections = [[self.verdict], *(lines for lines in (section(self) for section in _SECTIONS) if lines)]
        return "\n\n".join("\n".join(lines) for lines in sections) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Return what strict JSON can hold: numbers that are not finite are "nan", "inf" and "-inf"."""
        facts = {field.name: getattr(self, field.name) for field in fields(self)}
        return _plain({"cause": self.cause, "verdict": self.verdict, **facts})


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value


# The verdict: the first rule that has something to say. Causes come before their symptoms.


def _judge(report: Report) -> tuple[str, str]:
    for name, rule in RULES.items():
        sentence = rule(report)
        if sentence:
            return name, sentence
    raise AssertionError("the last rule always has something to say")


def _not_reproduced(report: Report) -> str | None:
    if report.bad_terms or report.gradient:
        return None
    return (
        f"not reproduced: repeated on this process's batch, the step has finite losses "
        f"({_listed(report.losses)}) and gradients; another process's batch, the order of sums on a GPU, or "
        "the gradient scaler may have made the difference"
    )


def _weights(report: Report) -> str | None:
    if not report.tensors:
        return None
    where = first_few(
        [f"{x.values} of {_many(x.size, 'value')} of the {x.kind} {x.name}" for x in report.tensors], 1
    )
    return f"weights not finite before the step: {where}; the batch is not to blame"


def _pixel(report: Report) -> str | None:
    # An image that is not finite can't give a finite loss; a merely absurd one is blamed if a module failed.
    bad = [x for x in report.pixels if not math.isfinite(x.value) or report.module]
    if not bad:
        return None
    return f"bad pixel: {bad[0]}"


def _annotation(report: Report) -> str | None:
    if report.module:
        return None  # the network failed before any box was looked at
    matched = {(x.image.position, x.matched_index) for x in report.places if x.matched_index is not None}
    bad = [x for x in report.boxes if x.field == "instances"]
    # Where anchors are not known (a model of another kind), any bad box explains a loss that is not finite.
    blamed = [x for x in bad if (x.image.position, x.position) in matched or not report.places]
    if not blamed:
        return None
    return f"bad annotation: {blamed[0]}"


def _diverged(report: Report) -> str | None:
    largest = report.largest_weight
    weight = f"the largest weight is {_number(largest.value)} ({largest.name})"
    rate = f"at learning rate {_number(report.steps[-1].learning_rate)}" if report.steps else "at once"
    for what, values in (
        ("the gradient's norm", [x.gradient_norm for x in report.steps]),
        ("the loss", [sum(x.losses.values()) for x in report.steps]),
    ):
        growth = _growth(values)
        if growth:
            grew = (
                f"grew from {_number(growth[0])} to {_number(growth[1])} {rate} over {len(values)} iterations"
            )
            return f"training diverged: {what} {grew}, and {weight}"
    if largest.value > HUGE_WEIGHT:
        return f"training diverged {rate}: {weight}; above {HUGE_WEIGHT:g} no detector trains"
    return None


def _growth(values: Sequence[float]) -> tuple[float, float] | None:
    """Return what was usual and the last iterations' highest, if that is a hundredfold."""
    values = [x for x in values if math.isfinite(x)]
    if len(values) < 2:
        return None
    last = min(_LAST, len(values) - 1)
    usual, highest = median(values[:-last]), max(values[-last:])
    return (usual, highest) if highest > HUGE_GROWTH * usual > 0 else None


def _half_precision(report: Report) -> str | None:
    module = report.module
    if module is None or module.in_float32 is None or not math.isfinite(module.in_float32):
        return None
    return (
        f"overflow of half precision: in {module.precision} the output of {module.name} ({module.type}) is "
        f"not finite, in float32 it is at most {_number(module.in_float32)}"
    )


def _gradient(report: Report) -> str | None:
    gradient = report.gradient
    if report.bad_terms or gradient is None:
        return None
    overflow = f"overflow of the gradient: the losses are finite ({_listed(report.losses)}), but"
    if not gradient.parameters:
        return f"{overflow} the gradient's values are so large that its norm is not"
    where = f", first at the output of {gradient.first}" if gradient.first else ""
    return f"{overflow} the gradient of {first_few(gradient.parameters, 3)} is not{where}"


def _unknown(report: Report) -> str:
    module = report.module
    if module:
        return (
            f"cause unknown: {module.name} ({module.type}) made {module.values} of {module.size} values not "
            f"finite from finite inputs of at most {_number(module.largest_input)}, with finite weights"
        )
    if report.places:
        return f"cause unknown: {_where(report.places[0])}"
    return (
        f"cause unknown: {first_few(report.bad_terms, 3)} is not finite, and nothing that led to it is wrong"
    )


RULES: dict[str, Callable[[Report], str | None]] = {
    "not_reproduced": _not_reproduced,
    "weights": _weights,
    "pixel": _pixel,
    "annotation": _annotation,
    "diverged": _diverged,
    "half_precision": _half_precision,
    "gradient": _gradient,
    "unknown": _unknown,
}


# The page.


def _losses_section(report: Report) -> list[str]:
    divisor = "" if report.normalizer is None else f"; both divided by {_number(report.normalizer)}"
    return [f"Losses of the step, repeated: {_listed(report.losses)}{divisor}"]


def _inputs_section(report: Report) -> list[str]:
    lines = [f"  {x}" for x in (*report.pixels, *report.boxes)]
    return ["Inputs that are wrong:", *lines] if lines else ["Inputs: pixels and boxes are in order"]


def _weights_section(report: Report) -> list[str]:
    largest = report.largest_weight
    lines = [f"Largest weight: {_number(largest.value)}, of {largest.name}"]
    if not report.tensors:
        return ["Weights and buffers before the step: all finite", *lines]
    listed = [
        f"  {x.kind} {x.name}: {x.values} of {_many(x.size, 'value')}" for x in report.tensors[:_MOST_LINES]
    ]
    return [f"Not finite before the step, {len(report.tensors)} in all:", *listed, *lines]


def _module_section(report: Report) -> list[str]:
    x = report.module
    if x is None:
        return []
    lines = [
        f"First module with finite inputs and other outputs: {x.name} ({x.type})",
        f"  {x.values} of {x.size} values, in {x.precision}; inputs of at most {_number(x.largest_input)}",
    ]
    if x.in_float32 is not None:
        finite = math.isfinite(x.in_float32)
        lines.append(f"  in float32: {f'at most {_number(x.in_float32)}' if finite else 'not finite either'}")
    return lines


def _places_section(report: Report) -> list[str]:
    lines: list[str] = []
    for x in report.places:
        matched = "no box" if x.matched_box is None else f"box {x.matched_index}, {_box(x.matched_box)}"
        lines += [
            _where(x),
            f"  anchor {_box(x.anchor)}, label: {x.label}, matched: {matched}",
            f"  logits {_numbers(x.logits)}",
            f"  deltas {_numbers(x.deltas)}",
        ]
    found = {x.term for x in report.places}
    if report.places or report.module is None:
        lines += [f"{x}: no single anchor's is; their sum is" for x in report.bad_terms if x not in found]
    return lines


def _gradient_section(report: Report) -> list[str]:
    x = report.gradient
    if x is None:
        return [f"Gradients: all finite, of norm {_number(report.gradient_norm)}"]
    if not x.parameters:
        return ["Gradients: all values finite, but not their norm"]
    first = [f"  going backward, first at the output of {x.first}"] if x.first else []
    return [f"Gradients that are not finite: {first_few(x.parameters, 3)}", *first]


def _history_section(report: Report) -> list[str]:
    if not report.steps:
        return []
    terms = list(report.steps[-1].losses)
    lines = ["  ".join(f"{x:>13}" for x in ("iteration", "learning rate", *terms, "gradient norm"))]
    for step in report.steps:
        numbers = [step.learning_rate, *(step.losses.get(x, math.nan) for x in terms), step.gradient_norm]
        lines.append("  ".join(f"{x:>13}" for x in (str(step.iteration), *map(_number, numbers))))
    return ["The last iterations", *lines]


_SECTIONS: tuple[Callable[[Report], list[str]], ...] = (
    _losses_section,
    _inputs_section,
    _weights_section,
    _module_section,
    _places_section,
    _gradient_section,
    _history_section,
)
# Of what may be long; JSON has all.
_MOST_LINES = 10
_MOST_NUMBERS = 12


def _where(place: Place) -> str:
    x, y = place.cell
    count = f"{'' if place.complete else 'at least '}{_many(place.alike, 'anchor')}"
    return (
        f"{place.term} is {_number(place.value)} at {count}, first in {place.image}, level "
        f"{place.level} (stride {place.stride}), cell x {x}, y {y}"
    )


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _number(value: float) -> str:
    return f"{value:.5g}"


def _numbers(values: list[float]) -> str:
    return first_few(map(_number, values), _MOST_NUMBERS, " ")


def _box(box: list[float]) -> str:
    return f"({', '.join(map(_number, box))})"


def _listed(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in losses.items())
