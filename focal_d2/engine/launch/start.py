"""Start the processes of a job."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Callable

import torch
from detectron2.engine import launch
from torch import distributed
from torch.multiprocessing import ProcessExitedException

from focal_d2.console import prepare_output
from focal_d2.engine.launch.signals import SIGNALS, StopRequest, signal_children
from focal_d2.engine.launch.torchrun import leave_group, run_under_torchrun
from focal_d2.errors import UserError, user_message

# Seconds that the processes have after the first signal, to end their iteration or evaluation and save.
_STOPPING = 600.0


def start(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a function in the processes that the command line asks for, or as one of torchrun's.

    Args:
        run: called in each process, whose group is set up.
        args: of `focal_d2.commands.train`.

    Raises:
        UserError: if the processes cannot be started, or one of them ended.
    """
    if distributed.is_torchelastic_launched():
        run_under_torchrun(run, args)
    elif args.num_gpus * args.num_machines == 1:
        run(args)
    else:
        check_devices(args.num_gpus, args.num_machines)
        if args.num_machines > 1 and re.search(r"auto|//(127\.|localhost|\[?::1)", args.dist_url):
            raise UserError(
                f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT with an address of "
                f"machine 0 that the others reach, not {args.dist_url}"
            )
        _launch(run, args)


def check_devices(num_gpus: int, num_machines: int) -> None:
    """Check that there is a GPU for each of several processes or, on a machine without GPUs, a core.

    Raises:
        UserError: if there are more processes.
    """
    if num_gpus < 1 or num_machines < 1:
        raise UserError(f"--num-gpus {num_gpus} --num-machines {num_machines}: both must be at least 1")
    devices, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if num_gpus * num_machines > 1 and num_gpus > (devices or cores):
        available = f"{devices} CUDA devices, and each of several processes needs one"
        if not devices:
            available = f"no CUDA device, and {cores} cores for at most as many processes"
        raise UserError(f"--num-gpus {num_gpus} --num-machines {num_machines}: PyTorch finds {available}")


def _launch(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    limit = threading.Timer(_STOPPING, _end_children)
    limit.daemon = True

    def pass_on(_: int) -> None:
        signal_children(signal.SIGTERM)
        limit.start()

    with StopRequest(pass_on) as stop:
        try:
            launch(
                _run_in_child,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(run, args),
            )
        except ProcessExitedException as error:
            if stop.number is not None or error.exit_code in (128 + n for n in SIGNALS):
                raise SystemExit(128 + (stop.number or error.exit_code - 128)) from None
            how = error.signal_name or f"exit status {error.exit_code}"
            raise UserError(
                f"process {error.error_index} of {args.num_gpus} ended with {how}, and the job with it; "
                "--resume continues from the last checkpoint"
            ) from error
        finally:
            limit.cancel()
    if stop.number is not None:
        raise SystemExit(128 + stop.number)


def _end_children() -> None:
    text = f"a process did not end within {_STOPPING:g} seconds, and all are killed; --resume continues\n"
    os.write(2, text.encode())
    signal_children(signal.SIGKILL)


def _run_in_child(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    prepare_output()
    try:
        run(args)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        # The parent process shows the last line of a child's exception.
        raise UserError(message) from None
    leave_group()
    sys.stdout.flush()
