"""The verdict on a step that was not finite: the first rule that explains it.

Rules for causes come before rules for symptoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from focal_d2.engine.nonfinite.facts import Facts
from focal_d2.engine.nonfinite.texts import loss_list, many, number
from focal_d2.errors import first_few

# Weights of a detector that trains are far smaller; those of a trained ResNet stay below 20.
HUGE_WEIGHT = 1e3
# Gradient norms and losses of successive batches differ by a factor of 10 at most. A factor of 100 has
# another cause than the batch.
HUGE_GROWTH = 100.0
# The last iterations, which are compared with those before.
_LAST = 3


def judge(facts: Facts) -> tuple[str, str]:
    """Return the name of the first rule that explains the step, and its sentence."""
    for name, rule in RULES.items():
        sentence = rule(facts)
        if sentence:
            return name, sentence
    raise AssertionError("the last rule explains every step")


def _not_reproduced(facts: Facts) -> str | None:
    if facts.bad_terms or facts.gradient:
        return None
    return (
        f"not reproduced: repeated on this process's batch, the step has finite losses "
        f"({loss_list(facts.losses)}) and gradients; another process's batch, the order of sums on a GPU, or "
        "the gradient scaler may have made the difference"
    )


def _weights(facts: Facts) -> str | None:
    if not facts.tensors:
        return None
    where = first_few(
        [f"{x.values} of {many(x.size, 'value')} of the {x.kind} {x.name}" for x in facts.tensors], 1
    )
    return f"weights not finite before the step: {where}; the batch is not to blame"


def _pixel(facts: Facts) -> str | None:
    # Pixels that are not finite always explain the step; pixels that are only too large, if a module failed.
    bad = [x for x in facts.pixels if not math.isfinite(x.value) or facts.module]
    if not bad:
        return None
    return f"bad pixel: {bad[0]}"


def _annotation(facts: Facts) -> str | None:
    if facts.module:
        return None  # the network failed before the losses read the boxes
    matched = {(x.image.position, x.matched_index) for x in facts.anchors if x.matched_index is not None}
    bad = [x for x in facts.boxes if x.field == "instances"]
    # If anchors were not examined (another kind of model), any bad box explains a loss that is not finite.
    blamed = [x for x in bad if (x.image.position, x.position) in matched or not facts.anchors]
    if not blamed:
        return None
    return f"bad annotation: {blamed[0]}"


def _diverged(facts: Facts) -> str | None:
    largest = facts.largest_weight
    weight = f"the largest weight is {number(largest.value)} ({largest.name})"
    rate = f"at learning rate {number(facts.steps[-1].learning_rate)}" if facts.steps else "at once"
    for what, values in (
        ("the gradient's norm", [x.gradient_norm for x in facts.steps]),
        ("the loss", [sum(x.losses.values()) for x in facts.steps]),
    ):
        growth = _growth(values)
        if growth:
            grew = (
                f"grew from {number(growth[0])} to {number(growth[1])} {rate} over {len(values)} iterations"
            )
            return f"training diverged: {what} {grew}, and {weight}"
    if largest.value > HUGE_WEIGHT:
        return f"training diverged {rate}: {weight}; above {HUGE_WEIGHT:g} no detector trains"
    return None


def _growth(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the median and the last iterations' highest value, if that is 100 times the median."""
    values = [x for x in values if math.isfinite(x)]
    if len(values) < 2:
        return None
    last = min(_LAST, len(values) - 1)
    usual, highest = median(values[:-last]), max(values[-last:])
    return (usual, highest) if highest > HUGE_GROWTH * usual > 0 else None


def _half_precision(facts: Facts) -> str | None:
    module = facts.module
    if module is None or module.in_float32 is None or not math.isfinite(module.in_float32):
        return None
    return (
        f"overflow of half precision: in {module.precision} the output of {module.name} ({module.type}) is "
        f"not finite, in float32 it is at most {number(module.in_float32)}"
    )


def _gradient(facts: Facts) -> str | None:
    gradient = facts.gradient
    if facts.bad_terms or gradient is None:
        return None
    overflow = f"overflow of the gradient: the losses are finite ({loss_list(facts.losses)}), but"
    if not gradient.parameters:
        return f"{overflow} the gradient's values are so large that its norm is not"
    where = f", first at the output of {gradient.first}" if gradient.first else ""
    return f"{overflow} the gradient of {first_few(gradient.parameters, 3)} is not{where}"


def _unknown(facts: Facts) -> str:
    module = facts.module
    if module:
        return (
            f"cause unknown: {module.name} ({module.type}) made {module.values} of {module.size} values not "
            f"finite from finite inputs of at most {number(module.largest_input)}, with finite weights"
        )
    if facts.anchors:
        return f"cause unknown: {facts.anchors[0]}"
    return (
        f"cause unknown: {first_few(facts.bad_terms, 3)} is not finite, and nothing that led to it is wrong"
    )


RULES: dict[str, Callable[[Facts], str | None]] = {
    "not_reproduced": _not_reproduced,
    "weights": _weights,
    "pixel": _pixel,
    "annotation": _annotation,
    "diverged": _diverged,
    "half_precision": _half_precision,
    "gradient": _gradient,
    "unknown": _unknown,
}
