"""Files of weights: of `torch.save`, pickles of the model zoos, safetensors; read without running code."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from typing import IO, Any

import torch

from focal_d2.errors import UserError
from focal_d2.storage.files import LARGEST_DOWNLOAD, open_file, read_file
from focal_d2.storage.pickles import Reader, Storage, unpickle

LONGEST_DIRECTORY = 2**24  # bytes of a zip file's directory; a tensor takes about 70

_ZIP = b"PK\x03\x04"
_LEGACY_NUMBERS = (0x1950A86A20F9469CFC6C, 1001)  # how the older format starts


def read_torch(path: str, *, trusted: bool) -> Any:
    """Read what `torch.save` wrote, onto the CPU.

    `torch.load` is not called: it finds the entries of a zip file by rules of its own, so that what it reads
    may be something else than what was checked. Here one reader does both. It also compares the checksum of
    each entry that it reads, which `torch.load` does not.

    Args:
        path: of the file.
        trusted: let it import and run what it names.

    Raises:
        ForbiddenImportError: if it names more than tensors, arrays, numbers, texts and their containers.
        Exception: of many types, if it is damaged or something else.
    """
    with open_file(path, limit=LARGEST_DOWNLOAD) as file:
        size = os.fstat(file.fileno()).st_size
        is_zip = file.read(len(_ZIP)) == _ZIP
        file.seek(0)
        if not trusted:
            return _read_zip(file, size) if is_zip else _read_legacy(file, size)
        if is_zip:
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"Bad CRC-32 for file {damaged!r}")
            file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what then fails, or is fine
            return torch.load(file, map_location="cpu", weights_only=False)


def read_pickle(path: str, *, trusted: bool) -> Any:
    """Read a pickle of NumPy arrays in plain containers, such as detectron2's model zoo has.

    Args:
        path: of the file.
        trusted: let it import and run what it names.

    Raises:
        ForbiddenImportError: if it names anything else.
        Exception: of many types, if it is damaged or something else.
    """
    with open_file(path, limit=LARGEST_DOWNLOAD) as file:
        if trusted:
            return pickle.load(file, encoding="latin1")
        size = os.fstat(file.fileno()).st_size
        return unpickle(Reader(file, size), size)


def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """Read a file of the safetensors format: tensors and their names, nothing that could run.

    Raises:
        UserError: if the library that reads it is not installed.
        Exception: of several types, if the file is damaged or something else.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(f"{path} needs safetensors ({error}): pip install safetensors") from error
    tensors: dict[str, torch.Tensor] = safetensors.torch.load(read_file(path, limit=LARGEST_DOWNLOAD))
    return tensors


def _read_zip(file: IO[bytes], size: int) -> Any:
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        folder = next(iter(entries), "").split("/")[0]
        if len(entries) < len(archive.infolist()) or not all(x.startswith(f"{folder}/") for x in entries):
            raise ValueError("two entries of the same name, or no folder around all: not of torch.save")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise ValueError("compressed entries, which PyTorch does not write")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError("entries that are longer than the file")

        def entry_of(name: str) -> zipfile.ZipInfo:
            if f"{folder}/{name}" not in entries:
                raise ValueError(f"no {folder}/{name} in it")
            return entries[f"{folder}/{name}"]

        if f"{folder}/constants.pkl" in entries:
            raise ValueError("a TorchScript archive, not a checkpoint")
        if f"{folder}/byteorder" in entries and archive.read(entry_of("byteorder")) != b"little":
            raise ValueError("written on a big-endian machine")
        storages: dict[str, Storage] = {}

        def storage(persistent_id: Any) -> Storage:
            dtype, key, number = _storage_of(persistent_id)
            if key not in storages:
                entry = entry_of(f"data/{key}")
                if entry.file_size != number * dtype.itemsize:
                    raise ValueError(f"{entry.filename} has another length than is said")
                storages[key] = Storage(_empty(entry.file_size), dtype)
                with archive.open(entry) as stream:  # at its end the checksum is compared
                    _fill(storages[key].data, stream.read)
            return storages[key]._replace(dtype=dtype)

        return unpickle(io.BytesIO(archive.read(entry_of("data.pkl"))), size, storage)


def _check_directory(file: IO[bytes], size: int) -> None:
    """Refuse a zip file whose directory has more entries than any checkpoint: each takes a kilobyte."""
    file.seek(max(0, size - 98))  # what ends a zip file, of either kind, if it has no comment
    end = file.read()
    length = LONGEST_DIRECTORY + 1
    if end[-42:-38] == b"PK\x06\x07":  # more than 4 GB or 65,535 entries
        if end[:4] == b"PK\x06\x06" and int.from_bytes(end[-34:-26], "little") == size - 98:
            length = int.from_bytes(end[40:48], "little")
    elif end[-22:-18] == b"PK\x05\x06" and end[-2:] == b"\0\0":
        length = int.from_bytes(end[-10:-6], "little")
    if length > LONGEST_DIRECTORY:
        raise ValueError(
            f"no directory of at most {LONGEST_DIRECTORY} bytes at its end: cut short, or not of torch.save"
        )
    file.seek(0)


def _read_legacy(file: IO[bytes], size: int) -> Any:
    """Read the format from before PyTorch 1.6: pickles, and then the storages that they name."""
    stream = Reader(file, size)
    for number in _LEGACY_NUMBERS:
        if unpickle(stream, size) != number:
            raise ValueError("neither a zip file nor a file of the older format of torch.save")
    if unpickle(stream, size).get("little_endian") is not True:
        raise ValueError("written on a big-endian machine")
    storages: dict[str, Storage] = {}
    left = size

    def storage(persistent_id: Any) -> Storage:
        nonlocal left
        view = None
        if type(persistent_id) is tuple and len(persistent_id) == 6:
            *persistent_id, view = persistent_id
        dtype, key, number = _storage_of(tuple(persistent_id))
        if key not in storages:
            left -= number * dtype.itemsize
            if left < 0:
                raise ValueError("storages that are longer than the file")
            storages[key] = Storage(_empty(number * dtype.itemsize), dtype)
        if view is None:
            return storages[key]
        _, start, length = view
        return storages[key].part(start, length)

    content = unpickle(stream, size, storage)
    keys = unpickle(stream, size)
    if sorted(keys) != sorted(storages):
        raise ValueError("other storages than the tensors have")
    for key in keys:
        data = storages[key].data
        if int.from_bytes(stream.read(8), "little") * storages[key].dtype.itemsize != data.nbytes():
            raise ValueError(f"storage {key} has another length than is said")
        _fill(data, stream.read)
    return content


def _storage_of(persistent_id: Any) -> tuple[torch.dtype, str, int]:
    kind, dtype, key, _, number = persistent_id
    is_whole = type(number) is int and number >= 0
    if kind != "storage" or not (isinstance(dtype, torch.dtype) and isinstance(key, str) and is_whole):
        raise ValueError("a tensor without a storage")
    return dtype, key, number


def _empty(length: int) -> torch.UntypedStorage:
    return torch.empty(length, dtype=torch.uint8, device="cpu").untyped_storage()


def _fill(data: torch.UntypedStorage, read: Callable[[int], bytes]) -> None:
    numbers = torch.empty(0, dtype=torch.uint8, device="cpu").set_(data).numpy()  # (bytes,), the same memory
    start = 0
    while start < len(numbers):
        block = read(min(2**20, len(numbers) - start))
        if not block:
            raise ValueError("cut short")
        numbers[start : start + len(block)] = memoryview(block)
        start += len(block)
