"""The processes of a job: how they start, agree and stop."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from detectron2.engine import launch
from detectron2.utils import comm
from torch import distributed
from torch.distributed.rendezvous import rendezvous
from torch.multiprocessing import ProcessExitedException

from focal_d2.console import quiet
from focal_d2.errors import UserError, user_message
from focal_d2.storage.files import write_aside

# Signals closer together than this are one: a terminal and a launcher may both pass one on.
_SAME_SIGNAL = 0.5  # seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_STARTING = 600.0  # seconds that processes wait for each other
# Seconds after the first signal in which the processes may end their iteration or evaluation and save.
_STOPPING = 600.0
_AGENTS = "torchrun.json"  # in OUTPUT_DIR


class StopRequest:
    """Remembers that SIGTERM or Ctrl-C came; a second one ends the process and its children at once.

    The first one continues children that were stopped (SIGSTOP), for which the job would wait. Outside the
    main thread, where Python hands out no signals, it does nothing.
    """

    def __init__(self, on_first: Callable[[int], None]) -> None:
        """Take what to do when the first signal comes."""
        self.number: int | None = None
        self._process = os.getpid()
        self._on_first = on_first
        self._time = 0.0

    def __enter__(self) -> StopRequest:
        self._before: dict[Any, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A process forked off, to read images: Ctrl-C reaches all of a terminal's, and is for the first.
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        now = time.monotonic()
        if self.number is not None:
            if now - self._time > _SAME_SIGNAL:
                _signal_children(signal.SIGKILL)
                os._exit(128 + number)
            return
        self.number, self._time = number, now
        self._on_first(number)
        _signal_children(signal.SIGCONT)


def _signal_children(number: signal.Signals) -> None:
    for process in multiprocessing.active_children():
        with suppress(ProcessLookupError):
            os.kill(int(process.pid), number)  # type: ignore[arg-type]  # it was started


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Return of each flag whether it is set in any process."""
    if comm.get_world_size() == 1:
        return flags
    numbers = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(numbers, distributed.ReduceOp.MAX, group=_cpu_group())
    return tuple(x > 0 for x in numbers.tolist())


@functools.cache
def _cpu_group() -> Any:
    """All processes, talking without their GPUs."""
    if distributed.get_backend() == "gloo":
        return distributed.group.WORLD
    return distributed.new_group(backend="gloo")


# What Gloo, NCCL and PyTorch's store say when another process is gone.
_PEER_LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|remote process|ncclRemoteError|"
    r"socket (closed|timeout)|timed out waiting|wait timeout|gloo.*(error|timed out)",
    re.IGNORECASE,
)


def peer_is_lost(error: BaseException) -> bool:
    """Whether an error is another process's end, seen from this one."""
    return (
        comm.get_world_size() > 1 and isinstance(error, RuntimeError) and bool(_PEER_LOST.search(str(error)))
    )


