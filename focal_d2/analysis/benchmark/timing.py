"""Seconds of several functions that take turns, the peak of allocated memory, and a row of results."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from focal_d2.analysis.benchmark.cuda import cuda_calls
from focal_d2.analysis.benchmark.setting import Setting

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
    synchronize = cuda_calls(setting.device).synchronize
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(setting.repeats + 1):
        for name in list(runs) if i % 2 else reversed(runs):
            synchronize()
            start = time.perf_counter()
            runs[name]()
            synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def event_seconds(run: Callable[[], Any], device: str, *, calls: int, rounds: int) -> float:
    """Median seconds of a call, timed by the device's events around several calls in a row.

    The host starts a call while the device still computes the one before. So short kernels are timed without
    the host's part, as long as the host is faster.

    Args:
        run: the work.
        device: whose events are recorded.
        calls: between two events.
        rounds: of which the median is taken, after one that warms up.
    """
    cuda = cuda_calls(device)
    seconds = []
    for i in range(rounds + 1):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        cuda.synchronize()
        if i:
            seconds.append(start.elapsed_time(end) / 1000 / calls)
    return statistics.median(seconds)


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes that the allocator had given out at once during `run`, beyond those before it."""
    run()  # what stays (caches) is there already
    cuda = cuda_calls(device)
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    run()
    peak: int = cuda.max_memory_allocated()
    return peak - before


def copy_bandwidth(device: str, *, copied: int = _COPIED) -> float:
    """Bytes a second that a copy of so many bytes on the device reads and writes, both counted."""
    source = torch.empty(copied // 4, device=device)
    target = torch.empty_like(source)
    return 2 * copied / event_seconds(lambda: target.copy_(source), device, calls=5, rounds=5)
