"""Findings of checks: what was found, where, and how to correct it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from focal_d2.data.checks.kinds import KINDS


class Example(NamedTuple):
    """An image, and maybe a box in it, that a finding is about."""

    file_name: str
    text: str = ""
    box: tuple[float, ...] | None = None  # left, top, width, height in pixels, as annotated

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file_name, self.text) if part)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, which has no NaN and no infinity."""
        box = self.box and [x if math.isfinite(x) else None for x in self.box]
        return {**self._asdict(), "box": box}


class Fix(NamedTuple):
    """A line for the config; without a key, advice that no single line gives."""

    why: str
    key: str = ""
    value: Any = None


@dataclass(frozen=True)
class Finding:
    """A mistake, or a fact worth a line.

    Attributes:
        code: one of `KINDS`.
        message: what was found, with its numbers.
        dataset: the one it is about; "" for several, or for the config.
        count: of images, boxes or classes concerned.
        examples: the worst, or the first.
        fixes: lines for the config.
    """

    code: str
    message: str
    dataset: str = ""
    count: int = 1
    examples: Sequence[Example] = ()
    fixes: Sequence[Fix] = ()

    @property
    def severity(self) -> str:
        """One of `SEVERITIES`."""
        return KINDS[self.code].severity

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return KINDS[self.code].remedy

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "code": self.code,
            "severity": self.severity,
            "dataset": self.dataset,
            "message": self.message,
            "count": self.count,
            "remedy": self.remedy,
            "examples": [example.as_dict() for example in self.examples],
            "fixes": [fix._asdict() for fix in self.fixes],
        }


def share(part: int, whole: int) -> str:
    """Say "3 of 1200 (0.2 %)", never 0 % of something nor 100 % of less than all.

    Examples:
        >>> share(3, 12000), share(11999, 12000), share(12, 12)
        ('3 of 12000 (< 0.1 %)', '11999 of 12000 (> 99.9 %)', '12 of 12')
    """
    if part in (0, whole):
        return f"{part} of {whole}"
    percent = 100 * part / whole
    text = "< 0.1" if percent < 0.05 else "> 99.9" if percent >= 99.95 else f"{percent:.1f}"
    return f"{part} of {whole} ({text} %)"
