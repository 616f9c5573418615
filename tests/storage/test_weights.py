"""Files of weights that are read without running code."""

from __future__ import annotations

import collections
import os
import pickle
import resource
import warnings
import zipfile

import numpy as np
import pytest
import torch

from focal_d2.storage.pickles import ForbiddenImportError
from focal_d2.storage.weights import read_pickle, read_torch


class Evil:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, planted) -> None:
        self.planted = str(planted)

    def __reduce__(self):
        return os.mkdir, (self.planted,)


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
        with pytest.raises(zipfile.BadZipFile, match="Bad CRC-32 for file 'a/data/0'"):
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
    "a class": (lambda planted: collections.deque(), "would import collections.deque"),
    "numpy's own functions": (lambda planted: np.lib.format.open_memmap, "would import numpy.lib"),
    "a tensor": (lambda planted: torch.zeros(1), "would import torch.storage._load_from_bytes"),
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


def peak_memory() -> int:
    """The most that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 2**10


# Places of the memo and lengths that lie.
LIES = {
    b"}r\xff\xff\xff\x7f.": {},  # the memo's place 2^31
    b"}p99999999999\n.": {},
    b"\x80\x04\x95\xff\xff\xff\xff\x0f\0\0\0}.": {},  # a frame of 64 GiB
    b"\x80\x05\x96\xff\xff\xff\xff\x0f\0\0\0abc.": "expected 68719476735 bytes",  # a bytearray
    b"\x80\x04\x8e\xff\xff\xff\xff\x0f\0\0\0abc.": "expected 68719476735 bytes",  # bytes
    b"X\xff\xff\xff\xffabc.": "expected 4294967295 bytes",  # a text
}


@pytest.mark.parametrize("data", LIES)
def test_read_pickle_makes_no_room_for_what_is_not_there(tmp_path, data):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    before = peak_memory()
    if isinstance(LIES[data], dict):
        assert read_pickle(str(path), trusted=False) == LIES[data]
    else:
        with pytest.raises(ValueError, match=LIES[data]):
            read_pickle(str(path), trusted=False)
    assert peak_memory() - before < 1024


def contents() -> dict[str, object]:
    """What checkpoints hold, and what they could."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 4, generator=generator)
    dtypes = (
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.bool,
        torch.complex64,
    )
    layer = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.BatchNorm2d(3))
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 2, 5, 5)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 2, 5])
    return {
        "model": layer.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "parameter": torch.nn.Parameter(base.clone()),
        "needs gradient": base.clone().requires_grad_(),
        "transposed": base.T,
        "part": base[1:4, ::2],
        "shared": [base, base[2], base.view(-1)[3:]],
        "expanded": torch.ones(2, 1).expand(2, 5),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "random": torch.get_rng_state(),
        "dtypes": [base.abs().to(x) for x in dtypes],
        "new dtypes": [torch.ones(3).to(x) for x in (torch.uint16, torch.uint64, torch.float8_e4m3fn)],
        "names": [torch.float32, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])],
        "numbers": [0, -1, 2**40, -(2**80), 1.5, float("inf"), True, None, 1 + 2j],
        "texts": ["", "é\N{GRINNING FACE}", b"\x00\xff", bytearray(b"abc"), "x" * 1000],
        "containers": [(), (1,), (1, 2, 3, (4, 5)), {1, 2}, {"a": {3: [4]}}, collections.OrderedDict(a=1)],
        "counter": collections.Counter("aab"),
    }


def assert_same(ours: object, theirs: object) -> None:
    assert type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert (ours.dtype, ours.shape, ours.stride(), ours.storage_offset(), ours.requires_grad) == (
            theirs.dtype, theirs.shape, theirs.stride(), theirs.storage_offset(), theirs.requires_grad,
        )  # fmt: skip
        assert bytes(ours.detach().contiguous().view(-1).view(torch.uint8).numpy()) == bytes(
            theirs.detach().contiguous().view(-1).view(torch.uint8).numpy()
        )
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert getattr(ours, "_metadata", None) == getattr(theirs, "_metadata", None)
        for key, value in ours.items():
            assert_same(value, theirs[key])
    elif isinstance(ours, (list, tuple)):
        for one, two in zip(ours, theirs, strict=True):
            assert_same(one, two)
    else:
        assert ours == theirs


@pytest.mark.parametrize("legacy", [False, True])
def test_read_torch_gives_what_torch_load_gives(tmp_path, legacy):
    path = tmp_path / "a.pth"
    content = contents()
    if legacy:
        del content["new dtypes"]  # which PyTorch itself does not read
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    ours, theirs = read_torch(str(path), trusted=False), torch.load(path, weights_only=True)
    assert_same(ours, theirs)
    ours["shared"][1].fill_(7)  # one memory, which can be written
    assert torch.equal(ours["shared"][0][2], torch.full((4,), 7.0))


