"""Time and memory of the detector's pieces beside detectron2's RetinaNet, in one process, turn by turn.

Seconds depend on the machine and on what else it does; ratios of runs that take turns depend on them least.
Beside each figure stands a limit: a part of the work that stays, whatever is done to the rest.

Shapes: N images, L levels, A anchors a cell, K classes, R anchors an image.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import detectron2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, BoxMode, ImageList, Instances
from detectron2.utils.events import EventStorage
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from focal_d2.data import FocalDatasetMapper
from focal_d2.data.pixels import write_image
from focal_d2.errors import UserError
from focal_d2.evaluation import FocalCOCOEvaluator
from focal_d2.evaluation.backends import Detections, Truth, coco_curves
from focal_d2.modeling.losses import DenseBatch

# Of the logits in the inference benchmark: some thousand an image exceed a score of 0.05, as after training.
_LOGIT_MEAN, _LOGIT_STD = -7.0, 1.3
# Those of the post-processing benchmark: a model's first evaluations. One in eight exceeds a score of 0.02.
_EARLY_MEAN, _EARLY_STD = -4.6, 0.6
_THRESHOLDS = (0.001, 0.02, 0.05, 0.3)
# Bytes copied to measure a GPU's bandwidth.
_COPIED = 1 << 30


PRECISIONS = ("fp32", "bf16")


class Setting(NamedTuple):
    """What is timed."""

    device: str
    size: int  # pixels, height and width of an image
    batch: int  # N
    classes: int  # K
    boxes: int  # an image
    repeats: int
    precision: str  # of `PRECISIONS`: ours; detectron2's too on CUDA, on a CPU it has fp32 only


class Row(NamedTuple):
    """Medians in seconds, and bytes at the peak beyond what was there before; None: not measured."""

    name: str
    ours: float | None = None
    detectron2: float | None = None
    limit: float | None = None
    limit_is: str = ""
    ours_bytes: int | None = None
    detectron2_bytes: int | None = None
    limit_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures and their ratios, for JSON."""
        return {
            **self._asdict(),
            "speedup": _ratio(self.detectron2, self.ours),
            "over_limit": _ratio(self.ours, self.limit),
            "memory_of_detectron2": _ratio(self.ours_bytes, self.detectron2_bytes),
            "memory_over_limit": _ratio(self.ours_bytes, self.limit_bytes),
        }


def _ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def hardware(device: str) -> dict[str, Any]:
    """Say what the figures were measured on."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines: list[str] = []
        if platform.system() == "Linux":
            lines = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else platform.processor()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
    }


def keep_memory() -> bool:
    """Let the C library keep freed memory instead of giving it back to the system: a warm allocator.

    Without it, most of the time of a big temporary on a CPU is the system's, clearing its pages. Returns
    whether the library has the call (glibc has).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_max = -1, -4
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def take_turns(runs: dict[str, Callable[[], Any]], setting: Setting) -> dict[str, float]:
    """Median seconds of each, run one after another in alternating order; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(setting.repeats + 1):
        for name in list(runs) if i % 2 else reversed(runs):
            _wait(setting)
            start = time.perf_counter()
            runs[name]()
            _wait(setting)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(setting: Setting) -> None:
    if torch.device(setting.device).type == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most bytes that the allocator had given out at once during `run`, beyond those before it."""
    run()  # what stays (caches) is there already
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports each start, and that it has no GPU
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    given = peak = 0
    for _, change in sorted(changes, key=lambda c: c[0]):
        given += change
        peak = max(peak, given)
    return peak


def _timed(name: str, times: dict[str, float], limit_is: str, **peaks: int) -> Row:
    row = Row(name, times["ours"], times["detectron2"], times["limit"], limit_is)
    return row._replace(**peaks)  # type: ignore[arg-type]


class Pair(NamedTuple):
    """Ours and detectron2's RetinaNet with the same weights."""

    ours: Any
    detectron2: Any


