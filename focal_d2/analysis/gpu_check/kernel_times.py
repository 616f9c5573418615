"""Part 5: the time of the kernels beside the time that their bytes need at the measured copy bandwidth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.models import build_ours, draw_boxes, empty_images
from focal_d2.analysis.benchmark.setting import DTYPES
from focal_d2.analysis.benchmark.timing import copy_bandwidth, event_seconds
from focal_d2.analysis.gpu_check import scenes
from focal_d2.analysis.gpu_check.lines import CHANNELS_LAST, FUSED, Check, Line, Measurement
from focal_d2.ops import dense_focal_loss
from focal_d2.ops.common import LOSS_KERNELS, MATCHING_KERNELS, import_kernels

# The loss may take this many times the limit, by the logits' type.
_AIMS = {"fp32": 1.3, "bf16": 2.0, "fp16": 2.0}
# Constants of the kernels' modules, other values to try, and the layouts on which they act.
LOSS_SWEEP: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "_LOSS_TILE": ((1024, 4096), ("NHWC",)),
    "_LOSS_CELLS": ((256, 1024), ("NCHW",)),
    "_LOSS_CLASSES": ((4, 8, 32), ("NCHW",)),
    "_LOSS_WARPS": ((2, 8), ("NCHW", "NHWC")),
}
MATCHING_SWEEP: dict[str, tuple[int, ...]] = {"_MATCH_TILE": (256, 1024), "_MATCH_WARPS": (2, 8)}
_SWEPT_SECONDS = 3.0  # that a value may need, compilation included
_BYTES_OF_A_LABEL = 8
# Read: an anchor of 4 float32. Written: a label and an index of 8 bytes each, and a byte for positives.
_BYTES_OF_A_MATCH = 16 + 17


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    bandwidth = cache(partial(copy_bandwidth, check.device, copied=check.sizes.copied_bytes))
    yield Measurement("copy bandwidth", lambda: [Line("copy bandwidth", bandwidth() / 1e9, "GB/s")])
    for images, classes in check.sizes.timed_losses:
        for precision in check.sizes.precisions[:2]:
            for layout in scenes.LAYOUTS:
                name = f"loss, {images} images, K = {classes}, {precision}, {layout}"
                shape = (images, classes, precision, layout)
                yield Measurement(name, partial(_time_loss, check, name, shape, bandwidth))
    for count in check.sizes.kernel_boxes:
        name = f"labels, {check.sizes.timed_batch} images with {count} boxes"
        yield Measurement(name, partial(_time_labels, check, name, count, bandwidth))
    images, classes = check.sizes.timed_losses[0]
    for constant, (values, layouts) in LOSS_SWEEP.items():
        for value in values:
            for layout in layouts:
                shape = (images, classes, check.sizes.fast, layout)
                name = f"loss with {constant} {value}, {shape[2]}, {layout}"
                run = partial(_sweep_loss, check, name, constant, value, shape)
                yield Measurement(name, run, _SWEPT_SECONDS)
    for constant, values in MATCHING_SWEEP.items():
        for value in values:
            name = f"labels with {constant} {value}"
            yield Measurement(name, partial(_sweep_labels, check, name, constant, value), _SWEPT_SECONDS)


_Shape = tuple[int, int, str, str]  # images, K, precision, layout


class _LossRuns(NamedTuple):
    """A loss in several ways, and the bytes that must move in the first one."""

    expected: Callable[[], object]  # its backward gets the gradient that `upstream` announced
    other: Callable[[], object]  # with one that gets another gradient
    forward: Callable[[], object]
    moved: int


def _loss_runs(check: Check, shape: _Shape) -> _LossRuns:
    images, classes, precision, layout = shape
    levels = scenes.make_levels(
        images, check.sizes.timed_image, classes, DTYPES[precision], layout, check.device
    )
    labels = scenes.draw_labels(levels, classes, positive=0.001, ignored=0.002)
    parameters = {"num_classes": classes, "alpha": 0.25, "gamma": 2.0, "use_kernels": True}
    loss = partial(dense_focal_loss, levels, labels, **parameters)  # type: ignore[arg-type]
    one, half = torch.ones((), device=check.device), torch.full((), 0.5, device=check.device)
    logits = sum(x.numel() * x.element_size() for x in levels)
    return _LossRuns(
        lambda: torch.autograd.grad(loss(upstream=one), levels),
        lambda: torch.autograd.grad(loss(upstream=half), levels),
        partial(loss, upstream=one),
        2 * logits + _BYTES_OF_A_LABEL * labels.numel(),
    )


def _seconds(check: Check, run: Callable[[], object]) -> float:
    return event_seconds(run, check.device, calls=check.sizes.calls, rounds=check.sizes.rounds)


def _time_loss(check: Check, name: str, shape: _Shape, bandwidth: Callable[[], float]) -> list[Line]:
    runs = _loss_runs(check, shape)
    limit, aim = runs.moved / bandwidth(), _AIMS[shape[2]]
    seconds, forward, other = (_seconds(check, run) for run in (runs.expected, runs.forward, runs.other))
    factor = seconds / limit
    words = f"forward alone {1000 * forward:.3f} ms; scaled in backward {1000 * other:.3f} ms"
    return [
        Line(
            name,
            1000 * seconds,
            "ms",
            beside=f"{factor:.2f} × the limit of {1000 * limit:.3f} ms; {words}",
            aim=f"{aim} × the limit",
            met=factor <= aim if check.on_gpu else None,
            details={"bytes": runs.moved, "over_limit": factor},
        )
    ]


def _label_run(check: Check, count: int) -> tuple[Callable[[], object], int]:
    """Return the labels of a batch with so many boxes in each image, and the bytes that must move."""
    sizes = check.sizes
    height, width = sizes.timed_image
    setting = Setting(check.device, height, sizes.timed_batch, 80, count, 1, "fp32", width)
    model = build_ours(check.config(*FUSED, *CHANNELS_LAST), setting._replace(classes=80))
    anchors = model.anchors_for(empty_images(setting))
    generator = torch.Generator().manual_seed(0)
    instances = [draw_boxes(setting, generator).to(check.device) for _ in range(setting.batch)]
    moved = setting.batch * len(anchors.boxes) * _BYTES_OF_A_MATCH
    return partial(model.label_anchors, anchors, instances), moved


def _time_labels(check: Check, name: str, count: int, bandwidth: Callable[[], float]) -> list[Line]:
    run, moved = _label_run(check, count)
    seconds, limit = _seconds(check, run), moved / bandwidth()
    beside = f"{seconds / limit:.1f} × the limit of {1000 * limit:.3f} ms"
    return [Line(name, 1000 * seconds, "ms", beside=beside, details={"bytes": moved})]


@contextmanager
def replaced(module: str, constant: str, value: int) -> Iterator[None]:
    """Give a constant of a module of kernels another value inside the block.

    Args:
        module: `LOSS_KERNELS` or `MATCHING_KERNELS`.
        constant: its name.
        value: the number.
    """
    kernels: Any = import_kernels(module)
    before = getattr(kernels, constant)
    setattr(kernels, constant, value)
    try:
        yield
    finally:
        setattr(kernels, constant, before)


def _sweep_loss(check: Check, name: str, constant: str, value: int, shape: _Shape) -> list[Line]:
    with replaced(LOSS_KERNELS, constant, value):
        seconds = _seconds(check, _loss_runs(check, shape).expected)
    return [Line(name, 1000 * seconds, "ms")]


def _sweep_labels(check: Check, name: str, constant: str, value: int) -> list[Line]:
    count = check.sizes.kernel_boxes[-2:][0]
    with replaced(MATCHING_KERNELS, constant, value):
        seconds = _seconds(check, _label_run(check, count)[0])
    return [Line(f"{name}, {count} boxes", 1000 * seconds, "ms")]
