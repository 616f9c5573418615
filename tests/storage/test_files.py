"""Files that are opened for reading and writing, and files that are written aside."""

from __future__ import annotations

import ast
import errno
import os
import resource

import pytest
import torch

from focal_d2 import UserError
from focal_d2.storage.files import (
    check_output,
    check_regular,
    create_file,
    open_data,
    read_file,
    write_aside,
)
from tests.conftest import REPOSITORY
from tests.engine.runs import mounted
from tests.special_files import SPECIAL, put


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


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_of_bounded_size_are_opened(tmp_path, kind):
    path = str(tmp_path / "a")
    says = put(path, kind)
    for read in (lambda: read_file(path, limit=2**20), lambda: open_data(path, limit=2**20)):
        with pytest.raises(OSError, match=says) as error:
            read()
        assert error.value.filename == path
    if kind == "sparse file":
        check_regular(path)
        return
    for write in (lambda: create_file(path), lambda: check_regular(path)):
        with pytest.raises(OSError, match=says):
            write()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", [kind for kind in SPECIAL if kind != "folder"])
def test_write_aside_replaces_what_is_there(tmp_path, kind):
    for name in ("a", "a.tmp"):
        put(tmp_path / name, kind)
    write_aside(str(tmp_path / "a"), lambda file: file.write(b"one"))
    assert (tmp_path / "a").read_bytes() == b"one"
    assert not (tmp_path / "a").is_symlink()


def test_files_of_the_limit_are_read_and_created(tmp_path):
    path = tmp_path / "a"
    with create_file(path) as file:
        file.write(b"longer")
    with create_file(path) as file:
        file.write(b"12345")
    assert read_file(path, limit=5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than 4") as error:
        read_file(path, limit=4)
    assert error.value.errno == errno.EFBIG
    path.write_bytes(b"")
    assert read_file(path, limit=0) == b""
    check_regular(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "nowhere", limit=1)
    with pytest.raises(OSError, match="null"):
        read_file("a\0b", limit=1)


# Who opens a file by other means, and why that is safe.
OPENED_ELSEWHERE = {
    "focal_d2/storage/files.py": "it is the place",
    "focal_d2/storage/downloads.py": "a new file; a lock, which is not read",
    "focal_d2/storage/weights.py": "an entry of a zip file",
    "focal_d2/data/image_files.py": "Pillow gets an open file",
    "focal_d2/data/handover.py": "a handle of its own",
    "focal_d2/data/cache.py": "a file in memory of its own",
    "focal_d2/engine/output_lock.py": "a lock, after check_output",
    "focal_d2/console.py": "the null device",
    "focal_d2/engine/hooks/wandb.py": "writes OUTPUT_DIR, after check_output",
    "focal_d2/analysis/benchmark/setting.py": "/proc",
    "focal_d2/modeling/build.py": "a source file of a package",
    "focal_d2/analysis/doctor/page.py": "our own template",
    "focal_d2/analysis/benchmark/evaluation.py": "writes a folder of its own",
    "focal_d2/analysis/gpu_check/kernels.py": "the tests, and a log in a folder of its own",
    "focal_d2/analysis/gpu_check/demo.py": "the logs and files of jobs in a folder of its own",
    "focal_d2/analysis/study/runs.py": "what was written just now",
    "focal_d2/storage/wheels.py": "a folder of its own",
    "focal_d2/data/embedded/neon_trees.py": "a folder of its own",
    "focal_d2/data/embedded/digits.py": "a folder of its own",
    "focal_d2/data/embedded/folder.py": "a folder of its own",
    "focal_d2/commands/study.py": "what was written just now",
    "focal_d2/commands/data.py": "what was written just now",
    "focal_d2/commands/configs.py": "a config of the package",
    "focal_d2/commands/info.py": "a source file of a package",
    "focal_d2/hardware.py": "/proc and /sys",
    "focal_d2/serve/app.py": "a file of the package, and its own temporary one",
    "focal_d2/data/rasters.py": "a regular file: its first bytes were read by open_data",
    "focal_d2/export/run.py": "it runs without this package, on files of its user",
}
_OPENS = {
    "open",
    "read_text",
    "read_bytes",
    "write_text",
    "write_bytes",
    "savefig",
    "imread",
    "imwrite",
    "fromfile",
}


def test_files_are_opened_in_one_place():
    """`open` waits for a pipe, and reads a sparse file of terabytes; a new call needs a reason here."""
    found = set()
    for path in REPOSITORY.glob("focal_d2/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            is_ours = isinstance(node.func, ast.Name) and node.func.id != "open"
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            to_stream = name == "savefig" and ast.unparse(node.args[0]) in ("file", "stream")
            if name in _OPENS and not is_ours and not to_stream:
                found.add(str(path.relative_to(REPOSITORY)))
    assert found == OPENED_ELSEWHERE.keys()