def start(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a function in the processes that the command line asks for, or as one of torchrun's.

    Args:
        run: called in each process, whose group is set up.
        args: of `focal_d2.commands.train`.

    Raises:
        UserError: for processes that can't be had, or if one ended.
    """
    if distributed.is_torchelastic_launched():
        _run_under_torchrun(run, args)
    elif args.num_gpus * args.num_machines == 1:
        run(args)
    else:
        check_devices(args.num_gpus, args.num_machines)
        if args.num_machines > 1 and re.search(r"//(127\.|localhost|\[?::1)", args.dist_url):
            raise UserError(
                f"--num-machines {args.num_machines} needs --dist-url tcp://HOST:PORT with an address of "
                f"machine 0 that the others reach, not {args.dist_url}"
            )
        _launch(run, args)


def check_devices(num_gpus: int, num_machines: int) -> None:
    """Check that several processes can have a GPU each, or, where there is none, a core each.

    Raises:
        UserError: for more processes than that.
    """
    if num_gpus < 1 or num_machines < 1:
        raise UserError(f"--num-gpus {num_gpus} --num-machines {num_machines}: both must be at least 1")
    devices, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if num_gpus * num_machines > 1 and num_gpus > (devices or cores):
        found = f"{devices} CUDA devices here, and several processes need one each"
        if not devices:
            found = f"no CUDA device here, and {cores} cores for as many processes at most"
        raise UserError(f"--num-gpus {num_gpus} --num-machines {num_machines}: PyTorch finds {found}")


def check_backend(device: str) -> None:
    """Check that processes can exchange what lies on a device.

    Raises:
        UserError: for the CPU of a machine with GPUs, for which detectron2's launcher chooses NCCL.
    """
    if comm.get_world_size() > 1 and device == "cpu" and distributed.get_backend() == "nccl":
        raise UserError(
            "MODEL.DEVICE is cpu, but detectron2's launcher connects processes by their GPUs: start them "
            "with torchrun, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )


def _run_under_torchrun(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    if (args.num_gpus, args.num_machines) != (1, 1):
        raise UserError("under torchrun, --nproc-per-node and --nnodes say how many processes there are")
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
        store = _without_the_dead(store, rank, world)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world)
    comm.create_local_process_group(ranks)
    run(args)
    distributed.destroy_process_group()


def _without_the_dead(store: Any, rank: int, world: int) -> Any:
    """Return a part of torchrun's store that is this start's alone.

    torchrun keeps its store when it restarts processes, and with it the addresses of those that ended, which
    PyTorch would connect to. So the first process makes a name, and gives it to whoever asks in its own.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"focal_d2/ask/{rank}", own)
        store.wait([f"focal_d2/answer/{own}"])
        name = store.get(f"focal_d2/answer/{own}").decode()
        store.set(f"focal_d2/heard/{name}/{rank}", "")
        return distributed.PrefixStore(name, store)
    waiting, end = set(range(1, world)), time.monotonic() + _STARTING
    while waiting:
        for other in sorted(waiting):
            if store.check([f"focal_d2/heard/{own}/{other}"]):
                waiting.remove(other)
            elif store.check([f"focal_d2/ask/{other}"]):
                # Perhaps of a dead one, whose name nobody waits for; the living one overwrites it.
                asker = store.get(f"focal_d2/ask/{other}").decode()
                store.set(f"focal_d2/answer/{asker}", own)
        if time.monotonic() > end:
            raise UserError(f"{len(waiting)} of {world} processes did not start in {_STARTING:g} seconds")
        time.sleep(0.02)
    return distributed.PrefixStore(own, store)


def restarted_by_torchrun(folder: str) -> bool:
    """Whether torchrun started this job before, and it got as far as `remember_torchrun`.

    Each of torchrun's agents counts restarts by itself, and those for which another machine was the reason
    not at all. So the first process writes down whose children they are: if one of those agents is still
    here, it is the same job.

    Args:
        folder: OUTPUT_DIR.
    """
    if not distributed.is_torchelastic_launched():
        return False
    before: list[Any] = []
    path = os.path.join(folder, _AGENTS)
    if comm.is_main_process() and os.path.isfile(path):
        with open(path) as file, suppress(ValueError):
            before = json.load(file)
    (before, *_) = comm.all_gather(before)
    return any(agent in before for agent in _agents())


def remember_torchrun(folder: str) -> None:
    """Write down which agents' job this is, once what an earlier job left in `folder` is out of the way."""
    if distributed.is_torchelastic_launched():
        content = json.dumps(_agents()).encode()
        if comm.is_main_process():
            write_aside(os.path.join(folder, _AGENTS), lambda file: file.write(content))


def _agents() -> list[list[str]]:
    return comm.all_gather([os.environ["TORCHELASTIC_RUN_ID"], *_parent()])


def _parent() -> list[str]:
    """Tell the parent process from all others, on other machines and at other times."""
    pid = os.getppid()
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return [socket.gethostname(), str(pid), started]


def _launch(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    limit = threading.Timer(_STOPPING, _end_children)
    limit.daemon = True

    def pass_on(_: int) -> None:
        _signal_children(signal.SIGTERM)
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
            if stop.number is not None or error.exit_code in (128 + n for n in _SIGNALS):
                raise SystemExit(128 + (stop.number or error.exit_code - 128)) from None
            how = error.signal_name or f"exit status {error.exit_code}"
            raise UserError(
                f"process {error.error_index} of {args.num_gpus} ended with {how}, and the job with it; "
                "--resume goes on from the last checkpoint"
            ) from error
        finally:
            limit.cancel()
    if stop.number is not None:
        raise SystemExit(128 + stop.number)


def _end_children() -> None:
    text = f"a process did not end within {_STOPPING:g} seconds, and all are killed; --resume continues\n"
    os.write(2, text.encode())
    _signal_children(signal.SIGKILL)


def _run_in_child(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    quiet()
    try:
        run(args)
    except Exception as error:
        if (message := user_message(error)) is None:
            raise
        # The parent shows the last line of what a child raises.
        raise UserError(message) from None
    distributed.destroy_process_group()
    sys.stdout.flush()
