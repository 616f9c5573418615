"""The report on a step that was not finite: facts, the verdict on them, a page and JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from focal_d2.engine.nonfinite.facts import Facts
from focal_d2.engine.nonfinite.page import page
from focal_d2.engine.nonfinite.verdict import judge


@dataclass(frozen=True)
class Report(Facts):
    """The result of an examination; see `examine`."""

    @property
    def cause(self) -> str:
        """The name of the rule that explains the step: one of `RULES`."""
        return judge(self)[0]

    @property
    def verdict(self) -> str:
        """The cause in one sentence."""
        return judge(self)[1]

    def text(self) -> str:
        """Return a page for a person."""
        return page(self, self.verdict)

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
