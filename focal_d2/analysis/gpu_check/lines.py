"""What a part of the check returns, and what it is given.

The process that starts the parts imports this module, and no PyTorch: if it used the GPU, a part could not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from focal_d2.analysis.gpu_check.sizes import Sizes

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# The implementation that a GPU is meant for.
FUSED = ("MODEL.FOCAL.LOSS.IMPLEMENTATION", "fused", "MODEL.FOCAL.KERNELS", "on")
REFERENCE = ("MODEL.FOCAL.LOSS.IMPLEMENTATION", "reference", "MODEL.FOCAL.KERNELS", "off")
CHANNELS_LAST = ("MODEL.FOCAL.CHANNELS_LAST", "True")


class Line(NamedTuple):
    """A figure, or the cause why there is none: one line of the table."""

    name: str
    value: float | str | None = None  # None: `problem` says why
    unit: str = ""
    beside: str = ""  # what it is to be compared with
    aim: str = ""
    met: bool | None = None  # whether the value meets the aim; None: there is no aim
    problem: str = ""
    details: Any = None  # for JSON


class Measurement(NamedTuple):
    """A piece of a part that can be left out when time is short."""

    name: str
    run: Callable[[], list[Line]]
    seconds: float = 0.0  # with less time than this it is not started


class Check(NamedTuple):
    """What a part is given; another process can receive it."""

    device: str
    sizes: Sizes
    folder: Path  # for files
    deadline: float  # of this part, as `time.monotonic` counts

    @property
    def cuda(self) -> Any:
        """`torch.cuda`, or what replaces it on a CPU."""
        from focal_d2.analysis.benchmark.cuda import cuda_calls

        return cuda_calls(self.device)

    @property
    def on_gpu(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device != "cpu"

    def seconds_left(self) -> float:
        """Return the time until the part must end."""
        return self.deadline - time.monotonic()

    def config(self, *overrides: str) -> CfgNode:
        """Return the config of the paper's detector, or a small one for rehearsals, with overrides."""
        from focal_d2.engine import load_config

        pairs = ["MODEL.DEVICE", self.device, "MODEL.WEIGHTS", "", *self.sizes.overrides, *overrides]
        return load_config(self.sizes.config, pairs)


class Part(NamedTuple):
    """A part of the check."""

    title: str
    module: str  # of this package; its `measurements(check)` yields them
    seconds: float | None  # its budget; None: what is left
    least: float  # with less time than this it is not started
