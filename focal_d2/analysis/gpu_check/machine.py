"""Part 1: versions, and the first launch of a kernel, with a compiler and without one.

Triton compiles a small C module before its first launch. Slim images have no C compiler, or no Python
headers. Every launch here happens in a process of its own that has not used the GPU, with an empty cache of
kernels.
"""

from __future__ import annotations

import importlib.metadata
import logging
import logging.handlers
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from focal_d2.analysis.gpu_check.lines import Check, Line, Measurement
from focal_d2.analysis.gpu_check.processes import stream
from focal_d2.ops import dense_focal_loss
from focal_d2.ops.common import LOSS_KERNELS, find_kernels

_PACKAGES = (
    "torch", "torchvision", "triton", "numpy", "sal-detectron2", "detectron2", "fvcore", "iopath",
    "opencv-python", "opencv-python-headless", "hotcoco", "pycocotools", "pytest", "scipy",
)  # fmt: skip
_COMPILERS = ("gcc", "cc", "clang")
_SECONDS = 60.0  # that a launch may take
_GRACE = 10.0  # and beyond the part's time, at the end of which it must not be left alone on the GPU


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    yield Measurement("versions", partial(_versions, check))
    yield Measurement("C compiler", _compiler)
    yield Measurement("first launch", partial(_launch, check, os.environ["PATH"]))
    yield Measurement("first launch without a compiler", partial(_launch, check, ""))


def _stream(function: Callable[..., Iterator[Any]], check: Check, *arguments: Any) -> Iterator[Any]:
    """Run a generator function in a new process, which has not used the GPU, and yield its results."""
    seconds = min(_SECONDS, max(0.0, check.seconds_left()) + _GRACE)
    return stream(function, check, *arguments, seconds=seconds, method="fork")


def _versions(check: Check) -> list[Line]:
    (facts,) = _stream(_device_facts, check)
    return [Line("device", facts.pop("name"), details=facts | _package_versions())]


def _device_facts(check: Check) -> Iterator[dict[str, Any]]:
    properties = check.cuda.get_device_properties(check.device)
    yield {
        "name": properties.name,
        "memory": properties.total_memory,
        "free_memory": check.cuda.mem_get_info()[0],
        "capability": (properties.major, properties.minor),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _compiler() -> list[Line]:
    paths = [path for path in map(shutil.which, _COMPILERS) if path]
    has_headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    headers = "Python headers are there" if has_headers else "no Python headers"
    return [Line("C compiler", paths[0] if paths else "none", beside=headers)]


def _launch(check: Check, path: str) -> list[Line]:
    """Compute a loss twice with the kernel, where the process finds programs in `path`."""
    name = "first launch" if path else "first launch without a compiler"
    (facts,) = _stream(_first_launches, check, path)
    used = "the kernel" if facts["has_kernels"] else "PyTorch"
    return [
        Line(
            name,
            1000 * facts["first"],
            "ms",
            beside=f"second {1000 * facts['second']:.2f} ms, by {used}",
            aim="the reference's value",
            met=facts["right"],
            details=facts,
        )
    ]


def _first_launches(check: Check, path: str) -> Iterator[dict[str, Any]]:
    """Yield what the first two losses of a process took, and whether their values are right."""
    logits = torch.linspace(-4, 4, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
    labels = torch.arange(2 * 16).view(2, 16) % 4
    loss = partial(dense_focal_loss, num_classes=3, alpha=0.25, gamma=2.0)
    expected = float(loss([logits], labels))
    logger, messages = logging.getLogger("focal_d2"), logging.handlers.BufferingHandler(100)
    logger.addHandler(messages)
    logger.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(PATH=path, TRITON_CACHE_DIR=cache)
        if not path:
            os.environ.pop("CC", None)
        seconds, values = [], []
        inputs, targets = [logits.to(check.device)], labels.to(check.device)
        check.cuda.synchronize()
        for _ in range(2):
            start = time.perf_counter()
            values.append(float(loss(inputs, targets, use_kernels=True)))
            seconds.append(time.perf_counter() - start)
    yield {
        "first": seconds[0],
        "second": seconds[1],
        "right": all(abs(value - expected) <= 1e-5 * expected for value in values),
        "has_kernels": find_kernels(LOSS_KERNELS, targets) is not None,
        "warnings": [record.getMessage() for record in messages.buffer],
    }
