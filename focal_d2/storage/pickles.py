"""Pickles of weights: an interpreter of our own, which makes numbers, texts, arrays, tensors and containers.

Python's and PyTorch's unpicklers obey a pickle: they call what it names, allocate what it asks for, and write
into objects. This one has a short list of names and makes their objects itself. The size of the file limits
the memory: the same bytes are not used again and again.

This file has more than 400 lines because it is one list of operations, which is checked as a whole.
"""

from __future__ import annotations

import functools
import math
import pickle
import pickletools
import re
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from focal_d2.detectron2_compat import set_module_versions
from focal_d2.errors import UNLESS_TRUSTED

MOST_OPERATIONS = 500_000  # a tensor takes about 30
MOST_COPIES = 4  # bytes that are made of the file's, as a multiple of its size
LONGEST_LINE = 2**26  # bytes
DEEPEST_TUPLE = 20  # Python hashes tuples in tuples without looking at the stack that is left
MOST_VALUES = 2_000_000  # with what is referred to several times written out
DEEPEST = 50  # levels of what is returned: those who get it walk through it
LARGEST_SIZE = 2**63 - 1  # of a tensor or an array, and PyTorch's own limit
LARGEST_KEY = 2**60  # above it, whole numbers can be chosen that all have the same hash

_NUMBERS = re.compile(r"[biufc]\d{1,2}")
# What a key of a dictionary can be: nothing whose hash or comparison takes long.
_KEYS = (str, int, bytes, bool, type(None))
# Operations whose argument is the value.
_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class ForbiddenImportError(pickle.UnpicklingError):
    """A file names a class or function, which reading it would call."""

    def __init__(self, name: str) -> None:
        super().__init__(f"it would import {name}; weights are arrays, numbers and texts{UNLESS_TRUSTED}")


class Storage(NamedTuple):
    """The numbers that tensors are parts of, with their type."""

    data: torch.UntypedStorage
    dtype: torch.dtype
    start: int = 0  # bytes
    length: int | None = None  # bytes; None: to the end

    def part(self, start: int, length: int) -> Storage:
        """Return elements of this one, as a storage that shares its memory."""
        size = self.dtype.itemsize
        if start < 0 or length < 0 or (start + length) * size > self.data.nbytes():
            raise ValueError("a view beyond the end of its storage")
        return Storage(self.data, self.dtype, start * size, length * size)


