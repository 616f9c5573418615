"""Legal values of keys, each as a test and in words. No range holds NaN or infinity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from focal_d2.errors import UserError, one_line


class Range(NamedTuple):
    """The legal values of a key."""

    words: str  # follows "KEY is VALUE; "
    holds: Callable[[Any], bool]
    each: str = ""  # the same of each value in a list, of a range of numbers


_TECHNICAL = 10**6  # larger upper limits are technical and not shown in messages

# Texts and flags, whose type yacs checks, and what other code checks: comments say which.
ANYTHING = Range("", lambda value: True)


def _is_finite(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


# What other code checks, but for NaN and infinity.
FINITE = Range("it must be finite", _is_finite)


def number(
    *,
    least: float = -math.inf,
    most: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    note: str = "",
) -> Range:
    """Return a range of finite numbers.

    Args:
        least: lower limit that is legal itself.
        most: upper limit that is legal itself.
        above: lower limit that is not legal.
        below: upper limit that is not legal.
        note: what a special value means.
    """

    def holds(value: Any) -> bool:
        is_number = type(value) in (int, float) and math.isfinite(value)
        return is_number and least <= value <= most and above < value < below

    return _numbers("number", holds, least, most, above, below, note)


def whole(least: int, most: int, *, note: str = "") -> Range:
    """Return the whole numbers from `least` to `most`; `note` says what a special value means."""

    def holds(value: Any) -> bool:
        return type(value) is int and least <= value <= most

    return _numbers("whole number", holds, least, most, -math.inf, math.inf, note)


def _numbers(
    noun: str,
    holds: Callable[[Any], bool],
    least: float,
    most: float,
    above: float,
    below: float,
    note: str,
) -> Range:
    limits = [("at least", least), ("above", above), ("at most", most), ("below", below)]
    texts = [f"{words} {_shown(limit)}" for words, limit in limits if math.isfinite(limit)]
    if math.isfinite(least) and most < _TECHNICAL:
        texts = [f"within {_shown(least)} and {_shown(most)}"]
    text = " and ".join(texts)
    each = f"{noun}s, each {text}" if text else f"finite {noun}s"
    return Range(f"it must be {text or f'a finite {noun}'}{note and f' ({note})'}", holds, each)


def _shown(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def one_of(*choices: Any) -> Range:
    """Return a range of single values."""
    return Range(f"legal values: {', '.join(map(str, choices))}", lambda value: value in choices)


def either(first: Range, second: Range) -> Range:
    """Return the union of two ranges."""
    words = f"{first.words}; or {second.words}"
    return Range(words, lambda value: first.holds(value) or second.holds(value))


def list_of(item: Range, *, length: int | None = None, may_be_empty: bool = False, order: str = "") -> Range:
    """Return the lists of numbers of a range; yacs makes tuples of some of them.

    Args:
        item: of each number.
        length: how many there must be; None: at least 1.
        may_be_empty: let [] be legal as well.
        order: "ascending", "not descending" (with equal neighbours) or "" (any).
    """

    def holds(value: Any) -> bool:
        if not isinstance(value, (list, tuple)) or not all(map(item.holds, value)):
            return False
        pairs = itertools.pairwise(value)
        if order and not all(a < b or (a == b and order == "not descending") for a, b in pairs):
            return False
        return (may_be_empty and not value) or (len(value) > 0 and length in (None, len(value)))

    count = "" if length is None else f"{length} "
    words = f"it must be a list of {count}{item.each}{order and f', {order}'}"
    return Range(words + ", or []" * may_be_empty, holds)


def lists_of(item: Range) -> Range:
    """Return the lists of numbers of a range, and the lists of such lists; none is empty."""
    flat = list_of(item)

    def holds(value: Any) -> bool:
        lists = isinstance(value, (list, tuple)) and len(value) > 0
        return flat.holds(value) or (lists and all(map(flat.holds, value)))

    return Range(f"{flat.words}, or a list of such lists; none can be empty", holds)


def check_value(key: str, value: Any, range: Range) -> None:
    """Check the value of a key.

    Raises:
        UserError: naming the key, the value and the legal ones.
    """
    if not range.holds(value):
        shown = one_line(f'"{value}"' if isinstance(value, str) else value)
        raise UserError(f"{key} is {shown}; {range.words}")
