"""Numbers, boxes and losses as texts for reports."""

from __future__ import annotations

from focal_d2.errors import first_few

# Limit on the numbers in a line; report.json has all of them.
_MOST_NUMBERS = 12


def number(value: float) -> str:
    """Write five digits."""
    return f"{value:.5g}"


def numbers(values: list[float]) -> str:
    """Write the first of several numbers, and how many more there are."""
    return first_few(map(number, values), _MOST_NUMBERS, " ")


def many(count: int, what: str) -> str:
    """Write a count with its noun: "1 value", "2 values"."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def box_text(box: list[float]) -> str:
    """Write a box's four numbers in brackets."""
    return f"({', '.join(map(number, box))})"


def loss_list(losses: dict[str, float]) -> str:
    """Write each loss's name and value."""
    return ", ".join(f"{name} {number(value)}" for name, value in losses.items())
