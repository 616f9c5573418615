"""Repeat a step that was not finite, examine every module and tensor, and restore the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from focal_d2.engine.nonfinite.bad_anchors import find_bad_gradient_anchors, find_bad_loss_anchors
from focal_d2.engine.nonfinite.facts import (
    BadBox,
    BadGradient,
    BadModule,
    BadPixels,
    BadTensor,
    ImageName,
    LargestWeight,
    Step,
)
from focal_d2.engine.nonfinite.report import Report
from focal_d2.modeling import FocalRetinaNet
from focal_d2.modeling.all_reduce import alone
from focal_d2.modeling.losses import DenseBatch

# Images of 16 bits have smaller values.
_LARGEST_PIXEL = 65536.0
# A box may extend beyond its image, in widths and heights of the image; no crop leaves more of a box outside.
_FAR = 1.0
_HALF = (torch.float16, torch.bfloat16)
# The modules that compute losses from the network's outputs. `find_bad_loss_anchors` examines these.
_LOSSES = ("cls_loss", "box_loss", "loss_normalizer")


def examine(
    model: nn.Module,
    batch: Sequence[dict[str, Any]],
    *,
    steps: Sequence[Step],
    normalizer: float | None = None,
) -> Report:
    """Find out why a step's loss or gradient was not finite.

    The step is repeated once, forward and backward, without compilation. In a job of several processes, all
    of them or none must call this function: modules such as SyncBN and GHM wait for the other processes. For
    a model that is not a `FocalRetinaNet`, anchors are not examined, and the caller sets autocast.

    Args:
        model: not wrapped, in training mode, with the parameters and buffers from before the step. Those,
            its gradients and torch's random state are not changed.
        batch: N mapped samples, as the model got them.
        steps: the last iterations, oldest first.
        normalizer: the divisor of the losses, the same in all processes; None: the model computes it from
            this batch.
    """
    names = [_name(i, sample) for i, sample in enumerate(batch)]
    with unchanged(model):
        trace = _repeat(model, batch, normalizer)
        anchors = []
        if isinstance(model, FocalRetinaNet) and trace.dense is not None:
            instances = [sample["instances"] for sample in batch]
            with alone():  # each process searches its own batch
                if any(not x.isfinite() for x in trace.losses.values()):
                    anchors = find_bad_loss_anchors(model, trace.dense, names, instances)
                else:
                    gradients = trace.output_gradients
                    anchors = find_bad_gradient_anchors(model, trace.dense, gradients, names, instances)
    return Report(
        losses={name: float(x) for name, x in trace.losses.items()},
        normalizer=normalizer,
        boxes=[x for name, sample in zip(names, batch, strict=True) for x in _bad_boxes(name, sample)],
        pixels=[x for name, sample in zip(names, batch, strict=True) for x in _bad_pixels(name, sample)],
        tensors=_bad_tensors(model),
        largest_weight=_largest_weight(model),
        module=trace.module,
        anchors=anchors,
        gradient=trace.gradient,
        gradient_norm=trace.gradient_norm,
        steps=list(steps),
    )


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Restore buffers, numbers in modules' attributes, and torch's random state after the block."""
    # detectron2's RetinaNet keeps its loss normaliser in such an attribute.
    buffers = [(m, name, x, x.clone()) for m in model.modules() for name, x in _buffers(m)]
    numbers = [(m, _numbers(m)) for m in model.modules()]
    devices = {x.device.index for x in model.parameters() if x.is_cuda}
    with torch.random.fork_rng(devices=list(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, tensor, value in buffers:
                    tensor.copy_(value)  # in place: DDP and the checkpointer hold it too
                    setattr(module, name, tensor)
            for module, before in numbers:
                for name in _numbers(module).keys() - before.keys():
                    delattr(module, name)
                vars(module).update(before)


def _buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(recurse=False, remove_duplicate=False))


def _numbers(module: nn.Module) -> dict[str, Any]:
    return {name: x for name, x in vars(module).items() if isinstance(x, (bool, int, float, Tensor))}


@dataclass
class _Trace:
    """The observations of the repeated step."""

    losses: dict[str, Tensor] = field(default_factory=dict)
    module: BadModule | None = None
    gradient: BadGradient | None = None
    gradient_norm: float = 0.0
    first_gradient: str = ""
    dense: DenseBatch | None = None
    output_gradients: list[Tensor | None] = field(default_factory=list)  # of L logits, then of L deltas


def _repeat(model: nn.Module, batch: Sequence[dict[str, Any]], normalizer: float | None) -> _Trace:
    trace = _Trace()
    with ExitStack() as stack:
        stack.enter_context(EventStorage())  # metrics of the repeated step are not the job's
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.enable_grad())
        ours = isinstance(model, FocalRetinaNet)
        for handle in _watch(model, trace, skip=_LOSSES if ours else ()):
            stack.callback(handle.remove)
        if isinstance(model, FocalRetinaNet):
            stack.callback(model.cls_loss.register_forward_pre_hook(_keep_dense(trace)).remove)
            if normalizer is not None:
                stack.enter_context(model.loss_normalizer.held(normalizer))
        losses = model(list(batch))
        trace.losses = losses if isinstance(losses, dict) else {"total_loss": losses}
        _compute_gradients(model, trace)
    trace.losses = {name: x.detach() for name, x in trace.losses.items()}
    return trace


