"""Files that are written aside."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch

from focal_d2.storage.files import write_aside
from tests.engine.runs import mounted


def test_write_aside_replaces_the_file_or_leaves_it(tmp_path):
    path = tmp_path / "a"
    write_aside(str(path), lambda file: file.write(b"one"))
    assert path.read_bytes() == b"one"

    def fail(file):
        file.write(b"two")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_aside(str(path), fail)
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]


def test_write_aside_brings_the_file_to_the_disk_before_it_is_in_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=real: (calls.append(n), f(*args)))
    write_aside(str(tmp_path / "a"), lambda file: file.write(b"one"))
    assert calls == ["fsync", "replace", "fsync"]  # the file, and at last the folder


@pytest.fixture
def at_most_a_megabyte():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_aside_says_what_the_disk_said(tmp_path, at_most_a_megabyte):
    with pytest.raises(OSError, match="too large") as error:
        write_aside(str(tmp_path / "a"), lambda file: torch.save(torch.zeros(10**6), file))
    assert error.value.errno == errno.EFBIG
    assert not list(tmp_path.iterdir())


def test_write_aside_keeps_errors_of_the_program(tmp_path):
    with pytest.raises(RuntimeError, match="no disk's fault"):
        write_aside(str(tmp_path / "a"), lambda file: exec('raise RuntimeError("no disk\'s fault")'))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a megabyte."""
    with mounted(tmp_path / "small", "1m") as folder:
        yield folder


def test_write_aside_on_a_full_disk(small_disk):
    path = small_disk / "a"
    write_aside(str(path), lambda file: torch.save(torch.zeros(10**5), file))
    before = path.read_bytes()
    for _ in range(3):  # a leftover would take the room of the next one
        with pytest.raises(OSError, match="No space left") as error:
            write_aside(str(path), lambda file: torch.save(torch.zeros(10**6), file))
        assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(small_disk.iterdir()) == [path]
    write_aside(str(path), lambda file: torch.save(torch.ones(10**5), file))
    assert torch.load(path).sum() == 10**5
