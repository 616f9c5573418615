"""Files that are written aside, and read without running code."""

from __future__ import annotations

import collections
import errno
import os
import pickle
import resource
import zipfile

import numpy as np
import pytest
import torch

from focal_d2.storage.files import ForbiddenImportError, read_pickle, read_torch, write_aside
from tests.engine.runs import mounted


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, planted) -> None:
        self.planted = str(planted)

    def __reduce__(self):
        return os.mkdir, (self.planted,)


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


@pytest.mark.parametrize("legacy", [False, True])
def test_read_torch_runs_nothing(tmp_path, legacy):
    path, planted = tmp_path / "a.pth", tmp_path / "planted"
    torch.save({"model": Evil(planted)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ForbiddenImportError, match="would import posix.mkdir; .*--trust-files"):
        read_torch(str(path), trusted=False)
    assert not planted.exists()
    read_torch(str(path), trusted=True)
    assert planted.exists()


def test_read_torch_does_not_obey_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    test_read_torch_runs_nothing(tmp_path, legacy=False)


def test_read_torch_finds_every_flipped_bit_of_a_value(tmp_path):
    path = tmp_path / "a.pth"
    weights = torch.arange(1.0, 5)
    torch.save({"model": weights}, path)
    data = path.read_bytes()
    place = data.index(weights.numpy().tobytes())
    for bit in range(8 * weights.numel() * 4):
        damaged = bytearray(data)
        damaged[place + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert not torch.equal(torch.load(path)["model"], weights)  # PyTorch takes it
        with pytest.raises(ValueError, match="the checksum of a/data/0 in it is wrong"):
            read_torch(str(path), trusted=False)


def test_read_torch_refuses_compressed_entries(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10**6)
    with pytest.raises(ValueError, match="compressed entries"):
        read_torch(str(path), trusted=False)


ARRAYS = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">i4"),
    "bytes": np.arange(3, dtype=np.uint8),
    "bool": np.array([True, False]),
    "half": np.ones((2, 1, 3), np.float16),
    "empty": np.zeros((0, 4), np.float32),
    "no axis": np.array(3.5),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_read_pickle_gives_numpys_arrays(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    content = {
        "model": collections.OrderedDict(ARRAYS),
        "scalar": np.float32(2.5),
        "array": ARRAYS["fortran"],
        "__author__": "x",
        "plain": [1, (2.0, None), True, b"\xff"],
    }
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    read = read_pickle(str(path), trusted=False)
    assert read["plain"] == content["plain"]
    assert read["scalar"] == np.float32(2.5)
    assert type(read["scalar"]) is np.float32
    for name, array in {**read["model"], "fortran": read["array"]}.items():
        np.testing.assert_array_equal(array, ARRAYS[name])
        assert array.dtype == ARRAYS[name].dtype.newbyteorder("=")
        assert array.flags.writeable


def test_read_pickle_takes_older_spellings_of_numpy(tmp_path):
    path = tmp_path / "a.pkl"
    data = pickle.dumps(ARRAYS, protocol=2)
    assert b"numpy._core.multiarray" in data
    path.write_bytes(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    np.testing.assert_array_equal(read_pickle(str(path), trusted=False)["half"], ARRAYS["half"])


def test_read_pickle_takes_python_2s_texts(tmp_path):
    # What Python 2 wrote for {"a": np.array([1.5], "<f4")} with protocol 2: raw bytes are a str.
    text = (
        b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\nU\x02f4K\0K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        b"\x89U\x04\0\0\xc0?tbs."
    )
    path = tmp_path / "a.pkl"
    path.write_bytes(text)
    np.testing.assert_array_equal(read_pickle(str(path), trusted=False)["a"], np.array([1.5], np.float32))


# Each names what it would import, or why it is no array of numbers.
REFUSED = {
    "a function": (lambda planted: Evil(planted), "would import posix.mkdir"),
    "below": (lambda planted: {"model": {"a": [Evil(planted)]}}, "would import posix.mkdir"),
    "a class": (lambda planted: collections.Counter(), "would import collections.Counter"),
    "numpy's own functions": (lambda planted: np.lib.format.open_memmap, "would import numpy.lib"),
    "a tensor": (lambda planted: torch.zeros(1), "would import torch._utils._rebuild_tensor_v2"),
    "objects": (lambda planted: {"a": np.array([None, 1], object)}, "an array of 'O8', not of numbers"),
    "texts": (lambda planted: {"a": np.array(["x"])}, "an array of 'U1', not of numbers"),
    "records": (lambda planted: {"a": np.zeros(1, [("x", "f4")])}, "an array of 'V4', not of numbers"),
    "dates": (lambda planted: {"a": np.zeros(1, "M8[s]")}, "an array of 'M8', not of numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("protocol", [2, 4])
def test_read_pickle_runs_nothing(tmp_path, name, protocol):
    path, planted = tmp_path / "a.pkl", tmp_path / "planted"
    make, expected = REFUSED[name]
    path.write_bytes(pickle.dumps(make(planted), protocol=protocol))
    with pytest.raises((pickle.UnpicklingError, ValueError), match=expected):
        read_pickle(str(path), trusted=False)
    assert not planted.exists()


def test_read_pickle_gives_no_hold_on_our_own_code(tmp_path):
    # BUILD sets attributes of what GLOBAL names; a dtype whose state lies about its fields.
    path = tmp_path / "a.pkl"
    hold = b"cnumpy._core.multiarray\n_reconstruct\n(N}Vx\nI1\nstb."
    lie = b"cnumpy\ndtype\n(Vf4\nI0\nI1\ntR(I3\nV<\nN(Va\nt}I8\nI8\nI63\ntb."
    array = b"cnumpy._core.multiarray\n_reconstruct\n(tR"
    short = array + b"(I1\n(I9\ntcnumpy\ndtype\n(Vf4\nI0\nI1\ntRI00\nVabcd\ntb."
    for data in (hold, lie, short):
        path.write_bytes(data)
        with pytest.raises((AttributeError, ValueError)):
            read_pickle(str(path), trusted=False)


@pytest.mark.parametrize(
    "data",
    [
        b"}r\xff\xff\xff\x7f.",  # the memo's place 2^31
        b"}p99999999999\n.",
        b"\x80\x05\x96\xff\xff\xff\xff\x0f\0\0\0abc.",  # a bytearray of 64 GiB
        b"\x80\x04\x8e\xff\xff\xff\xff\x0f\0\0\0abc.",  # bytes
        b"\x80\x04\x95\xff\xff\xff\xff\x0f\0\0\0}.",  # a frame
    ],
)
def test_read_pickle_makes_no_room_for_what_is_not_there(tmp_path, data):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ValueError, pickle.UnpicklingError), match="place|expected|truncated|exhausted"):
        read_pickle(str(path), trusted=False)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


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


def test_tuples_without_end_are_refused(tmp_path):
    """Hashing them would overflow the stack."""
    content = b"\x80\x02}" + b")" + b"\x85" * 100_000 + b"K\x01s."
    (tmp_path / "deep.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="more than 30,000 tuples"):
        read_pickle(str(tmp_path / "deep.pkl"), trusted=False)
    with zipfile.ZipFile(tmp_path / "deep.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
    with pytest.raises(ValueError, match="more than 30,000 tuples"):
        read_torch(str(tmp_path / "deep.pth"), trusted=False)


def test_a_text_that_is_repeated_without_end_is_refused(tmp_path):
    encode = b"c_codecs\nencode\n"
    text = b"X" + (1000).to_bytes(4, "little") + b"a" * 1000 + b"q\x00" + b"X\x06\x00\x00\x00latin1q\x01"
    once = encode + b"h\x00h\x01\x86R"
    (tmp_path / "bomb.pkl").write_bytes(b"\x80\x02]" + text + b"0" * 0 + b"00(" + once * 1000 + b"e.")
    with pytest.raises(ValueError, match="made bytes of again and again"):
        read_pickle(str(tmp_path / "bomb.pkl"), trusted=False)
