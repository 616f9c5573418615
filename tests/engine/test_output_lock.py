"""Two trainings in one folder."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys

import pytest
from detectron2.utils import comm

from focal_d2 import UserError
from focal_d2.engine.output_lock import output_lock
from tests.engine.runs import run_main

HOLD = """
import os, sys, time
from focal_d2.engine.output_lock import output_lock
with output_lock(sys.argv[1]):
    worker = os.fork()  # as data workers are
    if worker:
        print(worker, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/out, and its forked worker's number."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    yield process, worker
    process.kill()
    os.kill(worker, signal.SIGKILL)
    process.communicate()


def test_a_second_training_is_refused_and_writes_nothing(job_file, tmp_path, monkeypatch, capfd, holder):
    process, worker = holder
    assert run_main(monkeypatch, "--config-file", job_file) == 2
    who = f"process {process.pid} on {socket.gethostname()}"
    assert f"OUTPUT_DIR {tmp_path / 'out'} is in use: {who} trains there; " in capfd.readouterr().err
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["training.lock"]
    # Evaluation needs no lock.
    assert run_main(monkeypatch, "--config-file", job_file, "--eval-only") == 2
    assert "--eval-only needs a checkpoint" in capfd.readouterr().err
    # A killed training leaves no lock behind, not even in a worker that outlives it.
    process.kill()
    process.wait()
    os.kill(worker, 0)
    with output_lock(str(tmp_path / "out")):
        assert (tmp_path / "out/training.lock").read_text() == f"process {os.getpid()} on {who.split()[-1]}\n"


def test_blocks_for_the_same_folder_may_be_nested(tmp_path):
    with output_lock(str(tmp_path)):
        with output_lock(f"{tmp_path}/."):
            pass
        ask = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        path = str(tmp_path / "training.lock")
        asked = subprocess.run([sys.executable, "-c", ask, path], capture_output=True, check=False)
        assert b"BlockingIOError" in asked.stderr
    with output_lock(str(tmp_path)):
        pass


def test_a_file_system_without_locks_gets_one_warning(job_file, tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with caplog.at_level(logging.WARNING):
        run = ["--config-file", job_file, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
        assert run_main(monkeypatch, *run) == 0
    lines = [x.getMessage() for x in caplog.records if "no locks" in x.getMessage()]
    assert lines == [
        f"OUTPUT_DIR {tmp_path / 'out'}: this file system has no locks (No locks available); a second "
        "training in the same folder would not be noticed"
    ]


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"OUTPUT_DIR .*/file/out: .*Not a directory"),
        output_lock(f"{tmp_path}/file/out"),
    ):
        pass


@pytest.mark.parametrize("is_main", [True, False])
def test_all_processes_of_a_job_are_told(tmp_path, holder, monkeypatch, is_main):
    process, _ = holder
    line = f"in use: process {process.pid} on"

    def gather(problem):
        assert (line in problem) if is_main else problem is None
        return [problem if is_main else f"OUTPUT_DIR is {line} HOST", None]

    monkeypatch.setattr(comm, "is_main_process", lambda: is_main)
    monkeypatch.setattr(comm, "all_gather", gather)
    with pytest.raises(UserError, match=line), output_lock(str(tmp_path / "out")):
        pass
