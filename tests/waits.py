"""A pretended GPU: it counts the operations that a GPU would run, and lists what the host would wait for.

Inside `with PretendedGPU() as gpu:` tensors with the device "cuda" can be made and used; the CPU computes
their values. So code takes its path for GPUs (`is_cuda`), and loops and branches that depend on values run as
on a GPU. PyTorch's autograd engine needs a real GPU, so `backward` is not possible; count its operations with
tensors on the CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Their result, or its shape, depends on values, so the host must read a number from the GPU.
_READS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
    "torchvision::nms",
}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


class _OnGPU(Tensor):
    """A tensor whose device is "cuda:N", with its values in `values` on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device) -> _OnGPU:
        x = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=device,
        )
        x.values = values
        return x

    def __repr__(self) -> str:
        return f"on a GPU: {self.values!r}"

    def tolist(self) -> Any:  # PyTorch's own copies to the CPU, past the dispatcher
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of a pretended GPU's tensor outside `with PretendedGPU()`")


class PretendedGPU(TorchDispatchMode):
    """See the top of this module."""

    def __init__(self) -> None:
        super().__init__()
        # Tells PyTorch not to look for a real GPU when it sees the device "cuda".
        self._mode_key = torch._C._TorchDispatchModeKey.FAKE
        self.operations: Counter[str] = Counter()  # on the GPU, views included
        self.waits: list[str] = []  # operations at which the host waits, and the line
        self.pageable: list[int] = []  # bytes of copies to the GPU from memory that is not pinned

    def __enter__(self) -> PretendedGPU:
        torch._C._ensureCUDADeviceGuardSet()
        self._lifted_cpu_only = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._stand_ins = ExitStack()
        self._stand_ins.enter_context(mock.patch("torch.cuda.Event", partial(_Event, self.waits)))
        self._stand_ins.enter_context(mock.patch("torch.cuda.current_stream"))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stand_ins.close()
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(self._lifted_cpu_only)
        super().__exit__(*error)

    def clear(self) -> None:
        """Forget what was counted so far."""
        self.operations.clear()
        self.waits.clear()
        self.pageable.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name().split(".")[0]
        if name == "aten::is_pinned":
            return hasattr(args[0], "pretends_pinned")
        if name in ("aten::pin_memory", "aten::_pin_memory"):
            return self._pinned(args[0].clone())
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_gpu = {id(x.values): x for x in tensors if isinstance(x, _OnGPU)}
        device = next((x.device for x in on_gpu.values()), torch.device("cpu"))
        if kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
        to_gpu = device.type == "cuda"
        if to_gpu:
            device = torch.device("cuda", device.index or 0)
            kwargs.update({"device": torch.device("cpu")} if "device" in kwargs else {})
        if on_gpu or to_gpu:
            self.operations[name] += 1
            self._judge(name, args, kwargs, to_gpu=to_gpu)
        pinned = kwargs.pop("pin_memory", False)
        args_on_cpu, kwargs_on_cpu = tree_map(_values, (args, kwargs))
        # On a CPU, PyTorch has no histogram of integers.
        as_double = name == "aten::histc" and not args_on_cpu[0].is_floating_point()
        if as_double:
            args_on_cpu = (args_on_cpu[0].double(), *args_on_cpu[1:])
        result = func(*args_on_cpu, **kwargs_on_cpu)
        result = result.long() if as_double else result
        if pinned:
            self._pinned(result)
        if not to_gpu or (name == "aten::copy_" and not isinstance(args[0], _OnGPU)):
            return result

        def wrap(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            return on_gpu[id(x)] if id(x) in on_gpu else _OnGPU(x, device)

        return tree_map(wrap, result)

    @staticmethod
    def _pinned(x: Tensor) -> Tensor:
        x.pretends_pinned = True
        return x

    def _judge(self, name: str, args: Any, kwargs: Any, *, to_gpu: bool) -> None:
        """Add the operation to `waits` if the host waits at it."""
        waits = name in _READS
        if name == "aten::repeat_interleave":
            waits = kwargs.get("output_size") is None
        if name in _INDEXES:  # masks become lists of indices, and indices on the CPU are copied
            waits = any(x.dtype in (torch.bool, torch.uint8) or not x.is_cuda for x in _indices(args))
        if name in _COPIES:
            target, source = (args[0], args[1]) if name == "aten::copy_" else (None, args[0])
            target_on_gpu = to_gpu if target is None else isinstance(target, _OnGPU)
            crosses = target_on_gpu != isinstance(source, _OnGPU)
            non_blocking = kwargs.get("non_blocking", False) or (target is not None and args[2:] == (True,))
            waits = crosses and not non_blocking
            if crosses and target_on_gpu and not hasattr(source, "pretends_pinned"):
                self.pageable.append(source.nbytes)
        if waits:
            self.waits.append(f"{name} in {_place()}")


class _Event:
    """An event of CUDA: the host waits for it."""

    def __init__(self, waits: list[str]) -> None:
        self._waits = waits

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        self._waits.append(f"event in {_place()}")


def _place() -> str:
    """Return the file and line, outside PyTorch and this module, that is being run."""
    frame: Any = sys._getframe()
    while frame and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "PyTorch"


def _indices(args: Any) -> Iterator[Tensor]:
    return (x for x in args[1] if x is not None)


def _values(x: Any) -> Any:
    return x.values if isinstance(x, _OnGPU) else x
