"""Seconds of several functions that take turns, the peak of allocated memory, and a row of results."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.detectron2_compat import allocations

# Bytes copied to measure a GPU's bandwidth.
_COPIED = 1 << 30


class Row(NamedTuple):
    """Medians in seconds, and bytes allocated at the peak beyond those at the start; None: not measured."""

    name: str
    ours: float | None = None
    detectron2: float | None = None
    limit: float | None = None
    limit_is: str = ""
    ours_bytes: int | None = None
    detectron2_bytes: int | None = None
    limit_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and their ratios, for JSON."""
        return {
            **self._asdict(),
            "speedup": _ratio(self.detectron2, self.ours),
            "over_limit": _ratio(self.ours, self.limit),
            "memory_of_detectron2": _ratio(self.ours_bytes, self.detectron2_bytes),
            "memory_over_limit": _ratio(self.ours_bytes, self.limit_bytes),
        }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def timed(name: str, times: dict[str, float], limit_is: str, **peaks: int) -> Row:
    """Make a row from the medians that `take_turns` returned and peaks in bytes."""
    row = Row(name, times["ours"], times["detectron2"], times["limit"], limit_is)
    return row._replace(**peaks)  # type: ignore[arg-type]


def take_turns(runs: dict[str, Callable[[], Any]], setting: Setting) -> dict[str, float]:
    """Median seconds of each, run one after another in alternating order; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(setting.repeats + 1):
        for name in list(runs) if i % 2 else reversed(runs):
            _wait(setting)
            start = time.perf_counter()
            runs[name]()
            _wait(setting)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(setting: Setting) -> None:
    if torch.device(setting.device).type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes that the allocator had given out at once during `run`, beyond those before it."""
    run()  # what stays (caches) is there already
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each start, and that it has no GPU
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    given = peak = 0
    for _, change in sorted(allocations(profiler), key=lambda x: x[0]):
        given += change
        peak = max(peak, given)
    return peak


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that a copy on the device reads and writes, both counted."""
    source = torch.empty(_COPIED // 4, device=setting.device)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, setting)["copy"]
    return 2 * _COPIED / seconds
