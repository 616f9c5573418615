"""Functions in processes of their own: what they yield comes, and no end of theirs harms the caller."""

from __future__ import annotations

import os
import signal
import time

import pytest

from focal_d2.analysis.gpu_check.processes import ProcessEnded, stream


def count(to):
    yield from range(to)


def fail():
    yield 1
    raise ValueError("no such thing")


def leave(status):
    yield 1
    os._exit(status)


def die():
    yield 1
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    yield os.getpid()
    time.sleep(60)


def test_stream_yields_what_the_function_yields():
    assert list(stream(count, 3, seconds=20, method="fork")) == [0, 1, 2]


@pytest.mark.parametrize(
    "function, arguments, match",
    [
        (fail, (), "ValueError: no such thing"),
        (leave, (3,), "exit status 3"),
        (die, (), "ended by SIGKILL"),
    ],
)
def test_stream_keeps_what_came_before_a_failure(function, arguments, match):
    items = stream(function, *arguments, seconds=20, method="fork")
    assert next(items) == 1
    with pytest.raises(ProcessEnded, match=match):
        next(items)


def test_stream_kills_a_process_whose_time_is_over():
    items = stream(hang, seconds=0.3, method="fork")
    process = next(items)
    with pytest.raises(ProcessEnded, match="its time was over"):
        next(items)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_stream_kills_the_process_when_its_reader_stops():
    items = stream(hang, seconds=20, method="fork")
    process = next(items)
    items.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