def test_read_torch_takes_arrays(tmp_path):
    torch.save({"deep": [(ARRAYS["fortran"],)], "scalar": np.float32(2)}, tmp_path / "a.pth")
    content = read_torch(str(tmp_path / "a.pth"), trusted=False)
    np.testing.assert_array_equal(content["deep"][0][0], ARRAYS["fortran"])
    assert content["scalar"] == np.float32(2)


def test_read_torch_takes_views_of_the_older_format(tmp_path):
    """Older versions of PyTorch wrote parts of a storage as views of it."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aX\3\0\0\0cpuK\4(X\1\0\0\0vK\1K\2tt"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"QK\0K\2\x85K\1\x85tR."
    pickles = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    numbers = np.arange(4, dtype=np.float32).tobytes()
    data = [*pickles, b"\x80\2" + tensor, pickle.dumps(["a"], 2), (4).to_bytes(8, "little"), numbers]
    (tmp_path / "a.pth").write_bytes(b"".join(data))
    assert read_torch(str(tmp_path / "a.pth"), trusted=False).tolist() == [1, 2]


DEEP = b"\x80\2}" + b")" + b"\x85" * 200_000 + b"K\1s."  # hashing the key overflows the stack
GOOD = b"\x80\2}."


def archive_of(*entries: tuple[str, bytes], before: bytes = b"", after: bytes = b""):
    """Make a zip file of entries, any number of the same name, and of the version that PyTorch asks for."""
    version = (entries[0][0].split("/")[0] + "/version", b"3\n")

    def write(path) -> None:
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")  # of duplicates
            for name, content in (*entries, version):
                archive.writestr(name, content)
        path.write_bytes(before + path.read_bytes() + after)

    return write


def bytes_of(*parts: bytes):
    return lambda path: path.write_bytes(b"".join(parts))


def lying_entry(path) -> None:
    """The directory says one length, the entry another."""
    archive_of(("a/data.pkl", GOOD))(path)
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24
    data[place : place + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(data)


def overlapping(path) -> None:
    """Entries that are the same bytes of the file: two thousand times a megabyte."""
    archive_of(("a/data.pkl", GOOD), ("a/data/0", bytes(2**20)))(path)
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    first, second, _ = (b"PK\1\2" + entry for entry in data[start:end].split(b"PK\1\2")[1:])
    many = [second.replace(b"a/data/0", b"a/d%05d" % i) for i in range(2000)]
    directory = first + b"".join(many)
    finish = bytearray(data[end:])
    finish[8:12] = 2 * (2001).to_bytes(2, "little")
    finish[12:16] = len(directory).to_bytes(4, "little")
    path.write_bytes(data[:start] + directory + finish)


def magic(*parts: bytes) -> list[bytes]:
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    return [*head, *parts]


# Files in which PyTorch would read something else than what is looked at, if two readers looked.
UNSOUND = {
    "data.PKL": (archive_of(("archive/data.PKL", DEEP)), "no archive/data.pkl in it"),
    "data.PKL beside data.pkl": (archive_of(("a/data.pkl", GOOD), ("a/data.PKL", DEEP)), None),
    "data.PKL before data.pkl": (archive_of(("a/data.PKL", DEEP), ("a/data.pkl", GOOD)), None),
    "an entry twice": (
        archive_of(("a/data.pkl", GOOD), ("a/data.pkl", DEEP)),
        "two entries of the same name",
    ),
    "an entry twice, the other way": (archive_of(("a/data.pkl", DEEP), ("a/data.pkl", GOOD)), "two entries"),
    "another folder first": (archive_of(("b/x", b""), ("a/data.pkl", GOOD)), "no folder around all"),
    "a folder in another case": (
        archive_of(("A/data.pkl", DEEP), ("a/data.pkl", GOOD)),
        "no folder around all",
    ),
    "a folder in the folder": (archive_of(("a/a/data.pkl", DEEP)), "a/data.pkl"),
    "a path out of the folder": (
        archive_of(("a/data.pkl", GOOD), ("../data.pkl", DEEP)),
        "no folder around all",
    ),
    "no folder": (archive_of(("data.pkl", DEEP)), "no folder around all"),
    "a second zip file behind": (
        lambda path: (
            archive_of(("a/data.pkl", DEEP))(path),
            archive_of(("a/data.pkl", GOOD), before=path.read_bytes())(path),
        ),
        None,
    ),
    "a comment with a directory": (
        archive_of(("a/data.pkl", GOOD), after=b"PK\5\6" + bytes(30)),
        "no directory",
    ),
    "text behind": (archive_of(("a/data.pkl", DEEP), after=b"x"), "no directory of at most"),
    "TorchScript": (archive_of(("a/data.pkl", GOOD), ("a/constants.pkl", DEEP)), "a TorchScript archive"),
    "TorchScript in capitals": (archive_of(("a/data.pkl", GOOD), ("a/CONSTANTS.pkl", DEEP)), None),
    "big-endian": (archive_of(("a/data.pkl", GOOD), ("a/byteorder", b"big")), "a big-endian machine"),
    "a longer entry": (lying_entry, "entries that are longer than the file"),
    "overlapping entries": (overlapping, "entries that are longer than the file"),
    "deep": (archive_of(("a/data.pkl", DEEP)), "tuples in tuples, more than 20 levels"),
    "deep lists": (
        archive_of(("a/data.pkl", b"\x80\2}" + b"]" * 200_000 + b"a" * 199_999 + b"K\1s.")),
        "a list as a key",
    ),
    "older format: deep": (bytes_of(*magic(DEEP)), "tuples in tuples"),
    "older format: deep system": (bytes_of(*magic()[:2], DEEP), "tuples in tuples"),
    "older format: deep version": (bytes_of(*magic()[:1], DEEP), "tuples in tuples"),
    "older format: deep keys": (bytes_of(*magic(GOOD, DEEP)), "tuples in tuples"),
    "older format: a deep start": (bytes_of(DEEP), "tuples in tuples"),
    "older format: big-endian": (
        bytes_of(*magic()[:2], pickle.dumps({"little_endian": False})),
        "big-endian",
    ),
    "a pickle": (bytes_of(GOOD), "neither a zip file nor a file of the older format"),
    "a tar file": (
        bytes_of(b"storages".ljust(257, b"\0"), b"ustar\00000", bytes(10_000)),
        "a value is missing",
    ),
    "safetensors": (bytes_of((2).to_bytes(8, "little"), b"{}"), "opcode"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_what_is_read_is_what_was_checked(tmp_path, name):
    make, match = UNSOUND[name]
    for suffix in ("pth", "safetensors"):
        path = tmp_path / f"a.{suffix}"
        make(path)
        if match is None:
            assert read_torch(str(path), trusted=False) == {}  # the sound entry, of the exact name
        else:
            with pytest.raises(ValueError, match=match):
                read_torch(str(path), trusted=False)


def tensor_of(size: bytes, stride: bytes, number: bytes = b"K\4") -> bytes:
    """Write a tensor of a storage of 4 numbers by hand."""
    storage = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0" + b"X\3\0\0\0cpu" + number + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"QK\0" + size + stride + b"\x89}tR"


def number(x: int) -> bytes:
    return b"\x8a\x08" + x.to_bytes(8, "little")


def torch_file(content: bytes):
    return archive_of(("a/data.pkl", b"\x80\2" + content + b"."), ("a/data/0", bytes(16)))


def text(x: bytes) -> bytes:
    return b"X" + len(x).to_bytes(4, "little") + x


LATIN = text(b"latin1") + b"q\1" + b"0"
MEGABYTE = text(bytes(2**20)) + b"q\0" + b"0"
ONE_ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\nN\x85R(K\1" + number(2**20) + b"\x85h\2\x89h\0tb"
)  # of the text in place 0, by the dtype in place 2
BYTE = b"cnumpy\ndtype\n" + text(b"u1") + b"\x85R(K\3" + text(b"|") + b"NNNK\0K\0K\0tbq\2" + b"0"

# Small files that would take any amount of memory or time.
GREEDY = {
    "bytearray of a number": (
        "pth",
        b"cbuiltins\nbytearray\n" + number(2 * 10**9) + b"\x85R",
        "bytes of a int",
    ),
    "bytearray of a number, Python 2": (
        "pth",
        b"c__builtin__\nbytearray\n" + number(2 * 10**9) + b"\x85R",
        "bytes of",
    ),
    "bytes of a number": ("pkl", b"cbuiltins\nbytes\n" + number(2 * 10**9) + b"\x85R", "bytes of a int"),
    "an array 2,000 times": ("pkl", MEGABYTE + BYTE + b"(" + ONE_ARRAY * 2000 + b"l", "again and again"),
    "bytes 2,000 times": (
        "pkl",
        LATIN + MEGABYTE + b"(" + b"c_codecs\nencode\nh\0h\1\x86R" * 2000 + b"l",
        "again and",
    ),
    "a bytearray 2,000 times": (
        "pkl",
        LATIN + MEGABYTE + b"(" + b"cbuiltins\nbytearray\nh\0h\1\x86R" * 2000 + b"l",
        "again",
    ),
    "bytes in another encoding": (
        "pkl",
        b"c_codecs\nencode\n" + text(b"a" * 99) + text(b"utf-32") + b"\x86R",
        "in the encoding",
    ),
    "a list copied": (
        "pkl",
        b"](" + b"K\1" * 9999 + b"eq\0" + b"0(" + b"cbuiltins\nset\nh\0\x85R" * 9999 + b"l",
        "again",
    ),
    "a dictionary copied": (
        "pkl",
        b"](" + b"K\1K\1\x86" * 9999 + b"eq\0" + b"0(" + b"ccollections\nOrderedDict\nh\0\x85R" * 9999 + b"l",
        "again",
    ),
    "a tensor beyond its storage": (
        "pth",
        tensor_of(number(10**10) + b"\x85", b"K\1\x85"),
        "beyond the end of its",
    ),
    "a step beyond its storage": (
        "pth",
        tensor_of(b"K\2\x85", number(10**10) + b"\x85"),
        "beyond the end of its",
    ),
    "a storage of many": (
        "pth",
        tensor_of(b"K\2\x85", b"K\1\x85", number(10**10)),
        "another length than is said",
    ),
    "one number many times": (
        "pth",
        tensor_of(number(10**10) + b"\x85", b"K\0\x85"),
        "copied again and again",
    ),
    "a negative step": (
        "pth",
        tensor_of(b"K\2\x85", b"J\xff\xff\xff\xff\x85"),
        "a size that is not a whole number",
    ),
    "a size that is true": ("pth", tensor_of(b"\x88\x85", b"K\1\x85"), "a size that is not a whole number"),
    "torch.Tensor of a number": (
        "pth",
        b"ctorch\nTensor\n" + number(10**10) + b"\x85R",
        "would import torch.Tensor",
    ),
    "a storage of a number": (
        "pth",
        b"ctorch\nFloatStorage\n" + number(10**10) + b"\x85R",
        "a call of a dtype",
    ),
    "an empty tensor": ("pth", b"ctorch\nempty\n" + number(10**10) + b"\x85R", "would import torch.empty"),
    "a sparse tensor": (
        "pth",
        b"ctorch._utils\n_rebuild_sparse_tensor\n" + b")R",
        "would import torch._utils._rebuild_sparse",
    ),
    "a file of its own": ("pth", b"ctorch.storage\nUntypedStorage\n)Rb", "a call of a dtype"),
    "many operations": ("pkl", b"(" + b"]" * 500_001 + b"l", "more than 500,000 operations"),
    "keys that collide": ("pkl", b"}" + number(2**61 - 1) + b"Ns", "keys are texts and numbers up to 2"),
    "a tuple as key": ("pkl", b"}K\1\x85Ns", "a tuple as a key"),
    "many digits": ("pkl", b"I" + b"9" * 5000 + b"\n", "Exceeds the limit"),
    "attributes of a list": ("pkl", b"]}b", "attributes of a list"),
    "attributes of a tensor": ("pth", tensor_of(b"K\2\x85", b"K\1\x85") + b"N}b", "attributes of a NoneType"),
    "an extension": ("pkl", b"\x82\1", "the operation EXT1|unregistered"),
    "an instance": ("pkl", b"(ibuiltins\nlist\n", "the operation INST"),
    "a persistent id in a pickle": ("pkl", b"K\1Q", "a tensor outside a PyTorch file"),
    "a text as persistent id": ("pth", b"Pa\n", "the operation PERSID"),
    "nothing on the stack": ("pkl", b"0", "a value is missing"),
}


@pytest.mark.parametrize("name", GREEDY)
def test_small_files_take_no_memory(tmp_path, name):
    suffix, content, match = GREEDY[name]
    path = tmp_path / f"a.{suffix}"
    if suffix == "pth":
        torch_file(content)(path)
    else:
        path.write_bytes(b"\x80\2" + content + b".")
    read = read_torch if suffix == "pth" else read_pickle
    before = peak_memory()
    with pytest.raises((ValueError, pickle.UnpicklingError), match=match):
        read(str(path), trusted=False)
    assert peak_memory() - before < 100
    if suffix == "pth":  # the same in the older format
        path.write_bytes(b"".join(magic(b"\x80\2" + content + b".", pickle.dumps(["0"], 2))))
        with pytest.raises((ValueError, pickle.UnpicklingError)):
            read_torch(str(path), trusted=False)
        assert peak_memory() - before < 100


# A list of a list, twice, of a list, twice, and so on: written out, it has 2^60 items.
LISTS = b"]q\0" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
NUMBER = b"\x8b" + (2**20).to_bytes(4, "little") + b"\x7f" * 2**20 + b"q\0" + b"0"  # of 8 million bits
STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0" + b"X\3\0\0\0cpuK\4tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE

# What takes no memory to read, and no end of time to print, to compare or to walk through.
ENDLESS = {
    "a module's name": (LISTS + text(b"a") + b"\x93", "a list and 'a' as a module and a name"),
    "a name": (text(b"a") + LISTS + b"\x93", "'a' and a list as a module and a name"),
    "a device": (b"ctorch\ndevice\n" + LISTS + b"\x85R", "a list as a device"),
    "a type": (b"cnumpy\ndtype\n" + LISTS + b"\x85R", "an array of a list, not of numbers"),
    "an encoding": (b"c_codecs\nencode\n" + text(b"a") + LISTS + b"\x86R", "in the encoding a list"),
    "content": (b"}" + text(b"model") + LISTS + b"s", "more than 2,000,000 values or 50 levels"),
    "a list of itself": (b"]q\0h\0a", "more than 2,000,000 values or 50 levels"),
    "metadata of themselves": (
        b"ccollections\nOrderedDict\n)Rq\0}" + text(b"_metadata") + b"h\0sb",
        "more than 2,000,000 values or 50 levels",
    ),
    "lists in lists": (b"]" * 100_000 + b"a" * 99_999, "more than 2,000,000 values or 50 levels"),
    "a product of sizes": (
        NUMBER + b"(" + b"h\0" * 400 + b"K\0tq\1" + b"0(" + b"K\1" * 401 + b"tq\2" + b"0" + REBUILD
        + b"K\0h\1h\2\x89}tR",
        "a size that is not a whole number up to 2",
    ),
    "a module of PyTorch's": (b"ctorch\n_inductor\n", "would import torch._inductor"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ENDLESS)
def test_small_files_take_no_time(tmp_path, monkeypatch, name):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} is imported"))
    content, match = ENDLESS[name]
    torch_file(content)(tmp_path / "a.pth")
    with pytest.raises((ValueError, pickle.UnpicklingError), match=match):
        read_torch(str(tmp_path / "a.pth"), trusted=False)


def test_keys_of_the_older_format_are_compared_in_no_time(tmp_path):
    twice = b"(" + LISTS + LISTS.replace(b"]q\0", b"]K\1aq\0", 1) + b"l"
    bytes_of(*magic(GOOD, b"\x80\2" + twice + b"."))(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="more than 2,000,000 values or 50 levels"):
        read_torch(str(tmp_path / "a.pth"), trusted=False)


def test_a_directory_of_many_entries_is_refused(tmp_path):
    """Python's zipfile takes a kilobyte for each."""
    path = tmp_path / "a.pth"
    entry = b"PK\1\2" + bytes(42)
    many = entry * (2**24 // len(entry) + 1)
    end = b"PK\5\6" + bytes(8) + len(many).to_bytes(4, "little") + (4).to_bytes(4, "little") + bytes(2)
    path.write_bytes(b"PK\3\4" + many + end)
    with pytest.raises(ValueError, match="no directory of at most 16777216 bytes at its end"):
        read_torch(str(path), trusted=False)


def test_a_sparse_file_costs_nothing(tmp_path):
    path = tmp_path / "a.pth"
    for start in (b"PK\3\4", b"\x80\2", b""):
        path.write_bytes(start)
        for read in (read_torch, read_pickle):
            os.truncate(path, 2**34)
            with pytest.raises(ValueError, match="no directory|opcode|newline"):
                read(str(path), trusted=False)
            os.truncate(path, 2**42)
            for trusted in (False, True):
                with pytest.raises(OSError, match="it has 4398046511104 bytes, more than"):
                    read(str(path), trusted=trusted)


def test_read_torch_takes_large_archives(tmp_path):
    """More than 65,535 entries need the other end of a zip file."""
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", GOOD)
        for i in range(2**16):
            archive.writestr(f"a/data/{i}", b"")
    assert path.read_bytes()[-98:-94] == b"PK\6\6"
    assert read_torch(str(path), trusted=False) == {}
    data = bytearray(path.read_bytes())
    data[-34] ^= 1  # where the end is said to be
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no directory"):
        read_torch(str(path), trusted=False)
