"""Decoded training images, kept for the next time that they are drawn (`DATALOADER.FOCAL.CACHE`).

What is kept is what the decoder returned, before all augmentations: weights are the same to the bit with and
without a cache. An image is decoded and kept when it is drawn for the first time.

All processes of a machine share one copy: a file in memory with the pixels (`ram`), or with the names of the
files that have them (`disk`). Workers inherit it from their process, and the processes of one machine open
that of the first one.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import itertools
import logging
import os
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import cv2
import numpy as np
import PIL
from detectron2.config import CfgNode
from detectron2.utils import comm

from focal_d2.config.architectures import check_boxes_only
from focal_d2.data.image_files import open_image_file
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.data.pixels import FORMATS, ImageReader
from focal_d2.data.readers.image_folder import image_size
from focal_d2.errors import UserError, reason
from focal_d2.hardware import free_memory
from focal_d2.storage.files import ASIDE, open_file, write_aside

logger = logging.getLogger(__name__)

_KEY = "DATALOADER.FOCAL.CACHE"
_GIGABYTE = 10**9
# Part of the names of files. Raise it when the pixels change that a file is decoded to.
_DECODING = 1
_DIGEST = 16  # bytes
_CHECKSUM = 4
_UNKNOWN, _HASHED, _CHECKED = 0, 1, 2  # what is known of an image on the disk
_ABANDONED = 86_400.0  # seconds after which a file that is not whole is one of a process that was killed


@dataclass(frozen=True)
class Slots:
    """The N images that are kept. Arrays, because workers would copy the objects of a dict."""

    keys: np.ndarray  # (N,) uint64, ascending: hashes of the names
    shapes: np.ndarray  # (N, 3) int64: height, width, channels
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, sizes: dict[str, tuple[int, int]], image_format: str) -> Slots:
        """Make slots for images, given the height and width of each by its name."""
        hashes = np.array([_hash(name) for name in sizes], dtype=np.uint64)
        keys, order = np.unique(hashes, return_index=True)
        assert len(keys) == len(sizes), "two names with the same hash of 64 bits"
        shapes = np.full((len(sizes), 3), FORMATS[image_format], dtype=np.int64)
        shapes[:, :2] = np.array([*sizes.values()], dtype=np.int64).reshape(-1, 2)[order]
        return cls(keys, shapes, _dtype_of(image_format))

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, name: str) -> int | None:
        """Return the slot of an image; None if the image is not one of those that are kept."""
        key = np.uint64(_hash(name))
        slot = int(np.searchsorted(self.keys, key))
        return slot if slot < len(self) and self.keys[slot] == key else None

    @property
    def byte_counts(self) -> np.ndarray:
        """(N,) int64: of the pixels of each image."""
        counts: np.ndarray = self.shapes.prod(1) * self.dtype.itemsize
        return counts


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


def _dtype_of(image_format: str) -> np.dtype[Any]:
    return np.dtype(np.float32 if image_format == "YUV-BT.601" else np.uint8)


class SharedMemory:
    """A file that exists in memory only, of zeros at first. It ends with the last process that has it open.

    It is read and written, not mapped: if memory is short, writing raises an error and mapping ends the
    process. Unpickling opens it in another process, as long as the one that made it is there.
    """

    def __init__(self, path: str | None = None) -> None:
        """Make one, or open that of `path`."""
        handle = os.memfd_create("focal_d2 cache") if path is None else os.open(path, os.O_RDWR)
        self._file = os.fdopen(handle, "r+b", buffering=0)
        self.path = path or f"/proc/{os.getpid()}/fd/{handle}"

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedMemory, (self.path,)

    def read_into(self, buffer: Any, start: int) -> None:
        """Fill a buffer with the bytes from `start` on; there are zeros where nothing was written."""
        view = memoryview(buffer).cast("B")
        while view:
            count = os.preadv(self._file.fileno(), [view], start)
            if not count:  # the end
                view[:] = bytes(len(view))
                return
            view, start = view[count:], start + count

    def write(self, buffer: Any, start: int) -> None:
        """Write a buffer's bytes at `start`."""
        view = memoryview(buffer).cast("B")
        while view:
            count = os.pwrite(self._file.fileno(), view, start)
            view, start = view[count:], start + count


