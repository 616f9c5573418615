"""A step's time and memory over one field of the setting after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

from focal_d2.analysis.benchmark.memory import step_memory
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.analysis.benchmark.step import time_step

# The values of each field.
SWEEP = {
    "size": (128, 256, 384, 512),
    "batch": (1, 2, 4, 8),
    "classes": (1, 20, 80, 365, 1203),
    "boxes": (1, 10, 100, 1000),
}


def sweep_fields(cfg: CfgNode, setting: Setting) -> Iterator[dict[str, Any]]:
    """Measure a step's time and memory while one field of the setting after another varies (see `SWEEP`).

    Args:
        cfg: full config of ours.
        setting: the values of the other fields.

    Yields:
        The field, its value and the figures.
    """
    for field, choices in SWEEP.items():
        for value in choices:
            at = setting._replace(**{field: value})  # type: ignore[arg-type]
            (step,), memory = time_step(cfg, at), step_memory(cfg, at)
            kept = {k: v for k, v in memory._asdict().items() if k.endswith("_bytes")}
            yield {"field": field, "value": value, **step._replace(**kept).as_dict()}
