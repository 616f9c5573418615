"""The calls that exist on a GPU only, and what replaces them on a CPU.

All such calls of the benchmarks and of `gpu_check` go through `cuda_calls`. So a CPU runs every line of them.
"""

from __future__ import annotations

import os
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from focal_d2.detectron2_compat import allocations
from focal_d2.hardware import cpu_facts


def cuda_calls(device: str) -> Any:
    """Return `torch.cuda` for a CUDA device, and `CpuCalls` for another one."""
    return torch.cuda if torch.device(device).type == "cuda" else CpuCalls()


def select_device(device: str) -> None:
    """Make a numbered device the current one, whose time and memory are taken; "cuda" is the current one."""
    if torch.device(device).index is not None:
        cuda_calls(device).set_device(device)


class _Event:
    """`torch.cuda.Event`: on a CPU all work before it is done when it is recorded."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _Event) -> float:
        """Return milliseconds."""
        return 1000 * (end.seconds - self.seconds)


class CpuCalls:
    """Functions of `torch.cuda` for a CPU: nothing waits, and memory is what the allocator gives out."""

    Event = _Event

    def __init__(self) -> None:
        self._mode: int | str = 0
        self._profiler: profile | None = None

    def synchronize(self) -> None:
        """Do nothing: a CPU has done its work."""

    def is_available(self) -> bool:
        """Return True."""
        return True

    def set_device(self, device: str) -> None:
        """Do nothing."""

    def empty_cache(self) -> None:
        """Do nothing: there is no cache."""

    def set_sync_debug_mode(self, debug_mode: int | str) -> None:
        """Remember the mode. A CPU never waits."""
        self._mode = debug_mode

    def get_sync_debug_mode(self) -> int | str:
        """Return the mode."""
        return self._mode

    def reset_peak_memory_stats(self) -> None:
        """Begin to record what the allocator gives out."""
        if self._profiler is not None:
            self._profiler.stop()
        # The profiler reports each start, and that it has no GPU.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        self._profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profiler.start()

    def memory_allocated(self) -> int:
        """Return 0: the record begins with nothing."""
        return 0

    def max_memory_allocated(self) -> int:
        """Return the most bytes that were given out at once since the last reset, and end the record."""
        if self._profiler is None:
            return 0
        self._profiler.stop()
        given = peak = 0
        for _, change in sorted(allocations(self._profiler), key=lambda x: x[0]):
            given += change
            peak = max(peak, given)
        self._profiler = None
        return peak

    def mem_get_info(self) -> tuple[int, int]:
        """Return the free and all bytes of memory."""
        page = os.sysconf("SC_PAGE_SIZE")
        return page * os.sysconf("SC_AVPHYS_PAGES"), page * os.sysconf("SC_PHYS_PAGES")

    def get_device_properties(self, device: str) -> SimpleNamespace:
        """Return the CPU's name and memory, under the names that a GPU's properties have."""
        return SimpleNamespace(
            name=cpu_facts().get("model name", "CPU"),
            total_memory=self.mem_get_info()[1],
            multi_processor_count=os.cpu_count(),
            major=0,
            minor=0,
        )
