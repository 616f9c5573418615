"""Each choice of a new config as a function from measured facts to keys, values and the reason."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from focal_d2.analysis.new.facts import Direction, Facts

# Pixels along the side of a square that a training image may fill: what a device computes in reasonable time.
BUDGETS = {"cpu": 256, "cuda": 1024}
_ABOVE_BUDGET = 1.5  # whole images may be so much longer: they need no crops
# A side that a level finds well, in cells of its stride: two.
_CELLS = 2
# Enlarging images costs time with the square of the factor; P2 costs about as much as this factor.
_MOST_ENLARGED, _INSTEAD_OF_P2 = 2.0, 1.5
# Large objects may shrink until the small ones (10 %) have this side.
_SHRUNK = 24.0
_JITTER = (0.875, 0.9375, 1.0, 1.0625, 1.125)
_MOST_OF_CROP = 0.8  # of a crop's side, for the longest objects (95 %)
_STEP = 32  # pixels: sides of crops are multiples

COLOURS = {"INPUT.FOCAL.BRIGHTNESS": 0.3, "INPUT.FOCAL.CONTRAST": 0.3}
# Signs of an upright direction.
_BRIGHTNESS, _PERSPECTIVE = 0.5, 0.3

_DETECTIONS = 100  # detectron2's limit, of an image
_CANDIDATES = 1000  # and of a level

_WHOLE, _TILE = 2048, 512  # pixels: sides of images that are evaluated whole, and of tiles of larger ones

_LARGEST_BATCH = {"cpu": 4, "cuda": 16}
_OF_MEMORY = 0.5

# Iterations: passes over the images beyond which small sets are learnt by heart, and the least that train
# anything. Neither was measured on other data than the demo's.
_MOST_PASSES, _LEAST_OF_MOST = 300, 1000
FEW_ITERATIONS = 200
_EVALUATIONS = 10
# The learning rate is at most this much below the rate of the lowest loss, and below the recipe's.
_BELOW_BEST, _MOST_LOWERED = 3.0, 5.0
_LEAST_STEPS = 20  # of a range test: the losses of single batches differ by more than a few steps teach
_FOR_EVALUATION = 0.1
_STARTUP = 20.0  # seconds of a training before its first step and after its last


class Choice(NamedTuple):
    """Keys that were chosen together.

    Attributes:
        name: of the choice, two or three words.
        keys: config key -> value.
        reason: a sentence with what was measured.
    """

    name: str
    keys: dict[str, Any]
    reason: str


class Resolution(NamedTuple):
    """How images come to the network.

    Attributes:
        choice: the keys.
        scale: by how much sides are multiplied.
        crop: side of the crops, in pixels of the network's input; None: whole images.
        first_level: 3 or 2, of the pyramid.
    """

    choice: Choice
    scale: float
    crop: int | None
    first_level: int


def choose_resolution(facts: Facts, device: str) -> Resolution:
    """Choose the scale of images, crops, and the finest level, by the sides of objects.

    Small objects (of 10 % the side is below) need two cells of the finest level: 16 pixels for P3, 8 for P2.
    Images larger than the device's budget are cropped, or reduced as far as small objects allow.

    Args:
        facts: of the training images.
        device: "cpu" or "cuda".
    """
    chosen = _resolution_at(facts, device, by_edge=facts.scale_free)
    if not facts.uniform and not facts.scale_free and chosen.scale != 1:
        # No key scales images of different sizes by one factor.
        chosen = _resolution_at(facts, device, by_edge=True)
    return chosen


def _resolution_at(facts: Facts, device: str, *, by_edge: bool) -> Resolution:
    """See `choose_resolution`; `by_edge`: the shorter edge of all images is brought to one length."""
    small, large, long_edge, sizes = _sides(facts, by_edge=by_edge)
    budget, scale, level = BUDGETS[device], 1.0, 3
    needed = _CELLS * 2**3 / small
    if needed > _INSTEAD_OF_P2:
        level = 2
        scale = min(max(1.0, needed / 2), _MOST_ENLARGED)
        why = f"P2 to P6, because two cells of P3 are 16 pixels, and P2 costs less than images × {needed:.1f}"
        if scale > 1:
            why = f"P2 to P6 and images × {scale:.2f}, because two cells of P2 are 8 pixels"
        if needed / 2 > _MOST_ENLARGED:
            why += "; smaller ones will be missed"
    elif needed > 1:
        scale, why = needed, f"images × {needed:.2f}, because two cells of P3 are 16 pixels"
    elif long_edge <= budget * _ABOVE_BUDGET:
        why = "images as they are"
    else:
        scale = min(1.0, max(budget / long_edge, _SHRUNK / small))
        why = f"images × {scale:.2f}: small boxes keep {small * scale:.0f} pixels" if scale < 1 else ""
    if long_edge * scale <= budget * _ABOVE_BUDGET:
        keys = _whole(facts, scale, by_edge=by_edge)
        return Resolution(_resolution(sizes, why, "whole images", keys, level), scale, None, level)
    crop = budget
    if large * scale > _MOST_OF_CROP * crop:
        crop = _round_up(min(large * scale / _MOST_OF_CROP, 2 * budget))
        if large * scale > crop:
            scale = crop / large
            why += f"; reduced to × {scale:.2f}, so that large boxes ({large:.0f} pixels) fit into a crop"
    keys, how = _cropped(facts, scale, crop, by_edge=by_edge)
    what = f"crops of {crop} pixels, {how}; {budget} pixels are what a step on a {device} gets (a guess)"
    return Resolution(_resolution(sizes, why, what, keys, level), scale, crop, level)


def _sides(facts: Facts, *, by_edge: bool) -> tuple[float, float, int, str]:
    """Return the sides of small and of large objects and of images, before they are scaled, and a sentence.

    Where images are brought to one shorter edge, sides are those in an image of the median size.
    """
    small, large = facts.side[0.1], facts.longest[0.95]
    sizes = f"images of {facts.short_edge} × {facts.long_edge} pixels (medians), boxes of {small:.0f} to "
    sizes += f"{facts.side[0.95]:.0f} pixels (10 and 95 %)"
    if not by_edge:
        return small, large, facts.longest_edge, sizes
    edge = facts.short_edge
    small, large = facts.share[0.1] * edge, facts.longest_share[0.95] * edge
    if facts.scale_free:
        sizes += (
            "; boxes vary less in shares of their images than in pixels (standard deviations of logarithms "
            f"{facts.spread[1]:.2f} and {facts.spread[0]:.2f})"
        )
    if not facts.uniform:
        sizes += (
            "; images of different sizes get one shorter edge: at its median, boxes have "
            f"{small:.0f} pixels and more (10 %)"
        )
    return small, large, _longest(facts, 1 / _JITTER[-1]), sizes


def _resolution(sizes: str, why: str, what: str, keys: dict[str, Any], level: int) -> Choice:
    if level == 2:
        keys["MODEL.FOCAL.FPN.LEVELS"] = "p2-p6"
        keys["MODEL.RETINANET.IN_FEATURES"] = [f"p{i}" for i in range(2, 7)]
    return Choice("image size", keys, "; ".join(x for x in (sizes, why.lstrip("; "), what) if x))


def _round_up(side: float) -> int:
    return math.ceil(side / _STEP) * _STEP


def _edges(edge: float) -> list[int]:
    return [round(edge * factor) for factor in _JITTER]


def _test_size(facts: Facts, scale: float, *, by_edge: bool) -> dict[str, Any]:
    if scale == 1 and not by_edge:
        return {"INPUT.MIN_SIZE_TEST": 0}
    edge = round(facts.short_edge * scale)
    return {"INPUT.MIN_SIZE_TEST": edge, "INPUT.MAX_SIZE_TEST": _longest(facts, scale)}


def _longest(facts: Facts, scale: float) -> int:
    """Return the longest side after a resize by the shorter edge; nearly the most elongated images decide."""
    longer, shorter = np.maximum(facts.heights, facts.widths), np.minimum(facts.heights, facts.widths)
    ratio = float(np.quantile(longer / shorter, 0.95))
    return math.ceil(facts.short_edge * scale * _JITTER[-1] * ratio)


def _whole(facts: Facts, scale: float, *, by_edge: bool) -> dict[str, Any]:
    if scale == 1 and not facts.uniform and not by_edge:
        return {
            "INPUT.MIN_SIZE_TRAIN": [0],
            "INPUT.FOCAL.SCALE_JITTER": [_JITTER[0], 1.0],
            **_test_size(facts, scale, by_edge=by_edge),
        }
    return {
        "INPUT.MIN_SIZE_TRAIN": _edges(facts.short_edge * scale),
        "INPUT.MAX_SIZE_TRAIN": _longest(facts, scale),
        **_test_size(facts, scale, by_edge=by_edge),
    }


def _cropped(facts: Facts, scale: float, crop: int, *, by_edge: bool) -> tuple[dict[str, Any], str]:
    """Return the keys of crops, and where they are placed: at random if most hold boxes anyway."""
    in_files = round(crop / scale)
    boxes = facts.boxes_per_pixel * in_files**2
    if boxes >= 1 and not by_edge:
        keys = {
            "INPUT.CROP.ENABLED": True,
            "INPUT.CROP.TYPE": "absolute",
            "INPUT.CROP.SIZE": [in_files, in_files],
            "INPUT.MIN_SIZE_TRAIN": _edges(crop),
            **_test_size(facts, scale, by_edge=by_edge),
        }
        return keys, f"anywhere (they hold {boxes:.1f} boxes on average)"
    keys = {"INPUT.FOCAL.BOX_CROP.SIZE": [crop, crop], **_test_size(facts, scale, by_edge=by_edge)}
    if scale == 1 and not by_edge:
        keys |= {"INPUT.MIN_SIZE_TRAIN": [0], "INPUT.FOCAL.SCALE_JITTER": [_JITTER[0], _JITTER[-1]]}
    else:
        keys |= {
            "INPUT.MIN_SIZE_TRAIN": _edges(facts.short_edge * scale),
            "INPUT.MAX_SIZE_TRAIN": _longest(facts, scale),
        }
    return keys, f"half of them around a box (others hold {boxes:.2g} boxes on average)"


def choose_flips(
    facts: Facts, direction: Direction | None, *, from_above: bool, evidence: str
) -> list[Choice]:
    """Choose flips by what the class names, the pixels and the boxes show of directions.

    Args:
        facts: of the training images.
        direction: signs of an upright direction; None: too few images.
        from_above: whether the images are tiles of larger pictures, or lie on a map.
        evidence: what shows that.
    """
    written = [name for name in facts.counts if len(name) == 1 or name.isdecimal()]
    words = {name: set(re.split("[^a-z]+", name.lower())) for name in facts.counts}
    sided = [name for name in facts.counts if words[name] & {"left", "right"}]
    symmetric = not sided and (len(written) < len(facts.counts) or len(written) == 1)
    if symmetric:
        reason = "no class name is a letter, a number, left or right: mirrored objects are likely (a guess)"
    else:
        names = ", ".join((sided or written)[:3])
        reason = f"off, because class names ({names}) may mean letters, numbers or sides (a guess)"
    horizontal = Choice(
        "horizontal flips", {"INPUT.RANDOM_FLIP": "horizontal" if symmetric else "none"}, reason
    )
    signs, upright = "there are too few images to judge a direction by pixels", True
    if direction is not None:
        upright = abs(direction.brightness) > _BRIGHTNESS or abs(direction.perspective) > _PERSPECTIVE
        signs = (
            f"the upper third of images is {abs(direction.brightness):.2f} standard deviations "
            f"{'brighter' if direction.brightness >= 0 else 'darker'} than the lower third, and the "
            f"correlation of a box's side with its place from top to bottom is {direction.perspective:+.2f} "
            f"({'a sign' if upright else 'no sign'} of an upright direction; limits {_BRIGHTNESS} and "
            f"{_PERSPECTIVE})"
        )
    vertical = from_above and not upright and symmetric
    if vertical:
        reason = f"{evidence}, as of pictures from above (a guess); {signs}"
    elif from_above:
        reason = f"off: {evidence}, but {signs if symmetric else 'class names may have a direction'}"
    else:
        reason = (
            f"off: nothing shows pictures from above; {signs}. Turn it on for aerial or microscope pictures"
        )
    return [horizontal, Choice("vertical flips", {"INPUT.FOCAL.VERTICAL_FLIP": vertical}, reason)]


def choose_negatives(facts: Facts) -> Choice:
    """Train on images without boxes if there are any."""
    if not facts.negatives:
        return Choice("images without boxes", {}, "")
    reason = (
        f"{facts.negatives} of {facts.images} images to train on have no box; training on them reduces "
        "false alarms"
    )
    return Choice("images without boxes", {"DATALOADER.FILTER_EMPTY_ANNOTATIONS": False}, reason)


def choose_limits(most_boxes: int) -> Choice:
    """Raise the limits on detections if an image has more boxes.

    Args:
        most_boxes: in an image, of all sets.
    """
    if most_boxes <= _DETECTIONS:
        return Choice("detections", {}, "")
    detections = _round_to(1.5 * most_boxes, 100)
    keys = {
        "TEST.DETECTIONS_PER_IMAGE": detections,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": max(_CANDIDATES, 5 * detections),
    }
    return Choice("detections", keys, f"an image has {most_boxes} boxes; detectron2's limit is {_DETECTIONS}")


def choose_tiles(longest_edge: int, resolution: Resolution, large: float) -> Choice:
    """Detect in tiles where images of evaluation are too large to be computed whole.

    Args:
        longest_edge: of the images to validate and to test on.
        resolution: of training.
        large: the longer side of large objects, in pixels.
    """
    if longest_edge <= _WHOLE or resolution.scale != 1 or resolution.crop is None:
        return Choice("tiles", {}, "")
    overlap = min(max(_TILE // 4, _round_to(large, _STEP)), _TILE // 2)
    keys = {
        "TEST.FOCAL.TILES.ENABLED": True,
        "TEST.FOCAL.TILES.WINDOW": _TILE,
        "TEST.FOCAL.TILES.OVERLAP": overlap,
    }
    reason = (
        f"images of evaluation have up to {longest_edge} pixels, and whole ones of more than {_WHOLE} take "
        f"much memory; tiles overlap by {overlap} pixels, as boxes have up to {large:.0f} (95 %)"
    )
    return Choice("tiles", keys, reason)


def _round_to(value: float, step: int) -> int:
    return math.ceil(value / step) * step


def anchor_shape(facts: Facts) -> tuple[int, int, str]:
    """Choose the numbers of anchor sizes and of aspect ratios of a cell, and why."""
    low, high = facts.aspect
    spread = f"height / width is {low:.2f} to {high:.2f} (5 and 95 %)"
    return (2, 3, spread) if high / low > 4 else (3, 1, spread)


def choose_batch(bytes_of: Mapping[int, int], available: int | None, images: int, device: str) -> Choice:
    """Choose the largest batch that half of the free memory holds.

    Args:
        bytes_of: batch -> bytes of a training step, by the doctor's estimate.
        available: bytes of free memory of the device; None: unknown.
        images: to train on.
        device: "cpu" or "cuda".
    """
    most = _LARGEST_BATCH[device]
    fitting = [
        batch
        for batch, size in sorted(bytes_of.items())
        if batch <= min(most, images) and (available is None or size <= _OF_MEMORY * available)
    ]
    batch = fitting[-1] if fitting else min(bytes_of)
    free = "unknown" if available is None else f"{available / 1e9:.1f} GB"
    reason = (
        f"a step of {batch} takes an estimated {bytes_of[batch] / 1e9:.2f} GB; free memory is {free}, "
        f"of which half may be used; at most {most} ({device}"
        + (": larger batches are not faster, and fewer steps learn less)" if device == "cpu" else ")")
    )
    return Choice("batch", {"SOLVER.IMS_PER_BATCH": batch}, reason)


def batches(device: str) -> list[int]:
    """Return the batches to choose among: powers of two, from two images on."""
    return [2**i for i in range(1, int(math.log2(_LARGEST_BATCH[device])) + 1)]


def choose_rate(rates: Sequence[float], losses: Sequence[float], recipe: float) -> Choice:
    """Choose the learning rate: the recipe's, unless a range test shows that it is too high.

    A short test is noisy, so that it may lower the rate to a fifth at most.

    Args:
        rates: of the steps of the test, ascending.
        losses: of each step; the test ended if they are fewer, because the loss was not finite or had risen.
        recipe: the recipe's rate.
    """
    if len(losses) < _LEAST_STEPS:
        reason = f"the recipe's; a range test needs {_LEAST_STEPS} steps, and {len(losses)} steps are too few"
        return Choice("learning rate", {"SOLVER.BASE_LR": recipe}, reason)
    best = rates[lowest_loss(losses)]
    rate = float(f"{min(recipe, max(best / _BELOW_BEST, recipe / _MOST_LOWERED)):.2g}")
    reason = (
        f"the recipe's is {recipe:g}; in a range test of {len(losses)} steps from {rates[0]:g} up, the "
        f"smoothed loss was lowest at {best:.2g}, a third of which is {best / _BELOW_BEST:.2g}: "
        + ("the recipe's is kept" if rate >= recipe else "it is lowered, to a fifth at most")
    )
    return Choice("learning rate", {"SOLVER.BASE_LR": rate}, reason)


def lowest_loss(losses: Sequence[float]) -> int:
    """Return the step after which the smoothed loss was lowest.

    Args:
        losses: of each step, at least one.
    """
    average, lowest, at = 0.0, math.inf, 0
    for i, loss in enumerate(losses):
        average = 0.8 * average + 0.2 * loss
        smoothed = average / (1 - 0.8 ** (i + 1))
        if smoothed < lowest:
            lowest, at = smoothed, i
    return at


def choose_schedule(
    *,
    minutes: float,
    seconds: float,
    batch: int,
    images: int,
    evaluation: float,
    timed: str,
) -> Choice:
    """Choose the iterations that the time allows, and what depends on their number.

    Args:
        minutes: of the whole training.
        seconds: of an iteration, measured.
        batch: images of an iteration.
        images: to train on.
        evaluation: seconds of an evaluation of the validation set, estimated from a few of its images.
        timed: what was timed, for the reason.
    """
    total = max(minutes * 60 - _STARTUP, 0.5 * minutes * 60)
    evaluations = max(1, min(_EVALUATIONS, int(_FOR_EVALUATION * total / max(evaluation, 1e-3))))
    within = max(1, int((total - evaluations * evaluation) / seconds))
    most = max(_LEAST_OF_MOST, round(_MOST_PASSES * images / batch))
    iterations = _round_down(min(within, most))
    evaluations = min(evaluations, iterations)
    passes = iterations * batch / images
    reason = (
        f"{timed}: {seconds:.2g} s an iteration and {evaluation:.2g} s an evaluation, so {minutes:g} minutes "
        f"are {within} iterations with {evaluations} evaluation{'' if evaluations == 1 else 's'}"
    )
    if most < within:
        reason += f"; no more than {_MOST_PASSES} passes over {images} images, or {_LEAST_OF_MOST} (a guess)"
    reason += f"; {passes:.2g} passes over the images"
    if iterations < FEW_ITERATIONS:
        reason += f"; fewer than {FEW_ITERATIONS} iterations teach little: give more --minutes"
    keys: dict[str, Any] = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.WARMUP_ITERS": min(max(iterations // 20, 1), 1000),
        "SOLVER.CHECKPOINT_PERIOD": max(1, iterations // evaluations),
        "TEST.EVAL_PERIOD": max(1, iterations // evaluations),
    }
    if iterations >= FEW_ITERATIONS:
        keys["SOLVER.FOCAL.EMA"] = min(0.9998, round(1 - 10 / iterations, 4))
    return Choice("iterations", keys, reason)


def _round_down(iterations: int) -> int:
    """Keep two digits, and three of numbers above 100."""
    step = 10 ** max(0, len(str(iterations)) - 2)
    return max(1, iterations // step * step)
