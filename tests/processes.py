"""Two Gloo processes for tests, as detectron2's `launch` starts them, without its two chances to fail.

`launch(dist_url="auto")` takes a free port that another test may take first. Its processes also leave while
others may still use their connections, which ends those with SIGABRT.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm

PROCESSES = 2


def run_in_processes(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """Call `function(folder, *args)` in each of two processes of a Gloo group; an error in one is raised."""
    torch.multiprocessing.spawn(_run, (function, folder, args), nprocs=PROCESSES)


def _run(rank: int, function: Callable[..., None], folder: Path, args: tuple[Any, ...]) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    comm.create_local_process_group(PROCESSES)
    function(folder, *args)
    comm.synchronize()
    torch.distributed.destroy_process_group()
