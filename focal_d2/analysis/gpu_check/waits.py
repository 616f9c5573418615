"""Part 3: what of a training step waits for the GPU, for every loss.

Each stage of a step is run alone: under PyTorch's sync debug mode "warn", which names each call that waits,
and, if there was none, once more under "error". The first step is not looked at: it compiles kernels and
computes the anchors of the shape.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import Tensor

from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.models import build_ours, make_batch
from focal_d2.analysis.gpu_check.lines import CHANNELS_LAST, FUSED, Check, Line, Measurement
from focal_d2.engine.optimizer import build_optimizer
from focal_d2.engine.step import MovingAverage
from focal_d2.errors import first_few
from focal_d2.modeling.anchors import Anchors
from focal_d2.modeling.losses import BOX_LOSSES, LOSSES
from focal_d2.modeling.targets import AnchorTargets, TargetBuffers

_CLASSES = 3
# Iteration of a training in which no metrics are written: every 20th one writes them.
_ITERATION = 1
# PyTorch's words about a call that waits.
_WAIT = "synchronizing CUDA operation"


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    wanted = check.sizes.waits_losses
    for name in (*LOSSES, *BOX_LOSSES):
        if wanted is None or name in wanted:
            yield Measurement(f"waits with {name}", partial(_count, check, name))


def _overrides(loss: str) -> list[str]:
    """Return the KEY VALUE pairs for a classification or box loss, with kernels where it has them."""
    if loss in BOX_LOSSES:
        return ["MODEL.RETINANET.BBOX_REG_LOSS_TYPE", loss, *FUSED]
    implementation = [] if LOSSES[loss].has_fused else ["MODEL.FOCAL.LOSS.IMPLEMENTATION", "auto"]
    return ["MODEL.FOCAL.LOSS.NAME", loss, *FUSED, *implementation]


def _count(check: Check, name: str) -> list[Line]:
    step = _Step(check, _overrides(name))
    for run in step.stages.values():
        run()
    waits = {stage: waits_of(run, check.cuda) for stage, run in step.stages.items()}
    if not any(waits.values()):
        for stage, run in step.stages.items():
            error = forbidden_wait(run, check.cuda)
            if error:
                waits[stage] = Counter({error: 1})
                break  # the stages after it need its result
    total = sum(x.total() for x in waits.values())
    places = [f"{n} in {stage}: {place}" for stage, x in waits.items() for place, n in x.items()]
    beside = first_few(places, 4, "; ")
    return [Line(f"waits with {name}", total, beside=beside, aim="0", met=total == 0, details=places)]


def waits_of(run: Callable[[], object], cuda: Any) -> Counter[str]:
    """Run a stage, and count the calls that wait for the GPU by the line of code that makes them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            cuda.set_sync_debug_mode("default")
    return Counter(_short(x.filename, x.lineno) for x in caught if _WAIT in str(x.message))


def forbidden_wait(run: Callable[[], object], cuda: Any) -> str:
    """Run a stage in which a wait is an error; return the line of code that waits, "" if none does."""
    cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if _WAIT not in str(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return _short(frame.filename, frame.lineno or 0)
    finally:
        cuda.set_sync_debug_mode("default")
    return ""


def _short(path: str, line: int) -> str:
    return f"{'/'.join(path.split('/')[-3:])}:{line}"


class _Step:
    """A training step in stages, each of which uses the results of those before it."""

    images: ImageList
    anchors: Anchors
    targets: AnchorTargets
    predictions: list[list[Tensor]]
    losses: dict[str, Tensor]

    def __init__(self, check: Check, overrides: list[str]) -> None:
        """Build a detector with these overrides, its optimizer, its moving average and a batch."""
        size = check.sizes.waits_size
        setting = Setting(check.device, size, 2, _CLASSES, 3, 1, "fp32")
        cfg = check.config(*overrides, *CHANNELS_LAST)
        self.model = build_ours(cfg, setting)
        self.batch = make_batch(setting)
        self.optimizer = build_optimizer(cfg, self.model)
        self.average = MovingAverage(self.model, decay=0.999)
        self.buffers = TargetBuffers()
        self.storage = EventStorage(_ITERATION)
        self.stages: dict[str, Callable[[], object]] = {
            "images": self._prepare,
            "labels": self._label,
            "network": self._predict,
            "positives": lambda: self.targets.positives(),
            "losses of fixed shape": self._compute_fixed_losses,
            "losses": self._compute_losses,
            "backward": self._backward,
            "optimizer": self.optimizer.step,
            "moving average": self.average.update,
        }

    def _prepare(self) -> None:
        self.optimizer.zero_grad()
        self.images = self.model.preprocess_image(self.batch)

    def _label(self) -> None:
        self.anchors = self.model.anchors_for(self.images)
        self.targets = self.model.label_anchors(self.anchors, [x["instances"] for x in self.batch])

    def _predict(self) -> None:
        self.predictions = self.model.network(self.images)[1]

    def _compute_fixed_losses(self) -> None:
        """Compute losses and gradients from targets of fixed shape, if the loss takes them."""
        if self.model.cls_loss.fixed_shapes:
            targets = self.targets
            self.targets = self.buffers.hold(targets)
            self._compute_losses()
            outputs = [x for part in self.predictions for x in part]
            torch.autograd.grad(torch.stack(list(self.losses.values())).sum(), outputs)
            self.targets = targets

    def _compute_losses(self) -> None:
        seeds, sizes = range(len(self.batch)), self.images.image_sizes
        with self.storage:
            self.losses = self.model.compute_losses(
                self.predictions, self.anchors, self.targets, seeds, sizes
            )

    def _backward(self) -> None:
        torch.stack(list(self.losses.values())).sum().backward()
