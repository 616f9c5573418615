"""Communication between the processes of a job, apart from gradients and losses."""

from __future__ import annotations

import functools
import re
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed

from focal_d2.errors import UserError


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return, for each flag, whether it is set in any process."""
    if comm.get_world_size() == 1:
        return flags
    numbers = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=_cpu_group())
    return tuple(x > 0 for x in numbers.tolist())


@functools.cache
def _cpu_group() -> Any:
    """Return the group of all processes that communicates through the CPU."""
    if distributed.get_backend() == "gloo":
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo")


# Messages of Gloo, NCCL and PyTorch's store about a process that ended.
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|remote process|ncclRemoteError|"
    r"socket (closed|timeout)|timed out waiting|wait timeout|gloo.*(error|timed out)",
    re.IGNORECASE,
)


def peer_is_lost(error: BaseException) -> bool:
    """Return whether an error means that another process of the job ended."""
    return (
        comm.get_world_size() > 1 and isinstance(error, RuntimeError) and bool(_PEER_LOST.search(str(error)))
    )


def check_backend(device: str) -> None:
    """Check that processes can exchange tensors on a device.

    Raises:
        UserError: for the CPU of a machine with GPUs, for which detectron2's launcher chooses NCCL.
    """
    if comm.get_world_size() > 1 and device == "cpu" and distributed.get_backend() == "nccl":
        raise UserError(
            "MODEL.DEVICE is cpu, but detectron2's launcher connects processes by their GPUs: start them "
            "with torchrun, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
