"""What a benchmark times, and on what hardware."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from typing import Any, NamedTuple

import detectron2
import torch

# Of the head's output, and of backbone and head under autocast.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(DTYPES)


class Setting(NamedTuple):
    """The sizes, device and precision of a measurement."""

    device: str
    size: int  # pixels, the height of an image, and its width unless `width` is another
    batch: int  # N
    classes: int  # K
    boxes: int  # an image
    repeats: int
    precision: str  # of `PRECISIONS`: ours; detectron2's too on CUDA, on a CPU it has fp32 only
    width: int | None = None  # pixels

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        return self.size, self.size if self.width is None else self.width

    @property
    def dtype(self) -> torch.dtype:
        """The type of the head's output."""
        return DTYPES[self.precision]


def hardware(device: str) -> dict[str, Any]:
    """Say what the figures were measured on."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines: list[str] = []
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }


def keep_memory() -> bool:
    """Let the C library keep freed memory instead of giving it back to the system: a warm allocator.

    Without it, most of the time of a big temporary on a CPU is the system's, clearing its pages. Returns
    whether the library has the call (glibc has).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
