"""Run a function in a process of its own, with a limit of time, and receive what it yields."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

from focal_d2.console import prepare_output
from focal_d2.errors import describe_error


class ProcessEnded(Exception):
    """The process failed, died, or was stopped because its time was over."""


def stream(
    function: Callable[..., Iterator[Any]], *arguments: Any, seconds: float, method: str
) -> Iterator[Any]:
    """Yield what a generator function yields in a process of its own.

    Args:
        function: at the top of its module.
        arguments: of the function.
        seconds: after which the process is killed, and with it all that it started.
        method: of `multiprocessing`: "forkserver", or "fork", which must not be used where PyTorch has
            used a GPU.

    Raises:
        ProcessEnded: if the function did not come to its end.
    """
    context: Any = multiprocessing.get_context(method)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, function, arguments))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while True:
            if not receiver.poll(max(0.0, deadline - time.monotonic())):
                raise ProcessEnded(f"stopped after {seconds:.0f} s: its time was over")
            try:
                kind, item = receiver.recv()
            except EOFError:
                process.join()
                raise ProcessEnded(_cause(process.exitcode)) from None
            if kind == "end":
                return
            if kind == "failure":
                raise ProcessEnded(item)
            yield item
    finally:
        with suppress(ProcessLookupError):  # it leads its own group, unless it has only just begun
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
        receiver.close()


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block by SystemExit, so that `stream` kills the process that it has started."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cause(exit_code: int) -> str:
    if exit_code < 0:
        return f"the process was ended by {signal.Signals(-exit_code).name}"
    return f"the process ended with exit status {exit_code}"


def _send(sender: Connection, function: Callable[..., Iterator[Any]], arguments: tuple[Any, ...]) -> None:
    os.setsid()
    prepare_output()
    try:
        for item in function(*arguments):
            sender.send(("item", item))
        sender.send(("end", None))
    except Exception as error:  # the process that started this one reports it
        traceback.print_exc()
        sender.send(("failure", describe_error(error)))
