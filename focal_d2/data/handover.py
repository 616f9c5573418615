"""How a batch gets from the process that reads its images to the one that trains on it.

PyTorch gives each tensor of a batch a file of its own in /dev/shm, which has 64 MB in a Docker container, and
keeps it open until the tensor is freed: 16 processes that read batches of 64 images need more than 5,000 file
handles. Here a batch is one file that exists in memory only, and only the machine's memory limits its size.

For a GPU, a thread copies the tensors to pinned memory before training asks for the batch. From other memory
the copy to the GPU would hold the host up at the beginning of each step.
"""

from __future__ import annotations

import io
import os
import pickle
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from focal_d2.data.workers import remedy
from focal_d2.errors import UserError

_ALIGNMENT = 64  # bytes: every dtype's, and a cache line


def hand_over(samples: Any, *, pinned: bool = False) -> Any:
    """Prepare what a worker has read for the way to the process that trains, where it arrives unchanged.

    Use it as `collate_fn` of a `DataLoader`. In a process that is no worker it returns what it was given.

    Args:
        samples: anything that can be pickled. Tensors and arrays keep their dtype, shape and values.
        pinned: the `DataLoader` has `pin_memory=True`. Tensors in lists and dicts arrive in pinned memory.

    Raises:
        UserError: in a worker, if the machine has no handle or no memory left for it.
    """
    if get_worker_info() is None:
        return samples
    try:
        return _Parcel(samples, pinned=pinned)
    except OSError as error:
        raise UserError(
            f"a process that reads images cannot hand over a batch: {error}; {remedy(error)}"
        ) from error


class _Parcel:
    """Samples in a file without a name; unpickling one gives the samples, or an `_Arrival` of them."""

    def __init__(self, samples: Any, *, pinned: bool) -> None:
        self._pinned = pinned
        buffers: list[pickle.PickleBuffer] = []
        stream = io.BytesIO()
        _Pickler(stream, 5, buffer_callback=buffers.append).dump(samples)
        parts = [stream.getbuffer(), *(buffer.raw() for buffer in buffers)]
        self._places = []  # of the parts: first byte, end
        handle = os.memfd_create("focal_d2 batch")
        try:
            # Written, not mapped: if memory is short, writing raises an error and mapping ends the process.
            with open(handle, "wb", closefd=False) as file:
                for part in parts:
                    start = file.seek(-(-file.tell() // _ALIGNMENT) * _ALIGNMENT)
                    file.write(part)
                    self._places.append((start, start + part.nbytes))
            # Here and not when it is pickled, which PyTorch does in a thread whose errors get lost.
            self._file = DupFd(handle)
        finally:
            os.close(handle)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Arrival if self._pinned else _open), (self._file, self._places)


class _Arrival:
    """Samples that `DataLoader` asks for pinned memory, in the thread that it has for this.

    The file is opened here and not when this object is unpickled: the errors of the latter would end the
    thread, and those of `pin_memory` reach the process that trains.
    """

    def __init__(self, file: Any, places: list[tuple[int, int]]) -> None:
        self._file, self._places = file, places

    def pin_memory(self) -> Any:
        return _pin(_open(self._file, self._places))


def _pin(x: Any) -> Any:
    if type(x) is Tensor:
        return x.pin_memory()
    if type(x) is list:
        return [_pin(value) for value in x]
    if type(x) is dict:
        return {key: _pin(value) for key, value in x.items()}
    return x


def _open(file: Any, places: list[tuple[int, int]]) -> Any:
    handle = file.detach()
    try:
        # Not Python's mmap, which keeps a handle for as long as the samples are used.
        length = os.fstat(handle).st_size
        file_in_memory = torch.from_file(f"/dev/fd/{handle}", shared=True, size=length, dtype=torch.uint8)
    finally:
        os.close(handle)
    memory = file_in_memory.numpy().data
    stream, *buffers = (memory[start:end] for start, end in places)
    return pickle.loads(stream, buffers=buffers)  # ours, from a child of this process


class _Pickler(pickle.Pickler):
    """Leaves the bytes of tensors, as of NumPy's arrays, out of the stream, so that they are copied once."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.device.type != "cpu" or value.layout is not torch.strided:
            return NotImplemented
        if value.is_quantized or value.is_conj() or value.is_neg() or value.requires_grad:
            return NotImplemented
        if not value.is_contiguous():
            return NotImplemented
        return _tensor, (value.flatten().view(torch.uint8).numpy(), value.dtype, value.shape)


def _tensor(array: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    if not array.size:  # of an empty array PyTorch takes no view
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(array).view(dtype).reshape(shape)