def _keep_dense(trace: _Trace) -> Any:
    def keep(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        trace.dense = arguments[0].without_padding()

    return keep


def _watch(model: nn.Module, trace: _Trace, *, skip: tuple[str, ...]) -> Iterator[Any]:
    """Hook all modules except for the model itself and those in `skip`; yield the handles."""
    clean: dict[str, bool] = {}
    for name, module in model.named_modules():
        if name and name.split(".")[0] not in skip:
            yield module.register_forward_pre_hook(_look_at_inputs(name, trace, clean), with_kwargs=True)
            yield module.register_forward_hook(_look_at_outputs(name, trace, clean), with_kwargs=True)


def _look_at_inputs(name: str, trace: _Trace, clean: dict[str, bool]) -> Any:
    # Before the module runs, because it may change its inputs in place.
    def look(_module: nn.Module, *arguments: Any) -> None:
        clean[name] = trace.module is None and all(x.isfinite().all() for x in _tensors(arguments))

    return look


def _look_at_outputs(name: str, trace: _Trace, clean: dict[str, bool]) -> Any:
    def look(module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        tensors = list(_tensors(outputs))
        bad = sum(int(x.numel() - x.isfinite().sum()) for x in tensors)
        if bad and clean.get(name) and trace.module is None:
            inputs = list(_tensors((args, kwargs)))
            half = any(x.dtype in _HALF for x in tensors)
            trace.module = BadModule(
                name=name,
                type=type(module).__name__,
                precision=str(tensors[0].dtype).removeprefix("torch."),
                largest_input=max((_largest(x) for x in inputs), default=0.0),
                values=bad,
                size=sum(x.numel() for x in tensors),
                in_float32=_in_float32(module, args, kwargs) if half else None,
            )
        for x in tensors:
            if x.requires_grad:
                x.register_hook(note)

    def note(gradient: Tensor) -> None:
        if not trace.first_gradient and not gradient.isfinite().all():
            trace.first_gradient = name

    return look


def _in_float32(module: nn.Module, args: Any, kwargs: Any) -> float | None:
    """Return the largest magnitude that a module's output has without autocast."""
    if comm.get_world_size() > 1:
        return None  # a norm in the module may wait for the other processes, which do not run this
    device = next(_tensors((args, kwargs))).device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        outputs = module.forward(*_as_float32(args), **_as_float32(kwargs))
    return max(_largest(x) for x in _tensors(outputs))


def _as_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in _HALF else value
    if isinstance(value, dict):
        return {key: _as_float32(x) for key, x in value.items()}
    return type(value)(map(_as_float32, value)) if type(value) in (list, tuple) else value


def _compute_gradients(model: nn.Module, trace: _Trace) -> None:
    """Compute the gradients, also if the losses are not finite: other processes may wait for them."""
    total = torch.stack([x.float().sum() for x in trace.losses.values()]).sum()
    named = [(name, x) for name, x in model.named_parameters() if x.requires_grad]
    outputs = [] if trace.dense is None else [*trace.dense.logits, *trace.dense.deltas]
    wanted = [*(x for _, x in named), *outputs]
    gradients = torch.autograd.grad(total, wanted, allow_unused=True)
    bad = [
        name
        for (name, _), gradient in zip(named, gradients[: len(named)], strict=True)
        if gradient is not None and not gradient.isfinite().all()
    ]
    trace.gradient_norm = float(
        nn.utils.get_total_norm([x for x in gradients[: len(named)] if x is not None])
    )
    if not math.isfinite(trace.gradient_norm):  # also of finite values that are too large
        trace.gradient = BadGradient(trace.first_gradient, bad[::-1])
    trace.output_gradients = list(gradients[len(named) :])


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's inputs or outputs."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Boxes, ImageList)):
        yield from _tensors(value.tensor)
    elif isinstance(value, Instances):
        yield from _tensors(value.get_fields())
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for x in value:
            yield from _tensors(x)


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def _name(index: int, sample: dict[str, Any]) -> ImageName:
    return ImageName(index, str(sample.get("file_name", "")), str(sample.get("image_id", "")))


def _bad_boxes(name: ImageName, sample: dict[str, Any]) -> Iterator[BadBox]:
    """Yield the bad boxes of an image. Rotated boxes are only checked for values that are not finite."""
    height, width = sample["image"].shape[-2:]
    given = {"ignored_boxes": sample.get("ignored_boxes")}
    if "instances" in sample and sample["instances"].has("gt_boxes"):
        given = {"instances": sample["instances"].gt_boxes.tensor, **given}
    for kind, boxes in given.items():
        for i, box in enumerate([] if boxes is None else boxes.tolist()):
            why = _fault(box, width, height)
            if why:
                yield BadBox(name, kind, i, box, why)


def _fault(box: list[float], width: int, height: int) -> str:
    if not torch.tensor(box, dtype=torch.float64).isfinite().all():
        return "not finite"
    if len(box) != 4:
        return ""
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        return "no area"
    right, bottom = (1 + _FAR) * width, (1 + _FAR) * height
    if x0 < -_FAR * width or y0 < -_FAR * height or x1 > right or y1 > bottom:
        return f"far outside the image of {width} × {height} pixels"
    return ""


def _bad_pixels(name: ImageName, sample: dict[str, Any]) -> Iterator[BadPixels]:
    image = sample["image"]
    if not image.is_floating_point():
        return
    for why, bad in (
        ("not finite", ~image.isfinite()),
        (f"beyond ±{_LARGEST_PIXEL:.0f}", image.isfinite() & (image.abs() > _LARGEST_PIXEL)),
    ):
        if bad.any():
            channel, y, x = bad.nonzero()[0].tolist()
            yield BadPixels(name, why, int(bad.sum()), channel, y, x, float(image[channel, y, x]))


def _bad_tensors(model: nn.Module) -> list[BadTensor]:
    bad_tensors = []
    for kind, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, x in named:
            bad = int((~x.isfinite()).sum())
            if bad:
                bad_tensors.append(BadTensor(name, kind, bad, x.numel()))
    return bad_tensors


def _largest_weight(model: nn.Module) -> LargestWeight:
    magnitudes = [
        LargestWeight(name, float(x.detach().abs().nan_to_num(0.0, posinf=0.0).max()))
        for name, x in model.named_parameters()
        if x.numel()
    ]
    return max(magnitudes, key=lambda x: x.value)
