"""A Triton kernel that does next to nothing: whether it runs says whether Triton works on a device.

At its first launch Triton compiles code with a C compiler and Python's header files, which slim images lack.
Only `common.find_kernels` imports this module, where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def run_trial(device: torch.device) -> None:
    """Launch the kernel and wait for it. What Triton or the GPU's driver raises is not caught here.

    Raises:
        RuntimeError: if the kernel ran and its result is wrong.
    """
    x = torch.zeros(1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(x):
        _add_one[(1,)](x)
    if x.item() != 1:
        raise RuntimeError(f"1 was added to 0, and the result is {x.item()}")


@triton.jit
def _add_one(x):
    tl.store(x, tl.load(x) + 1)