def build_pair(cfg: CfgNode, setting: Setting) -> Pair:
    """Build both detectors in training mode.

    Args:
        cfg: full config of ours; not changed.
        setting: what is timed.

    Raises:
        UserError: if the config's model is not interchangeable with detectron2's RetinaNet.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = setting.device
    cfg.MODEL.RETINANET.NUM_CLASSES = setting.classes
    cfg.MODEL.FOCAL.AMP.ENABLED, cfg.MODEL.FOCAL.AMP.DTYPE = setting.precision == "bf16", "bfloat16"
    if torch.device(setting.device).type == "cuda":
        torch.cuda.set_device(setting.device)  # whose time and memory are taken
    torch.manual_seed(0)
    ours = build_model(cfg).train()
    # Random weights under frozen norms grow from block to block; trained ones do not.
    for name, buffer in ours.named_buffers():
        if name.endswith("conv3.norm.weight"):
            buffer.fill_(0.2)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    theirs = build_model(cfg).train()
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("loss_normalizer.")}
    try:
        theirs.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"this config's model is not detectron2's RetinaNet: {str(error).splitlines()[1].strip()}"
        ) from error
    return Pair(ours, theirs)


def make_batch(setting: Setting) -> list[dict[str, Any]]:
    """Make N noise images with boxes of 16 to 256 pixels."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for _ in range(setting.batch):
        instances = _draw_boxes(setting, generator)
        image = torch.randint(0, 256, (3, setting.size, setting.size), generator=generator).byte()
        batch.append({"image": image, "instances": instances, "height": setting.size, "width": setting.size})
    return batch


def _draw_boxes(setting: Setting, generator: torch.Generator) -> Instances:
    sides = (16 * 16 ** torch.rand(setting.boxes, 2, generator=generator)).clamp(max=setting.size)
    low = torch.rand(setting.boxes, 2, generator=generator) * (setting.size - sides)
    instances = Instances((setting.size, setting.size))
    instances.gt_boxes = Boxes(torch.cat([low, low + sides], 1))
    instances.gt_classes = torch.randint(0, setting.classes, (setting.boxes,), generator=generator)
    return instances


def _precision(setting: Setting) -> contextlib.AbstractContextManager[Any]:
    """detectron2's way to lower precision, which it has on CUDA only."""
    device = torch.device(setting.device).type
    return torch.autocast(device, torch.bfloat16, enabled=setting.precision == "bf16" and device == "cuda")


def _images(setting: Setting) -> ImageList:
    """Images without content, where only their size matters."""
    shape = (setting.batch, 1, setting.size, setting.size)
    return ImageList(torch.empty(shape, device=setting.device), [shape[2:]] * setting.batch)


