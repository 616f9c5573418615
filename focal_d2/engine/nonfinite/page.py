"""The page of text about a step that was not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

from focal_d2.engine.nonfinite.facts import Facts
from focal_d2.engine.nonfinite.texts import box_text, loss_list, many, number, numbers
from focal_d2.errors import escaped, first_few

# Limit on the lines about weights; report.json has all of them.
_MOST_LINES = 10


def page(facts: Facts, verdict: str) -> str:
    """Write the page: the verdict, and a paragraph for each kind of fact."""
    sections = [[verdict], *(lines for lines in (section(facts) for section in _SECTIONS) if lines)]
    return "\n\n".join("\n".join(map(escaped, lines)) for lines in sections) + "\n"


def _losses_section(facts: Facts) -> list[str]:
    divisor = "" if facts.normalizer is None else f"; both divided by {number(facts.normalizer)}"
    return [f"Losses of the step, repeated: {loss_list(facts.losses)}{divisor}"]


def _inputs_section(facts: Facts) -> list[str]:
    lines = [f"  {x}" for x in (*facts.pixels, *facts.boxes)]
    return ["Inputs that are wrong:", *lines] if lines else ["Inputs: pixels and boxes are in order"]


def _weights_section(facts: Facts) -> list[str]:
    largest = facts.largest_weight
    lines = [f"Largest weight: {number(largest.value)}, of {largest.name}"]
    if not facts.tensors:
        return ["Weights and buffers before the step: all finite", *lines]
    listed = [
        f"  {x.kind} {x.name}: {x.values} of {many(x.size, 'value')}" for x in facts.tensors[:_MOST_LINES]
    ]
    return [f"Not finite before the step, {len(facts.tensors)} in all:", *listed, *lines]


def _module_section(facts: Facts) -> list[str]:
    x = facts.module
    if x is None:
        return []
    lines = [
        f"First module with finite inputs and outputs that are not finite: {x.name} ({x.type})",
        f"  {x.values} of {x.size} values, in {x.precision}; inputs of at most {number(x.largest_input)}",
    ]
    if x.in_float32 is not None:
        finite = math.isfinite(x.in_float32)
        lines.append(f"  in float32: {f'at most {number(x.in_float32)}' if finite else 'not finite either'}")
    return lines


def _anchors_section(facts: Facts) -> list[str]:
    lines: list[str] = []
    for x in facts.anchors:
        matched = "no box" if x.matched_box is None else f"box {x.matched_index}, {box_text(x.matched_box)}"
        lines += [
            str(x),
            f"  anchor {box_text(x.anchor)}, label: {x.label}, matched: {matched}",
            f"  logits {numbers(x.logits)}",
            f"  deltas {numbers(x.deltas)}",
        ]
    located = {x.term for x in facts.anchors}
    if facts.anchors or facts.module is None:
        lines += [
            f"{x}: the loss of each anchor is finite, but not their sum"
            for x in facts.bad_terms
            if x not in located
        ]
    return lines


def _gradient_section(facts: Facts) -> list[str]:
    x = facts.gradient
    if x is None:
        return [f"Gradients: all finite, of norm {number(facts.gradient_norm)}"]
    if not x.parameters:
        return ["Gradients: all values finite, but not their norm"]
    first = [f"  in the backward pass, first at the output of {x.first}"] if x.first else []
    return [f"Gradients that are not finite: {first_few(x.parameters, 3)}", *first]


def _history_section(facts: Facts) -> list[str]:
    if not facts.steps:
        return []
    terms = list(facts.steps[-1].losses)
    lines = ["  ".join(f"{x:>13}" for x in ("iteration", "learning rate", *terms, "gradient norm"))]
    for step in facts.steps:
        row = [step.learning_rate, *(step.losses.get(x, math.nan) for x in terms), step.gradient_norm]
        lines.append("  ".join(f"{x:>13}" for x in (str(step.iteration), *map(number, row))))
    return ["The last iterations", *lines]


_SECTIONS: tuple[Callable[[Facts], list[str]], ...] = (
    _losses_section,
    _inputs_section,
    _weights_section,
    _module_section,
    _anchors_section,
    _gradient_section,
    _history_section,
)
