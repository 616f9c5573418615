"""Files that are written aside."""

from __future__ import annotations

import errno
import os
import resource

import pytest
import torch

from focal_d2 import UserError
from focal_d2.storage.files import check_output, write_aside
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


@pytest.mark.parametrize("name", ["log.txt", "training.lock", "inference", "inference/mine", "inference/a/b"])
def test_links_out_of_a_folder_are_refused(tmp_path, name):
    folder, outside = tmp_path / "run", tmp_path / "outside"
    (folder / name).parent.mkdir(parents=True)
    outside.mkdir()
    (folder / name).symlink_to(outside)
    with pytest.raises(UserError, match=rf"{name} is a link to .*outside, outside the folder: remove it"):
        check_output(str(folder))


@pytest.mark.parametrize("name", ["log.txt", "metrics.json", "config.yaml"])
def test_what_is_no_file_is_refused_where_one_is_written(tmp_path, name):
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)):
        folder = tmp_path / make.__name__
        folder.mkdir()
        make(folder / name)
        with pytest.raises(UserError, match=f"{name} is not a file: remove it"):
            check_output(str(folder))


def test_links_within_a_folder_and_to_checkpoints_are_fine(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "log.txt").write_text("")
    (folder / "latest").symlink_to("log.txt")
    (folder / "model_final.pth").symlink_to(tmp_path / "elsewhere.pth")
    (tmp_path / "alias").symlink_to(folder)
    for name in ("run", "alias", "nowhere"):
        check_output(str(tmp_path / name))


def test_write_aside_writes_through_no_link(tmp_path):
    (tmp_path / "kept").write_text("kept")
    for name in ("a", "a.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "kept")
    write_aside(str(tmp_path / "a"), lambda file: file.write(b"one"))
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "a").read_bytes() == b"one"
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a", "kept"]