def _levels(pair: Pair, setting: Setting) -> list[Tensor]:
    """Stand-ins (1, 1, H, W) for the features."""
    sides = [-(-setting.size // stride) for stride in pair.detectron2.anchor_generator.strides]
    return [torch.empty(1, 1, side, side, device=setting.device) for side in sides]


def _random_outputs(
    pair: Pair, setting: Setting, per_anchor: int, mean: float, std: float, dtype: torch.dtype
) -> list[Tensor]:
    """L × (N, A · per_anchor, H, W), normally distributed."""
    generator = torch.Generator(setting.device).manual_seed(0)
    per_cell = pair.ours.anchor_generator.num_anchors
    outputs = []
    for x, anchors in zip(_levels(pair, setting), per_cell, strict=True):
        shape = (setting.batch, anchors * per_anchor, *x.shape[-2:])
        drawn = torch.randn(shape, generator=generator, device=setting.device)
        outputs.append(drawn.mul_(std).add_(mean).to(dtype))
    return outputs


def time_loss(cfg: CfgNode, setting: Setting) -> list[Row]:
    """Classification loss, forward and backward, from the head's output (both bf16 if asked) to its gradient.

    Raises:
        UserError: for a loss that detectron2 has not.
    """
    if cfg.MODEL.FOCAL.LOSS.NAME != "focal" or isinstance(cfg.MODEL.FOCAL.LOSS.ALPHA, (list, tuple, str)):
        raise UserError("detectron2 has but one loss: MODEL.FOCAL.LOSS.NAME focal, ALPHA a number")
    pair = build_pair(cfg, setting)
    ours = pair.ours
    anchors = ours.anchors_for(_images(setting))
    targets = ours.label_anchors(anchors, [x["instances"].to(setting.device) for x in make_batch(setting)])
    positives = targets.positives()
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    # As the head gives them in its first iterations.
    logits = [x.requires_grad_() for x in _random_outputs(pair, setting, setting.classes, -4.6, 1.0, dtype)]
    batch = DenseBatch(
        logits=logits,
        num_logits=setting.classes,
        labels=targets.labels,
        positive=targets.positive,
        **positives._asdict(),
        deltas=_random_outputs(pair, setting, 4, 0.0, 0.2, dtype),
        anchors=anchors.boxes,
        decode=ours.box2box_transform.apply_deltas,
    )
    alpha, gamma = ours.cls_loss.alpha, ours.cls_loss.gamma

    def detectron2_loss() -> tuple[Tensor, ...]:
        # As RetinaNet.forward_training and RetinaNet.losses have it.
        flat = torch.cat([permute_to_N_HWA_K(x, setting.classes) for x in logits], dim=1)
        valid = targets.labels >= 0
        one_hot = F.one_hot(targets.labels[valid], num_classes=setting.classes + 1)[:, :-1]
        loss = sigmoid_focal_loss_jit(
            flat[valid], one_hot.to(flat.dtype), alpha=alpha, gamma=gamma, reduction="sum"
        )
        return torch.autograd.grad(loss / 100, logits)

    def own_loss() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours.cls_loss(batch) / 100, logits)

    size = sum(x.numel() * x.element_size() for x in logits)
    runs = {"ours": own_loss, "detectron2": detectron2_loss}
    if torch.device(setting.device).type == "cuda":
        times = take_turns(runs, setting)
        # The logits are read and the gradient is written.
        times["limit"] = 2 * size / copy_bandwidth(setting)
        limit_is = "reading the logits and writing the gradient at the measured copy bandwidth"
    else:
        times = take_turns({**runs, "limit": lambda: [torch.sigmoid(x.detach()) for x in logits]}, setting)
        limit_is = "one pass of sigmoid over the logits"
    return [
        _timed(
            "loss",
            times,
            limit_is,
            ours_bytes=peak_bytes(own_loss, setting.device),
            detectron2_bytes=peak_bytes(detectron2_loss, setting.device),
            limit_bytes=size,
        )
    ]


def copy_bandwidth(setting: Setting) -> float:
    """Bytes a second that a copy on the device reads and writes, both counted."""
    source = torch.empty(_COPIED // 4, device=setting.device)
    target = torch.empty_like(source)
    seconds = take_turns({"copy": lambda: target.copy_(source)}, setting)["copy"]
    return 2 * _COPIED / seconds


def time_assign(cfg: CfgNode, setting: Setting) -> list[Row]:
    """Labels of all anchors and matched boxes: detectron2's of all, ours of the positives."""
    pair = build_pair(cfg, setting)
    features = _levels(pair, setting)
    instances = [x["instances"].to(setting.device) for x in make_batch(setting)]
    anchors = pair.ours.anchors_for(_images(setting))
    boxes = pair.detectron2.anchor_generator(features)

    def own_labels() -> None:
        pair.ours.label_anchors(anchors, instances).positives()

    def detectron2_labels() -> None:
        pair.detectron2.label_anchors(boxes, instances)

    shape = (setting.batch, len(anchors.boxes))
    times = take_turns(
        {
            "ours": own_labels,
            "detectron2": detectron2_labels,
            "limit": lambda: torch.full(shape, setting.classes, device=setting.device),
        },
        setting,
    )
    return [
        _timed(
            f"assign, {shape[1]} anchors",
            times,
            "filling the labels",
            ours_bytes=peak_bytes(own_labels, setting.device),
            detectron2_bytes=peak_bytes(detectron2_labels, setting.device),
        )
    ]


class _Steps(NamedTuple):
    """A training step without the optimizer: forward, losses, backward; and the network's part of it."""

    ours: Callable[[], None]
    detectron2: Callable[[], None]
    limit: Callable[[], None]


_NETWORK = "backbone and head alone, forward and backward of their outputs' sum"


def _steps(cfg: CfgNode, setting: Setting) -> _Steps:
    pair = build_pair(cfg, setting)
    batch = make_batch(setting)

    def clear(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None

    def own_step() -> None:
        with EventStorage():
            sum(pair.ours(batch).values()).backward()
        clear(pair.ours)

    def detectron2_step() -> None:
        with EventStorage(), _precision(setting):
            losses = pair.detectron2(batch)
        sum(losses.values()).backward()
        clear(pair.detectron2)

    def network() -> None:
        images = pair.ours.preprocess_image(batch)
        with pair.ours.precision():
            outputs = pair.ours.network(images)[1]
        torch.stack([x.sum(dtype=torch.float32) for level in outputs for x in level]).sum().backward()
        clear(pair.ours)

    return _Steps(own_step, detectron2_step, network)


def time_step(cfg: CfgNode, setting: Setting) -> list[Row]:
    """A training step without the optimizer."""
    times = take_turns(_steps(cfg, setting)._asdict(), setting)
    return [_timed("step", times, _NETWORK)]


def measure_memory(cfg: CfgNode, setting: Setting) -> list[Row]:
    """Most memory that a training step takes beyond weights and buffers, and what is not the network's."""
    return [_step_memory(cfg, setting), _losses_memory(cfg, setting)]


def _step_memory(cfg: CfgNode, setting: Setting) -> Row:
    ours, theirs, network = (peak_bytes(run, setting.device) for run in _steps(cfg, setting))
    return Row(
        "memory of a step",
        limit_is=_NETWORK,
        ours_bytes=ours,
        detectron2_bytes=theirs,
        limit_bytes=network,
    )


def _losses_memory(cfg: CfgNode, setting: Setting) -> Row:
    """From boxes and the head's output to the output's gradient: assignment, both losses, backward."""
    pair = build_pair(cfg, setting)
    images, features = _images(setting), _levels(pair, setting)
    instances = [x["instances"].to(setting.device) for x in make_batch(setting)]
    dtype = torch.bfloat16 if setting.precision == "bf16" else torch.float32
    logits = _random_outputs(pair, setting, setting.classes, -4.6, 1.0, dtype)
    outputs = [logits, _random_outputs(pair, setting, 4, 0.0, 0.2, dtype)]
    leaves = [x.requires_grad_() for level in outputs for x in level]

    def own_losses() -> tuple[Tensor, ...]:
        anchors = pair.ours.anchors_for(images)
        targets = pair.ours.label_anchors(anchors, instances)
        losses = pair.ours._losses(outputs, anchors, targets, seeds=range(setting.batch))
        return torch.autograd.grad(list(losses.values()), leaves)

    def detectron2_losses() -> tuple[Tensor, ...]:
        with EventStorage():
            losses = pair.detectron2.forward_training(images, features, outputs, instances)
        return torch.autograd.grad(list(losses.values()), leaves)

    return Row(
        "memory of assignment and losses",
        limit_is="the logits",
        ours_bytes=peak_bytes(own_losses, setting.device),
        detectron2_bytes=peak_bytes(detectron2_losses, setting.device),
        limit_bytes=sum(x.numel() * x.element_size() for x in logits),
    )


def time_inference(cfg: CfgNode, setting: Setting) -> list[Row]:
    """From the head's output to detections, and the whole way from images."""
    pair = build_pair(cfg, setting)
    batch = make_batch(setting)
    for model in pair:
        model.eval()
    with torch.no_grad():
        _set_logits(pair, batch)
        after = take_turns(_after_network(pair, setting, _LOGIT_MEAN, _LOGIT_STD), setting)

        def detectron2_whole() -> None:
            with _precision(setting):
                pair.detectron2(batch)

        def network() -> None:
            with pair.ours.precision():
                pair.ours.network(pair.ours.preprocess_image(batch))

        whole = take_turns(
            {"ours": lambda: pair.ours(batch), "detectron2": detectron2_whole, "limit": network}, setting
        )
    return [
        _timed("post-processing", after, _LARGEST),
        _timed("inference", whole, "backbone and head alone"),
    ]


def time_postprocessing(cfg: CfgNode, setting: Setting) -> list[Row]:
    """From the head's output to detections where many scores exceed the threshold, for several thresholds."""
    pair = build_pair(cfg, setting)
    rows = []
    with torch.no_grad():
        runs = _after_network(pair, setting, _EARLY_MEAN, _EARLY_STD)
        for threshold in _THRESHOLDS:
            for model in pair:
                model.eval().test_score_thresh = threshold
            rows.append(
                _timed(f"post-processing, scores above {threshold}", take_turns(runs, setting), _LARGEST)
            )
    return rows


_LARGEST = "finding the largest logit"


def _after_network(pair: Pair, setting: Setting, mean: float, std: float) -> dict[str, Callable[[], Any]]:
    """From the head's output, with logits of this mean and deviation, to detections."""
    images, features = _images(setting), _levels(pair, setting)
    logits = _random_outputs(pair, setting, setting.classes, mean, std, torch.float32)
    deltas = _random_outputs(pair, setting, 4, 0.0, 0.2, torch.float32)

    def detectron2_detections() -> list[Instances]:
        # It writes into the logits of a level of one cell or one channel: its permutation is a view of them.
        theirs = [x.clone() if 1 in (x.shape[1], x.shape[2:].numel()) else x for x in logits]
        return pair.detectron2.forward_inference(images, features, [theirs, deltas])

    return {
        "ours": lambda: pair.ours.forward_inference(images, features, [logits, deltas]),
        "detectron2": detectron2_detections,
        "limit": lambda: [x.amax() for x in logits],
    }


def _set_logits(pair: Pair, batch: list[dict[str, Any]]) -> None:
    """Scale the last classification layer of both so that an untrained network has candidates."""
    layer = pair.ours.head.cls_score
    logits = torch.cat([x.flatten() for x in pair.ours.network(pair.ours.preprocess_image(batch))[1][0]])
    layer.weight.mul_(_LOGIT_STD / logits.float().std())
    layer.bias.fill_(_LOGIT_MEAN)
    pair.detectron2.head.cls_score.load_state_dict(layer.state_dict())


def time_input(cfg: CfgNode, setting: Setting) -> list[Row]:
    """From a file to the model's input in one worker: ours with INPUT.FOCAL.BACKEND opencv."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.FOCAL.BACKEND = "opencv"
    cfg.INPUT.MIN_SIZE_TRAIN = cfg.INPUT.MIN_SIZE_TRAIN[-1:]
    mappers = {"ours": FocalDatasetMapper(cfg, True), "detectron2": DatasetMapper(cfg, True)}
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)  # as a worker has
    cv2.setNumThreads(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("jpg", "png"):
            records = _write_images(Path(folder), kind, setting)
            files = [record["file_name"] for record in records]
            runs: dict[str, Callable[[], Any]] = {
                "ours": partial(_each, mappers["ours"], records),
                "detectron2": partial(_each, mappers["detectron2"], records),
                "limit": partial(_each, cv2.imread, files),
            }
            times = take_turns(runs, setting)
            shape = f"{setting.size} × {records[0]['height']} to {cfg.INPUT.MIN_SIZE_TRAIN[0]}"
            rows.append(_timed(f"input, {setting.batch} {kind} of {shape}", times, "decoding alone"))
    torch.set_num_threads(threads[0])
    cv2.setNumThreads(threads[1])
    return rows


def _each(function: Callable[[Any], Any], items: list[Any]) -> None:
    for item in items:
        function(item)


def _write_images(folder: Path, kind: str, setting: Setting) -> list[dict[str, Any]]:
    """Write N images about as hard to decode as photographs; return their records."""
    random = np.random.default_rng(0)
    records = []
    for i, sample in enumerate(make_batch(setting)):
        height = setting.size * 3 // 4
        coarse = cv2.GaussianBlur(random.normal(0, 1, (height, setting.size, 3)), (0, 0), 4)
        image = 128 + coarse / coarse.std() * 40 + random.normal(0, 4, coarse.shape)
        path = folder / f"{i}.{kind}"
        write_image(path, image.clip(0, 255).astype(np.uint8))
        boxes = sample["instances"].gt_boxes
        boxes.clip((height, setting.size))
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for box in boxes.tensor.tolist()
        ]
        records.append(
            {"file_name": str(path), "height": height, "width": setting.size, "annotations": annotations}
        )
    return records


def time_evaluation(cfg: CfgNode, setting: Setting) -> list[Row]:
    """From a list of predictions to COCO's metrics: ours, and detectron2's evaluator with pycocotools."""
    name = "benchmark_of_evaluation"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        content, found = make_predictions(setting, cfg.TEST.DETECTIONS_PER_IMAGE)
        path.write_text(json.dumps(content))
        MetadataCatalog.get(name).set(
            json_file=str(path), thing_classes=[str(k) for k in range(setting.classes)]
        )

        def evaluating(kind: type[COCOEvaluator], **kwargs: Any) -> Callable[[], Any]:
            evaluator = kind(name, ("bbox",), False, **kwargs)
            evaluator.reset()
            for image_id, instances in enumerate(found):
                evaluator.process([{"image_id": image_id}], [{"instances": instances}])
            return partial(_silently, evaluator.evaluate)

        ours = evaluating(FocalCOCOEvaluator)
        columns = _columns_of(content, found)
        times = take_turns(
            {
                "ours": ours,
                "detectron2": evaluating(COCOEvaluator, use_fast_impl=False),
                "limit": partial(coco_curves, *columns, backend="hotcoco", max_dets=(1, 10, 100)),
            },
            setting,
        )
        with_files = take_turns(
            {
                "ours": evaluating(FocalCOCOEvaluator, output_dir=folder),
                "detectron2": evaluating(COCOEvaluator, use_fast_impl=False, output_dir=folder),
                "limit": ours,
            },
            setting,
        )
    MetadataCatalog.remove(name)
    size = f"{setting.batch} images × {cfg.TEST.DETECTIONS_PER_IMAGE}"
    return [
        _timed(f"evaluation, {size}", times, "hotcoco, from columns of numbers to its arrays"),
        _timed("the same with files, of ours also analysis.json", with_files, "without files"),
    ]


def _silently(run: Callable[[], Any]) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        return run()


def make_predictions(setting: Setting, detections: int) -> tuple[dict[str, Any], list[Instances]]:
    """Make ground truth as a COCO file's content, and of each image as many detections around its boxes.

    Args:
        setting: N images, K classes, boxes an image.
        detections: an image.
    """
    random, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    found = []
    annotations: list[dict[str, Any]] = []
    for i in range(setting.batch):
        there = _draw_boxes(setting, generator)
        boxes, labels = there.gt_boxes.tensor.numpy(), there.gt_classes.numpy()
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            width, height = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": [*box[:2], width, height],
                    "area": width * height,
                    "iscrowd": int(random.random() < 0.01),
                }
            )
        near = random.integers(0, len(boxes), detections)
        sides = np.tile(boxes[near, 2:] - boxes[near, :2], 2)
        moved = boxes[near] + sides * random.normal(0, 0.1, (detections, 4))
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        other = random.integers(0, setting.classes, detections)
        instances = Instances(there.image_size)
        instances.pred_boxes = Boxes(torch.from_numpy(moved))
        instances.scores = torch.from_numpy(np.sort(random.beta(0.5, 3, detections))[::-1].copy())
        instances.pred_classes = torch.from_numpy(
            np.where(random.random(detections) < 0.7, labels[near], other)
        )
        found.append(instances)
    content = {
        "images": [{"id": i, "width": setting.size, "height": setting.size} for i in range(setting.batch)],
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(setting.classes)],
    }
    return content, found


def _columns_of(content: dict[str, Any], found: list[Instances]) -> tuple[Truth, Detections]:
    annotations = content["annotations"]
    boxes = np.concatenate([x.pred_boxes.tensor.numpy() for x in found])
    boxes[:, 2:] -= boxes[:, :2]
    return (
        Truth(
            len(content["images"]),
            len(content["categories"]),
            *(
                np.array([a[key] for a in annotations])
                for key in ("image_id", "bbox", "category_id", "area", "iscrowd")
            ),
        ),
        Detections(
            np.repeat(np.arange(len(found)), [len(x) for x in found]),
            boxes,
            torch.cat([x.pred_classes for x in found]).numpy(),
            torch.cat([x.scores for x in found]).numpy(),
        ),
    )


BENCHMARKS: dict[str, Callable[[CfgNode, Setting], list[Row]]] = {
    "loss": time_loss,
    "assign": time_assign,
    "step": time_step,
    "inference": time_inference,
    "postprocessing": time_postprocessing,
    "input": time_input,
    "memory": measure_memory,
    "evaluation": time_evaluation,
}


# What a sweep goes over.
SWEEP = {
    "size": (128, 256, 384, 512),
    "batch": (1, 2, 4, 8),
    "classes": (1, 20, 80, 365, 1203),
    "boxes": (1, 10, 100, 1000),
}


def sweep(cfg: CfgNode, setting: Setting) -> Iterator[dict[str, Any]]:
    """Time a step, and take its memory, over one field of the setting after another (`SWEEP`).

    Args:
        cfg: full config of ours.
        setting: where the other fields stay.

    Yields:
        The field, its value and the figures.
    """
    for field, choices in SWEEP.items():
        for value in choices:
            at = setting._replace(**{field: value})  # type: ignore[arg-type]
            (step,), memory = time_step(cfg, at), _step_memory(cfg, at)
            kept = {k: v for k, v in memory._asdict().items() if k.endswith("_bytes")}
            yield {"field": field, "value": value, **step._replace(**kept).as_dict()}