class Reader:
    """A file whose reads are limited to its size: Python allocates a length before it reads."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        """Take an open file of `size` bytes."""
        self._file, self._size = file, size

    def read(self, length: int) -> bytes:
        """Read that much, or what is left."""
        if length > 2**16:
            length = max(0, min(length, self._size - self._file.tell()))
        return self._file.read(length)

    def readline(self) -> bytes:
        """Read a line, or its start: a sparse file is one line of any length."""
        return self._file.readline(LONGEST_LINE)


def unpickle(
    stream: IO[bytes] | Reader, size: int, persistent: Callable[[Any], Storage] | None = None
) -> Any:
    """Read a pickle.

    Args:
        stream: at the pickle's start; afterwards at its end.
        size: of the whole file in bytes, which bounds what may be made of it.
        persistent: returns the storage that PyTorch's persistent id names.

    Raises:
        ForbiddenImportError: if it names what weights do not need.
        Exception: of many types, if it is damaged or hostile.
    """
    machine = _Machine(MOST_COPIES * size + 2**20, persistent)
    try:
        result = machine.run(stream)
        _check_extent(result)
        return result
    finally:
        # Its table of methods refers to it, so everything would stay in memory until Python's next search
        # for such cycles.
        vars(machine).clear()


class _Maker(NamedTuple):
    """The function that is called in place of a class or function that a pickle names."""

    make: Callable[..., Any]


class _Array:
    """A NumPy array, which a pickle makes in two steps."""

    value: np.ndarray | None = None


class _Dtype:
    """A NumPy dtype, which a pickle makes in two steps."""

    def __init__(self, code: Any) -> None:
        if not (isinstance(code, str) and _NUMBERS.fullmatch(code)):
            raise ValueError(f"an array of {_short(code)}, not of numbers")
        self.value = np.dtype(code)

    def build(self, state: Any) -> None:
        order, parts = state[1], state[2:5]
        if order not in ("<", ">", "=", "|") or any(part is not None for part in parts):
            raise ValueError("an array of records, not of numbers")
        self.value = self.value.newbyteorder(order)


class _Machine:
    """The stack machine that a pickle is a program for."""

    def __init__(self, room: int, persistent: Callable[[Any], Storage] | None) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.room = room  # bytes that may still be made
        self.persistent = persistent
        # Of tuples that hold tuples, by id. They are kept, so that nothing else gets their ids.
        self.depths: dict[int, tuple[int, Any]] = {}
        self.names = self._names()
        self.operations: dict[str, Callable[[Any], object]] = {
            "PROTO": lambda _: None,
            "FRAME": lambda _: None,
            "STOP": lambda _: None,
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "POP": lambda _: self._pop(1),
            "POP_MARK": lambda _: self._pop_mark(),
            "DUP": lambda _: self.stack.append(self.stack[-1]),
            "TUPLE": lambda _: self._tuple(self._pop_mark()),
            "TUPLE1": lambda _: self._tuple(self._pop(1)),
            "TUPLE2": lambda _: self._tuple(self._pop(2)),
            "TUPLE3": lambda _: self._tuple(self._pop(3)),
            "LIST": lambda _: self.stack.append(self._pop_mark()),
            "DICT": lambda _: self.stack.append(self._filled({}, self._pop_mark())),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_mark()),
            "ADDITEMS": lambda _: self._add(self._pop_mark()),
            "SETITEM": lambda _: self._set_items(self._pop(2)),
            "SETITEMS": lambda _: self._set_items(self._pop_mark()),
            "GLOBAL": lambda name: self.stack.append(self._find(*name.split(" ", 1))),
            "STACK_GLOBAL": lambda _: self.stack.append(self._find(*self._pop(2))),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            "NEWOBJ": lambda _: self._call(*self._pop(2)),
            "BUILD": lambda _: self._build(*self._pop(2)),
            "BINPERSID": lambda _: self.stack.append(self._storage(*self._pop(1))),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._get),
            **dict.fromkeys(_VALUES, self.stack.append),
            **{name: functools.partial(self._push, make) for name, make in _EMPTY.items()},
        }

    def run(self, stream: Any) -> Any:
        """Run the program; return its result."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MOST_OPERATIONS:
                raise ValueError(f"more than {MOST_OPERATIONS:,} operations, which no weights need")
            step = self.operations.get(operation.name)
            if step is None:
                raise ValueError(f"the operation {operation.name}, which no weights need")
            step(argument)
        (result,) = self.stack
        return result

    def _spend(self, number: int) -> None:
        self.room -= number
        if self.room < 0:
            raise ValueError("the same bytes are copied again and again")

    def _pop(self, number: int) -> list[Any]:
        if len(self.stack) < number:
            raise ValueError("a value is missing")
        items = self.stack[-number:]
        del self.stack[-number:]
        return items

    def _pop_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _push(self, make: Callable[[], Any], _: None) -> None:
        self.stack.append(make())

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        value = self.memo[index]
        is_done = isinstance(value, _Array) and value.value is not None
        self.stack.append(value.value if is_done else value)

    def _tuple(self, items: list[Any]) -> None:
        made = tuple(items)
        depths = [self.depths.get(id(x), (1, None))[0] for x in items if type(x) is tuple]
        if depths:
            self.depths[id(made)] = 1 + max(depths), made
            if max(depths) >= DEEPEST_TUPLE:
                raise ValueError(f"tuples in tuples, more than {DEEPEST_TUPLE} levels")
        self.stack.append(made)

    def _top(self, *kinds: type) -> Any:
        if type(self.stack[-1]) not in kinds:
            raise ValueError(f"a {type(self.stack[-1]).__name__} where a {kinds[0].__name__} must be")
        return self.stack[-1]

    def _append(self, items: list[Any]) -> None:
        self._top(list).extend(items)

    def _add(self, items: list[Any]) -> None:
        self._top(set).update(map(self._key, items))

    def _set_items(self, items: list[Any]) -> None:
        self._filled(self._top(dict, OrderedDict, Counter), items)

    def _filled(self, target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self._key(key)] = value
        return target

    def _key(self, key: Any) -> Any:
        if type(key) not in _KEYS or (type(key) is int and abs(key) > LARGEST_KEY):
            raise ValueError(f"a {type(key).__name__} as a key; keys are texts and numbers up to 2^60")
        return key

    def _find(self, module: Any, name: Any) -> Any:
        """Return what is used in place of a class or function that a pickle names."""
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError(f"{_short(module)} and {_short(name)} as a module and a name")
        # NumPy 2 moved numpy.core to numpy._core; Python 2 said __builtin__.
        module = re.sub(r"^numpy\._?core\.", "numpy.", module).replace("__builtin__", "builtins")
        if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
            return _STORAGES[name]
        # Not getattr, for which PyTorch imports modules that it does not have yet.
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        make = self.names.get((module, name))
        if make is None:
            raise ForbiddenImportError(f"{module}.{name}")
        return _Maker(make)

    def _names(self) -> dict[tuple[str, str], Callable[..., Any]]:
        return {
            ("collections", "OrderedDict"): self._ordered,
            ("collections", "Counter"): lambda items=None: Counter(self._filled({}, self._pairs(items))),
            ("_codecs", "encode"): self._encode,
            ("builtins", "bytes"): self._bytes,
            ("builtins", "bytearray"): lambda *args: bytearray(self._bytes(*args)),
            ("builtins", "set"): lambda items=(): set(map(self._key, self._list(items))),
            ("builtins", "complex"): lambda real, imaginary: complex(float(real), float(imaginary)),
            ("numpy", "ndarray"): lambda *_: _Array(),
            ("numpy", "dtype"): lambda code, *_: _Dtype(code),
            ("numpy.multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy.multiarray", "scalar"): lambda dtype, data: self._array(data, dtype, (), "C")[()],
            ("numpy.numeric", "_frombuffer"): self._array,
            ("torch", "Size"): lambda items=(): torch.Size(map(_whole, self._list(items))),
            ("torch", "device"): _device,
            ("torch._utils", "_rebuild_tensor"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_tensor_v3"): self._tensor_as,
            ("torch._utils", "_rebuild_parameter"): _parameter,
        }

    def _call(self, maker: Any, arguments: Any) -> None:
        if not (isinstance(maker, _Maker) and type(arguments) is tuple):
            raise ValueError(f"a call of a {type(maker).__name__}")
        self.stack.append(maker.make(*arguments))

    def _build(self, target: Any, state: Any) -> None:
        if isinstance(target, _Dtype):
            target.build(state)
        elif isinstance(target, _Array) and target.value is None:
            _, shape, dtype, is_fortran, data = state
            target.value = self._array(data, dtype, shape, "F" if is_fortran else "C")
            target = target.value
        elif type(target) is OrderedDict and isinstance(state, dict):
            if "_metadata" in state:  # of a state_dict: the versions of its modules
                set_module_versions(target, state["_metadata"])
        else:
            raise ValueError(f"attributes of a {type(target).__name__}")
        self.stack.append(target)

    def _list(self, items: Any) -> list[Any]:
        """Copy a list or tuple, which may have been made once for many."""
        if type(items) not in (list, tuple, set):
            raise ValueError(f"a {type(items).__name__} where a list must be")
        self._spend(100 * len(items))
        return list(items)

    def _pairs(self, items: Any) -> list[Any]:
        """Copy pairs to one list: key, value, key, …"""
        if items is None:
            return []
        pairs = self._list(list(items.items()) if type(items) in (dict, OrderedDict, Counter) else items)
        return [x for key, value in pairs for x in (key, value)]

    def _ordered(self, items: Any = None) -> OrderedDict[Any, Any]:
        made: OrderedDict[Any, Any] = OrderedDict()
        self._filled(made, self._pairs(items))
        return made

    def _encode(self, text: Any, encoding: Any) -> bytes:
        # How Python 3 writes bytes for Python 2.
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes of a {type(text).__name__} in the encoding {_short(encoding)}")
        self._spend(len(text))
        return text.encode("latin1")

    def _bytes(self, content: Any = b"", encoding: Any = None) -> bytes:
        if isinstance(content, str):
            return self._encode(content, encoding)
        if not isinstance(content, (bytes, bytearray)):
            raise ValueError(f"bytes of a {type(content).__name__}")
        self._spend(len(content))
        return bytes(content)

    def _array(self, data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
        if not isinstance(dtype, _Dtype):
            raise ValueError("an array without a dtype")
        self._spend(2 * len(data))
        raw = data.encode("latin1") if isinstance(data, str) else data  # Python 2 had one type for both
        array = np.frombuffer(raw, dtype.value).reshape([_whole(x) for x in shape], order=order)
        return array.astype(dtype.value.newbyteorder("="))  # a copy that can be written

    def _storage(self, persistent_id: Any) -> Storage:
        if self.persistent is None:
            raise ValueError("a tensor outside a PyTorch file")
        return self.persistent(persistent_id)

    def _tensor(
        self, storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any = False, *_: Any
    ) -> torch.Tensor:
        if not isinstance(storage, Storage):
            raise ValueError("a tensor without a storage")
        size, stride = [_whole(x) for x in size], [_whole(x) for x in stride]
        item = storage.dtype.itemsize
        end = _whole(offset) + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        length = storage.data.nbytes() if storage.length is None else storage.length
        # PyTorch would enlarge the storage.
        if 0 not in size and end * item > length:
            raise ValueError("a tensor beyond the end of its storage")
        self._spend(
            math.prod(size) * item
        )  # with a stride of 0 it is more than its storage, once it is copied
        tensor = torch.empty(0, dtype=storage.dtype, device="cpu")
        tensor.set_(storage.data, offset + storage.start // item, size, stride)
        return tensor.requires_grad_(bool(requires_grad))

    def _tensor_as(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> torch.Tensor:
        requires_grad, _, dtype, *_ = rest
        if not (isinstance(storage, Storage) and isinstance(dtype, torch.dtype)):
            raise ValueError("a tensor without a storage or a dtype")
        return self._tensor(storage._replace(dtype=dtype), offset, size, stride, requires_grad)


def _check_extent(content: Any) -> None:
    """Refuse nested references that expand to a huge structure: lists of one list twice, and so on.

    Code that walks through a checkpoint would never end, and would run out of stack in one that contains
    itself or is very deep.
    """
    extents: dict[int, tuple[int, int]] = {}  # of containers: values, with those inside, and levels
    waiting = [(content, False)]
    while waiting:
        value, is_measured_inside = waiting.pop()
        children = _children(value)
        if is_measured_inside:
            inside = [extents.get(id(x), (1, 1)) for x in children]
            size, depth = 1 + sum(n for n, _ in inside), 1 + max((d for _, d in inside), default=0)
            if size > MOST_VALUES or depth > DEEPEST:
                raise ValueError(
                    f"more than {MOST_VALUES:,} values or {DEEPEST} levels, "
                    "with what is referred to several times written out"
                )
            extents[id(value)] = size, depth
        elif id(value) not in extents:
            extents[id(value)] = 1, DEEPEST  # until it is measured: too deep to be inside itself
            waiting.append((value, True))
            waiting += [(x, False) for x in children if isinstance(x, (list, tuple, set, dict))]


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):  # an OrderedDict has attributes too: a state dict's versions of modules
        return [*value.values(), *getattr(value, "__dict__", {}).values()]
    return [*value] if isinstance(value, (list, tuple, set)) else []


def _short(value: Any) -> str:
    """Return a string, else the name of the type: a list may have any number of levels and values."""
    return repr(value[:20]) if isinstance(value, str) else f"a {type(value).__name__}"


def _whole(number: Any) -> int:
    if type(number) is not int or not 0 <= number <= LARGEST_SIZE:
        raise ValueError("a size that is not a whole number up to 2^63")
    return number


def _device(kind: Any, index: Any = None) -> torch.device:
    if not isinstance(kind, str):
        raise ValueError(f"{_short(kind)} as a device")
    return torch.device(kind[:20] if index is None else f"{kind[:20]}:{_whole(index)}")


def _parameter(data: Any, requires_grad: Any, *_: Any) -> torch.nn.Parameter:
    if not isinstance(data, torch.Tensor):
        raise ValueError("a parameter without a tensor")
    return torch.nn.Parameter(data.detach(), bool(requires_grad))