class Cache(ABC):
    """Images by their names; see `read`.

    The first byte of the shared memory says whether keeping an image has failed, and the next N bytes what is
    known of each image. What else is there depends on the kind.
    """

    def __init__(self, slots: Slots, memory: SharedMemory) -> None:
        """Take the images to keep, and the memory that all processes of the machine share."""
        self.slots, self.memory = slots, memory

    def read(self, name: str, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """Return an image (H, W, C), C-contiguous. The array is the caller's own copy.

        Args:
            name: of its file.
            decode: reads the file; called if the image is not kept.
        """
        slot = self.slots.find(name)
        if slot is None:
            return decode()
        image = self._get(slot, name)
        if image is not None:
            return image
        image = decode()
        # The mapper refuses an image that has another size than its annotations say.
        if not self._byte(0) and image.shape == tuple(self.slots.shapes[slot]):
            try:
                self._put(slot, image)
            except OSError as error:
                self.memory.write(b"\1", 0)
                logger.warning(
                    f"{_KEY}: an image cannot be kept ({error.filename or 'memory'}: {reason(error)}); "
                    "training continues, and no more images are added"
                )
        return image

    @abstractmethod
    def _get(self, slot: int, name: str) -> np.ndarray | None:
        """Return an image that is kept, or None."""

    @abstractmethod
    def _put(self, slot: int, image: np.ndarray) -> None:
        """Keep an image, or raise OSError."""

    def _byte(self, position: int) -> int:
        byte = bytearray(1)
        self.memory.read_into(byte, position)
        return byte[0]

    def _empty(self, slot: int) -> np.ndarray:
        return np.empty(self.slots.shapes[slot], self.slots.dtype)


class RamCache(Cache):
    """Pixels in the shared memory. The byte of an image says whether it is there."""

    def __init__(self, slots: Slots, memory: SharedMemory) -> None:
        """Take the images to keep, and the memory."""
        super().__init__(slots, memory)
        ends = 1 + len(slots) + np.cumsum(slots.byte_counts)
        self._starts = ends - slots.byte_counts  # (N,)

    def _get(self, slot: int, name: str) -> np.ndarray | None:
        if not self._byte(1 + slot):
            return None
        image = self._empty(slot)
        self.memory.read_into(image, int(self._starts[slot]))
        return image

    def _put(self, slot: int, image: np.ndarray) -> None:
        self.memory.write(image, int(self._starts[slot]))
        self.memory.write(b"\1", 1 + slot)


class DiskCache(Cache):
    """A file for each image, named by a hash of the image file's content and of what decodes it.

    A training computes the hash once for each image, when it is drawn for the first time, and checks the
    checksum of the pixels when it reads them for the first time. The hashes are in the shared memory.
    """

    def __init__(self, slots: Slots, memory: SharedMemory, *, folder: str, reader: ImageReader) -> None:
        """Take the images to keep, the memory, the folder of the files, and what decodes."""
        super().__init__(slots, memory)
        self.folder = folder
        self._max_pixels = reader.max_pixels
        self._decoder = (_DECODING, reader.image_format, reader.backend, PIL.__version__, cv2.__version__)

    def _get(self, slot: int, name: str) -> np.ndarray | None:
        state = self._byte(1 + slot)
        if state == _UNKNOWN:
            self.memory.write(self._digest(slot, name), self._place(slot))
            self.memory.write(bytes([_HASHED]), 1 + slot)
        image = self._read_file(slot, check=state != _CHECKED)
        if image is not None and state != _CHECKED:
            self.memory.write(bytes([_CHECKED]), 1 + slot)
        return image

    def _put(self, slot: int, image: np.ndarray) -> None:
        def write(file: IO[bytes]) -> None:
            file.write(image.data)
            file.write(zlib.crc32(image.data).to_bytes(_CHECKSUM, "little"))

        path = self._path(slot)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_aside(path, write, shared=True)

    def _place(self, slot: int) -> int:
        return 1 + len(self.slots) + _DIGEST * slot

    def _path(self, slot: int) -> str:
        digest = bytearray(_DIGEST)
        self.memory.read_into(digest, self._place(slot))
        return os.path.join(self.folder, digest.hex()[:2], digest.hex()[2:])

    def _digest(self, slot: int, name: str) -> bytes:
        # With the size: pixels that were kept with another one must not be read with this one.
        facts = repr((*self._decoder, self.slots.shapes[slot].tolist()))
        digest = hashlib.blake2b(facts.encode(), digest_size=_DIGEST)
        with open_image_file(name, self._max_pixels) as file:
            digest.update(file.read())
        return digest.digest()

    def _read_file(self, slot: int, *, check: bool) -> np.ndarray | None:
        path, image = self._path(slot), self._empty(slot)
        try:
            with open_file(path, limit=image.nbytes + _CHECKSUM) as file:
                length = file.readinto(image.data.cast("B"))  # type: ignore[attr-defined]
                checksum = file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            problem = reason(error)
        else:
            problem = ""
            if length + len(checksum) != image.nbytes + _CHECKSUM:
                problem = "it is too short"
            elif check and int.from_bytes(checksum, "little") != zlib.crc32(image.data):
                problem = "its checksum is wrong"
        if problem:
            logger.warning(f"{_KEY}: {path} is damaged ({problem}) and is written again")
            return None
        return image


@dataclass(frozen=True)
class CachedReader(ImageReader):
    """A reader that looks into a cache first."""

    cache: Cache

    def read(self, file_name: str) -> np.ndarray:
        """Return what `ImageReader.read` returns, also with the same order in memory."""
        # Pillow's BGR is RGB that is read backwards. The order in memory decides how floats are rounded.
        step = -1 if (self.backend, self.image_format) == ("pil", "BGR") else 1
        read = super().read
        return self.cache.read(
            os.fspath(file_name), lambda: np.ascontiguousarray(read(file_name)[:, :, ::step])
        )[:, :, ::step]


def with_cache(
    cfg: CfgNode, mapper: Callable[[Any], Any], records: Sequence[dict[str, Any]] | None
) -> Callable[[Any], Any]:
    """Return a mapper that keeps images as `DATALOADER.FOCAL.CACHE` says; the log has their size.

    All ranks must call it. If not all images fit into the budget, the first ones in the order of the datasets
    are kept.

    Args:
        cfg: full config, its values checked.
        mapper: a `FocalDatasetMapper`, if there is a cache.
        records: what is trained on; None: no list.

    Raises:
        UserError: if the images or the mapper cannot be cached, the folder cannot be used, or the machine has
            too little memory.
    """
    kind, budget = cfg.DATALOADER.FOCAL.CACHE, cfg.DATALOADER.FOCAL.CACHE_GB
    folder = os.path.expanduser(cfg.DATALOADER.FOCAL.CACHE_FOLDER)
    if not kind:
        return mapper
    check_boxes_only(cfg, _KEY)
    if records is None or any("sem_seg_file_name" in x for x in records):
        raise UserError(f'{_KEY} needs lists of images with boxes in DATASETS.TRAIN: set it to ""')
    if not isinstance(mapper, FocalDatasetMapper):
        raise UserError(
            f'{_KEY} works with FocalDatasetMapper, not with {type(mapper).__name__}: set it to ""'
        )
    plain = ImageReader(mapper.reader.image_format, mapper.reader.backend, mapper.reader.max_pixels)
    slots = _choose(records, plain.image_format, kind=kind, budget=budget, folder=folder)
    memory = _share()
    if kind == "ram":
        cache: Cache = RamCache(slots, memory)
    else:
        _prepare(folder)
        cache = DiskCache(slots, memory, folder=folder, reader=plain)
    cached = copy.copy(mapper)
    cached.reader = CachedReader(plain.image_format, plain.backend, plain.max_pixels, cache)
    return cached


def _choose(
    records: Sequence[dict[str, Any]], image_format: str, *, kind: str, budget: float, folder: str
) -> Slots:
    """Choose the images to keep, and log their number and size.

    Args:
        records: what is trained on. Sizes that they lack are read from the images' headers.
        image_format: of `FORMATS`.
        kind: "ram" or "disk".
        budget: in gigabytes.
        folder: of the files.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for record in records:
        name = os.fspath(record["file_name"])
        if name not in sizes:
            known = "height" in record and "width" in record
            sizes[name] = (record["height"], record["width"]) if known else image_size(name)
    bytes_a_pixel = FORMATS[image_format] * _dtype_of(image_format).itemsize
    ends = bytes_a_pixel * np.cumsum([height * width for height, width in sizes.values()])  # (N,)
    number = int(np.searchsorted(ends, budget * _GIGABYTE, side="right"))
    needed = int(ends[number - 1]) if number else 0
    where = f" in {folder}" if kind == "disk" else ""
    if number == len(sizes):
        text = f"{number:,} images, {_gigabytes(needed)}{where} ({_KEY}_GB: at most {budget:g})"
    else:
        text = (
            f"the first {number:,} of {len(sizes):,} images, {_gigabytes(needed)}{where}: all need "
            f"{_gigabytes(int(ends[-1]))}, and {_KEY}_GB is {budget:g}"
        )
    free = free_memory()
    if kind == "ram" and free is not None and needed > free:
        raise UserError(
            f"{_KEY} ram keeps {text}, but {_gigabytes(free)} of memory are left here: lower {_KEY}_GB, or "
            f"set {_KEY} disk"
        )
    if comm.is_main_process():
        logger.log(logging.INFO if number == len(sizes) else logging.WARNING, f"{_KEY} {kind} keeps {text}")
    return Slots.of(dict(itertools.islice(sizes.items(), number)), image_format)


def _gigabytes(count: int) -> str:
    return f"{count / _GIGABYTE:.3g} GB"


def _share() -> SharedMemory:
    """Return the memory of this machine: its first process makes it, and the others open it."""
    first = comm.get_rank() - comm.get_local_rank()
    memory = SharedMemory() if first == comm.get_rank() else None
    paths = comm.all_gather(memory and memory.path)
    if memory is None:
        memory = SharedMemory(paths[first])
    comm.synchronize()  # the first process may end before another has opened it
    return memory


def _prepare(folder: str) -> None:
    """Make the folder, and remove the files that killed processes left there.

    Raises:
        UserError: if it cannot be used.
    """
    if not folder:
        raise UserError(f"{_KEY} is disk: {_KEY}_FOLDER must name a folder")
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        for path in Path(folder).glob(f"[0-9a-f][0-9a-f]/{'[0-9a-f]' * 30}.*{ASIDE}"):
            with suppress(FileNotFoundError):  # another training removed it, too, or finished it
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
    except OSError as error:
        raise UserError(f"{_KEY}_FOLDER is {folder}, which cannot be used: {reason(error)}") from error
