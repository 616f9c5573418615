from __future__ import annotations

import errno
import os
import resource

import pytest

from focal_d2 import UserError
from focal_d2.data.workers import check_handles, starting_workers
from tests.engine.runs import run_main


@pytest.mark.parametrize(
    "number, remedy",
    [
        (
            errno.ENOSPC,
            r"make room in /dev/shm \(docker run --shm-size=1g, or --ipc=host\) or set .*NUM_WORKERS 0",
        ),
        (errno.EMFILE, r"raise the number of file handles \(ulimit -n\) or lower DATALOADER.NUM_WORKERS"),
        (errno.EAGAIN, "lower DATALOADER.NUM_WORKERS; with 0, training reads the images itself"),
    ],
)
def test_workers_that_cannot_start_are_one_line(number, remedy):
    line = f"the processes that read images cannot be started: .*{os.strerror(number)}; {remedy}"
    with pytest.raises(UserError, match=line), starting_workers():
        raise OSError(number, os.strerror(number))


def test_handles_are_counted(monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda folder: ["0", "1", "2"])
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    check_handles(3, loaders=2)  # 3 + 2 * 3 * 4 + 32 = 59
    with pytest.raises(
        UserError, match=r"may open 64 files \(ulimit -n\), and .* 4 needs 67: run `ulimit -n 1024`"
    ):
        check_handles(4, loaders=2)
    check_handles(4, loaders=1)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    check_handles(1024, loaders=2)


@pytest.mark.parametrize("command", [[], ["--eval-only"]], ids=["train", "evaluate"])
def test_few_handles_are_refused_at_the_start(job, tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    config, _ = job
    assert run_main(monkeypatch, *command, "--config-file", config, "DATALOADER.NUM_WORKERS", 16) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this process may open 64 files (ulimit -n), and DATALOADER.NUM_WORKERS 16 needs" in line
    assert not (tmp_path / "out/config.yaml").exists()
