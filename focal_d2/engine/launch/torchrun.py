"""A job as one of the processes that torchrun starts."""

from __future__ import annotations

import argparse
import os
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from focal_d2.errors import UserError

_STARTING = 600.0  # seconds that processes wait for each other


def check_restarts(*, resume: bool) -> None:
    """Check that torchrun's restarts would continue the training.

    Args:
        resume: whether the command has `--resume`.

    Raises:
        UserError: if torchrun may restart the processes, which would then start from the beginning.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if distributed.is_torchelastic_launched() and restarts and not resume:
        raise UserError(
            f"--max-restarts {restarts} of torchrun needs --resume: without it, restarted processes would "
            "start from the beginning. In an OUTPUT_DIR without checkpoints, --resume starts a new training"
        )


def run_under_torchrun(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Join the group of processes that torchrun started, and run a function.

    Args:
        run: called once the group is set up.
        args: of detectron2's `default_argument_parser`.

    Raises:
        UserError: if the machine lacks GPUs for the processes, or some of them do not start.
    """
    if (args.num_gpus, args.num_machines) != (1, 1):
        raise UserError("under torchrun, --nproc-per-node and --nnodes set the number of processes")
    local, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        if ranks > torch.cuda.device_count():
            raise UserError(
                f"--nproc-per-node {ranks}: PyTorch finds {torch.cuda.device_count()} CUDA devices"
            )
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, world = next(rendezvous("env://"))
    if world > 1:
        store = _store_of_this_start(store, rank, world)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    comm.create_local_process_group(ranks)
    run(args)
    leave_group()


def leave_group() -> None:
    """Leave the group of processes when all are done: one that still uses it would end with SIGABRT."""
    comm.synchronize()
    distributed.destroy_process_group()


def _store_of_this_start(store: Any, rank: int, world: int) -> Any:
    """Return a part of torchrun's store that only the processes of this start use.

    torchrun keeps its store when it restarts processes. The store then has the addresses of processes that
    ended, and PyTorch would connect to them. So the first process chooses a random name for this start. Every
    other process asks for it under a random name too, so that the process that replaces one that ended does
    not read the answer to that one.
    """
    this_name = uuid.uuid4().hex
    if rank:
        store.set(f"focal_d2/ask/{rank}", this_name)
        store.wait([f"focal_d2/answer/{this_name}"])
        name = store.get(f"focal_d2/answer/{this_name}").decode()
        store.set(f"focal_d2/heard/{name}/{rank}", "")
        return distributed.PrefixStore(name, store)
    waiting, end = set(range(1, world)), time.monotonic() + _STARTING
    while waiting:
        for other in sorted(waiting):
            if store.check([f"focal_d2/heard/{this_name}/{other}"]):
                waiting.remove(other)
            elif store.check([f"focal_d2/ask/{other}"]):
                # A process that ended may have asked. Its replacement will overwrite the question.
                asker = store.get(f"focal_d2/ask/{other}").decode()
                store.set(f"focal_d2/answer/{asker}", this_name)
        if time.monotonic() > end:
            raise UserError(f"{len(waiting)} of {world} processes did not start in {_STARTING:g} seconds")
        time.sleep(0.02)
    return distributed.PrefixStore(this_name, store)
