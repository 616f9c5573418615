"""Checkpoint files: written so that a crash leaves the old or the new one, read without running code."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

import numpy as np
import torch

from focal_d2.errors import UNLESS_TRUSTED

ASIDE = ".tmp"  # ends the name of a file that is not whole yet
_ZIP = b"PK\x03\x04"
_MOST_TUPLES = 30_000  # a tensor takes four
_MOST_TEXT = 16  # bytes from texts, as a multiple of the file's
_DTYPE = re.compile(r"[biufc]\d{1,2}")


class ForbiddenImportError(pickle.UnpicklingError):
    """A file names a class or function, which reading it would call."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it would import {name}; weights are arrays, numbers and texts{UNLESS_TRUSTED}")


def write_aside(path: str, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside its place, bring it to the disk, and put it in place in one step.

    A process that is killed, or a machine that loses power, leaves the former file or the whole new one, and
    maybe `path` + ".tmp".

    Args:
        path: of the file.
        write: given the open file, fills it.

    Raises:
        OSError: if that fails; the former file is as it was.
    """
    aside = path + ASIDE
    try:
        with open(aside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        with suppress(OSError):
            os.remove(aside)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from error  # PyTorch's writer miscounts once a write has failed
        raise
    _sync_folder(os.path.dirname(path) or os.curdir)


def _sync_folder(folder: str) -> None:
    handle = os.open(folder, os.O_RDONLY)
    with suppress(OSError):  # some network drives can't, and the file is in place
        os.fsync(handle)
    os.close(handle)


def read_torch(path: str, *, trusted: bool) -> Any:
    """Read what `torch.save` wrote, onto the CPU.

    PyTorch's zip files have a CRC-32 of each entry, which `torch.load` does not look at: it is checked here.
    Reading an entry also compares its two headers, so that a flipped bit is found, or lies where it changes
    nothing that is read.

    Args:
        path: of the file.
        trusted: let it import and run what it names.

    Raises:
        ForbiddenImportError: if it names more than tensors, numbers, texts and their containers.
        Exception: of many types, if it is damaged or something else.
    """
    _check_sums(path)
    if not trusted:
        _check_nesting(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what then fails, or is fine
            return torch.load(path, map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        # PyTorch wraps the reason in advice to load the file unsafely.
        reason = str(error.__context__ or error)
        wanted = re.search(r"GLOBAL (\S+)", reason)
        raise (ForbiddenImportError(wanted.group(1)) if wanted else pickle.UnpicklingError(reason)) from error


def _check_sums(path: str) -> None:
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed entries, which PyTorch does not write")
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"damaged: the checksum of {damaged} in it is wrong")


def _check_nesting(path: str) -> None:
    """Walk through the pickles of a PyTorch file: tuples in tuples without end would overflow the stack."""
    with open(path, "rb") as file:
        if file.read(len(_ZIP)) == _ZIP:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        _check_operations(archive.read(name))
            return
        file.seek(0)
        for _ in range(4):  # of the older format: number, version, system, content
            _check_operations(file)


def read_pickle(path: str, *, trusted: bool) -> Any:
    """Read a pickle of NumPy arrays in plain containers, such as detectron2's model zoo has.

    Args:
        path: of the file.
        trusted: let it import and run what it names.

    Returns:
        What is in it; of arrays, those that are values of its outermost dictionary or of a dictionary there.

    Raises:
        ForbiddenImportError: if it names anything else.
        Exception: of many types, if it is damaged or something else.
    """
    with open(path, "rb") as file:
        if trusted:
            return pickle.load(file, encoding="latin1")
        content = file.read()
    _check_operations(content)
    data = _ArrayUnpickler(content).load()
    if not isinstance(data, dict):
        return data
    return {k: _with_arrays(v) if isinstance(v, dict) else _array_of(v) for k, v in data.items()}


def _check_operations(content: bytes | IO[bytes]) -> None:
    """Walk through a pickle: the unpickler believes its lengths and places, and makes room for them."""
    stream = io.BytesIO(content) if isinstance(content, bytes) else content
    tuples = 0
    for number, (operation, argument, _) in enumerate(pickletools.genops(stream)):
        # A place is taken by an operation.
        if operation.name.endswith("PUT") and isinstance(argument, int) and argument > number:
            raise ValueError(f"the place {argument} after {number} operations")
        tuples += operation.name.startswith("TUPLE")
        if tuples > _MOST_TUPLES:
            raise ValueError(f"more than {_MOST_TUPLES:,} tuples, which no weights need")


def _with_arrays(data: dict[Any, Any]) -> dict[Any, Any]:
    return {k: _array_of(v) for k, v in data.items()}


def _array_of(value: Any) -> Any:
    return value.array if isinstance(value, _Array) else value


class _ArrayUnpickler(pickle.Unpickler):
    """Makes arrays from their bytes itself.

    NumPy's own reconstruction is not called: a dtype's state can make it take bytes for addresses.
    """

    def __init__(self, content: bytes) -> None:
        """Take the pickle."""
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._room = _MOST_TEXT * len(content)

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a class or function: one of ours."""
        stand_ins = {
            ("collections", "OrderedDict"): OrderedDict,
            ("_codecs", "encode"): self._encode,
            ("__builtin__", "bytes"): self._no_bytes,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): self._dtype,
            ("numpy.multiarray", "_reconstruct"): self._array,
            ("numpy.multiarray", "scalar"): self._scalar,
            ("numpy.numeric", "_frombuffer"): self._from_buffer,
        }
        # NumPy 2 moved numpy.core to numpy._core.
        found = stand_ins.get((re.sub(r"^numpy\._?core\.", "numpy.", module), name))
        if found is None:
            raise ForbiddenImportError(f"{module}.{name}")
        return found

    def _encode(self, text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes for Python 2; and none at all, below.
        if encoding != "latin1":
            raise ValueError(f"bytes in the encoding {encoding!r}")
        self._room -= len(text)
        if self._room < 0:
            raise ValueError("the same text is made bytes of again and again")
        return text.encode("latin1")

    def _no_bytes(self) -> bytes:
        return b""

    def _dtype(self, code: str, *_: Any) -> _Dtype:
        return _Dtype(code)

    def _array(self, *_: Any) -> _Array:
        return _Array()

    def _scalar(self, dtype: _Dtype, data: str | bytes) -> Any:
        return _from_bytes(data, dtype, (), "C")[()]

    def _from_buffer(self, data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        made = _Array()
        made.array = _from_bytes(data, dtype, shape, order)
        return made


class _Dtype:
    """A dtype of plain numbers, on its way through the pickle's two steps."""

    def __init__(self, code: str) -> None:
        if not (isinstance(code, str) and _DTYPE.fullmatch(code)):
            raise ValueError(f"an array of {str(code)[:20]!r}, not of numbers")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order, parts = state[1], state[2:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in parts):
            raise ValueError("an array of records, not of numbers")
        self.value = self.value.newbyteorder(order)


class _Array:
    """An array, on its way through the pickle's two steps."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.array = _from_bytes(data, dtype, shape, "F" if is_fortran else "C")


def _from_bytes(data: str | bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise ValueError("an array without a dtype")
    raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had one type for both
    array = np.frombuffer(raw, dtype.value).reshape(shape, order=order)
    return array.astype(dtype.value.newbyteorder("="))  # a copy that can be written
