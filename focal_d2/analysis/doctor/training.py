"""How a dataset fits a model: boxes compared with anchors, the learning rate, memory.

N images, B boxes, L levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import ImageList
from torch import Tensor

from focal_d2.analysis.anchors.coverage import best_anchors, grids_of
from focal_d2.annotations import Table
from focal_d2.config.architectures import is_retinanet
from focal_d2.data.checks.examples import box_examples
from focal_d2.data.checks.findings import Example, Finding, Fix, share
from focal_d2.data.resolution import TrainingBoxes, training_boxes, training_inputs
from focal_d2.data.sampling import training_table
from focal_d2.detectron2_compat import storage_number
from focal_d2.errors import first_few
from focal_d2.modeling import FocalRetinaNet
from focal_d2.modeling.anchors import build_layout
from focal_d2.modeling.assigners import assigner_name, build_assigner
from focal_d2.modeling.label_counts import LabelCounts, count_labels
from focal_d2.modeling.precision import configured_type

# The paper, section 4.1, and detectron2's baselines: SGD at these rates for 16 images a step. Batches of
# another size scale them linearly (arXiv 1706.02677, section 2.1).
_RATES, _RATE_IMAGES = {"FocalRetinaNet": 0.01, "RetinaNet": 0.01, "GeneralizedRCNN": 0.02}, 16
_RATE_OFF = 2.0

# Shares of boxes that are worth a warning.
_TINY = 0.01
_LONG, _LONG_RATIO = 0.05, 5.0
_WITHOUT_ANCHOR = 0.2
_CLASS_WITHOUT_ANCHOR, _CLASS_BOXES = 0.5, 10

_IOU_BINS = 20
_OPTIMIZE = Fix("anchors that fit the boxes: focal-d2 anchors prints the lines to set")


class Share(NamedTuple):
    """The boxes of one kind, and how many of them have an anchor."""

    name: str
    boxes: int
    with_anchor: int


class Level(NamedTuple):
    """A level of the pyramid."""

    stride: int
    anchors: list[tuple[float, float]]  # width and height of each, in pixels
    best_for: list[int]  # of each anchor, the boxes for which it is the best one
    positives: int
    negatives: int


@dataclass(frozen=True)
class AnchorFacts:
    """Training boxes, at training resolution, compared with the model's anchors."""

    threshold: float  # IoU from which a box has an anchor, which the assigner iou makes positive
    boxes: int
    with_anchor: int
    by_size: list[Share]
    by_class: list[Share]
    best_iou: list[int]  # boxes in 20 bins of IoU from 0 to 1
    levels: list[Level]
    images_counted: int  # for positives and negatives
    positives: int
    negatives: int
    # Of negatives to positives; None without positives.
    ratio: float | None
    alpha: float | None
    # 5, 50 and 95 % quantiles at training resolution.
    side: list[float]  # square root of the area, pixels
    aspect: list[float]  # height to width
    extents: np.ndarray = field(repr=False)  # (B, 2), width and height of each


@dataclass(frozen=True)
class MemoryFacts:
    """Bytes of a training step on one device, weights and optimizer included."""

    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    images: int
    height: int
    width: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def anchor_facts(cfg: CfgNode, train: Mapping[str, Table]) -> tuple[AnchorFacts | None, list[Finding]]:
    """Compare the boxes to train on with the model's anchors.

    Args:
        cfg: full config.
        train: the datasets to train on, by name.

    Returns:
        The facts, None if there is no box or the model is no RetinaNet; and the findings.

    Raises:
        UserError: for a crop that detectron2 does not have, or anchors of an unknown kind.
    """
    if not is_retinanet(cfg):
        return None, []
    layout = build_layout(cfg)
    grids = grids_of(layout)
    threshold = cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
    if not train:
        return None, []
    table = training_table(cfg, train.items())
    seen = training_boxes(cfg, table)
    if not len(seen.boxes):
        return None, []
    counts = count_labels(seen.boxes, seen.image, seen.sizes, layout=layout, assigner=build_assigner(cfg))
    iou, level, anchor = best_anchors(seen.boxes, seen.image, seen.sizes, grids)
    extent = seen.boxes[:, 2:] - seen.boxes[:, :2]
    side, aspect = np.sqrt(extent.prod(1)), extent[:, 1] / extent[:, 0]
    matched = iou >= threshold
    m, n = sum(counts.positives), sum(counts.negatives)
    facts = AnchorFacts(
        threshold=threshold,
        boxes=len(iou),
        with_anchor=int(matched.sum()),
        by_size=_by_size(side, matched),
        by_class=_by_class(table.classes, table.labels[seen.rows], matched),
        best_iou=np.histogram(iou, _IOU_BINS, (0, 1))[0].tolist(),
        levels=[
            Level(
                stride,
                [(float(w), float(h)) for w, h in shapes],
                [int(((level == i) & (anchor == a)).sum()) for a in range(len(shapes))],
                counts.positives[i],
                counts.negatives[i],
            )
            for i, (stride, shapes) in enumerate(zip(layout.strides, grids.shapes, strict=True))
        ],
        images_counted=counts.images,
        positives=m,
        negatives=n,
        ratio=n / m if m else None,
        alpha=n / (n + m) if m else None,
        side=np.quantile(side, (0.05, 0.5, 0.95)).tolist(),
        aspect=np.quantile(aspect, (0.05, 0.5, 0.95)).tolist(),
        extents=extent,
    )
    worst = functools.partial(_worst, table, seen)
    findings = _check_sizes(facts, side, min(layout.strides), worst)
    assigner = assigner_name(cfg)
    if assigner == "iou":
        findings += _check_anchors(facts, aspect, matched, worst)
    else:
        findings.append(_other_assigner(assigner, threshold, counts))
    return facts, findings + _check_imbalance(facts)


def _worst(table: Table, seen: TrainingBoxes, mask: np.ndarray, badness: np.ndarray) -> list[Example]:
    """Return the worst boxes as examples.

    Args:
        table: the annotations.
        seen: M boxes of the table at training resolution.
        mask: (M,) bool, the boxes to choose from.
        badness: (M,) float; the highest are the worst.
    """
    chosen, badness_of = np.zeros(len(table.boxes), dtype=bool), np.zeros(len(table.boxes))
    chosen[seen.rows], badness_of[seen.rows] = mask, badness

    def text(row: int) -> str:
        left, top, right, bottom = seen.boxes[np.searchsorted(seen.rows, row)]
        return f"{right - left:.1f} × {bottom - top:.1f} pixels at training resolution"

    return box_examples(table, chosen, text, worst=badness_of)


def _by_size(side: np.ndarray, matched: np.ndarray) -> list[Share]:
    """Group boxes by their side, with limits at powers of two."""
    octave = np.floor(np.log2(side.clip(min=1e-3))).astype(int).clip(2, 10)
    shares = []
    for k in range(octave.min(), octave.max() + 1):
        in_group = octave == k
        name = (
            f"below {2 ** (k + 1)}" if k == 2 else f"from {2**k}" if k == 10 else f"{2**k} to {2 ** (k + 1)}"
        )
        shares.append(Share(name, int(in_group.sum()), int(matched[in_group].sum())))
    return shares


def _by_class(names: Sequence[str], label: np.ndarray, matched: np.ndarray) -> list[Share]:
    # Another check reports labels that are no class; here they count for none.
    label = np.where((label >= 0) & (label < len(names)), label, len(names))
    boxes = np.bincount(label, minlength=len(names))
    hits = np.bincount(label[matched], minlength=len(names))
    shares = [Share(name, int(b), int(h)) for name, b, h in zip(names, boxes, hits, strict=False) if b]
    return sorted(shares, key=lambda s: -s.boxes)


def _other_assigner(name: str, threshold: float, counts: LabelCounts) -> Finding:
    message = (
        f"MODEL.FOCAL.ASSIGNER.NAME is {name}: positive and negative anchors are those of {name}, and "
        f"{share(counts.unmatched, counts.boxes)} boxes get no positive anchor; what has an anchor counts "
        f"IoUs of at least {threshold:g}, which {name} does not require"
    )
    return Finding("assigner", message)


def _check_sizes(
    facts: AnchorFacts,
    side: np.ndarray,
    finest: int,
    worst: Callable[[np.ndarray, np.ndarray], list[Example]],
) -> list[Finding]:
    tiny = facts.extents.max(1) < finest / 2
    if tiny.sum() < _TINY * facts.boxes:
        return []
    message = (
        f"{share(int(tiny.sum()), facts.boxes)} boxes are shorter than {finest / 2:g} pixels at training "
        f"resolution; the finest level has a cell every {finest} pixels"
    )
    return [Finding("box-tiny", message, count=int(tiny.sum()), examples=worst(tiny, -side))]


def _check_anchors(
    facts: AnchorFacts,
    aspect: np.ndarray,
    matched: np.ndarray,
    worst: Callable[[np.ndarray, np.ndarray], list[Example]],
) -> list[Finding]:
    findings = []
    boxes = facts.boxes
    elongation = np.maximum(aspect, 1 / aspect)
    long = (elongation >= _LONG_RATIO) & ~matched
    if long.sum() >= _LONG * boxes:
        message = (
            f"{share(int(long.sum()), boxes)} boxes are at least {_LONG_RATIO:g} times as long as wide and "
            f"have no anchor of IoU {facts.threshold:g}"
        )
        examples = worst(long, elongation)
        findings.append(
            Finding("box-long", message, count=int(long.sum()), examples=examples, fixes=[_OPTIMIZE])
        )
    missed = boxes - facts.with_anchor
    if missed > _WITHOUT_ANCHOR * boxes:
        message = f"{share(missed, boxes)} boxes have no anchor of IoU {facts.threshold:g}"
        findings.append(Finding("anchor-recall", message, count=missed, fixes=[_OPTIMIZE]))
    poor = [
        s
        for s in facts.by_class
        if s.boxes >= _CLASS_BOXES and s.with_anchor < (1 - _CLASS_WITHOUT_ANCHOR) * s.boxes
    ]
    if poor and len(facts.by_class) > 1:
        listed = first_few([f"{s.name} ({s.boxes - s.with_anchor} of {s.boxes})" for s in poor], 10)
        message = f"classes whose boxes mostly have no anchor of IoU {facts.threshold:g}: {listed}"
        findings.append(Finding("anchor-recall-class", message, count=len(poor), fixes=[_OPTIMIZE]))
    return findings


def _check_imbalance(facts: AnchorFacts) -> list[Finding]:
    if facts.ratio is None:
        return []
    message = (
        f"{facts.positives} positive and {facts.negatives} negative anchors in {facts.images_counted} images "
        f"without crops, {odds(facts.ratio)}: α {facts.alpha:.4f} would balance them; focal loss needs no "
        "such α, it was best with 0.25 (paper, table 1b)"
    )
    return [Finding("imbalance", message)]


def odds(ratio: float) -> str:
    """Write the number of negatives for each positive as "1 : number"."""
    return f"1 : {ratio:.0f}" if ratio >= 10 else f"1 : {ratio:.1f}"


def check_learning_rate(
    *, architecture: str | None, optimizer: str, base_lr: float, images: int
) -> list[Finding]:
    """Compare the learning rate with the linear rule.

    Args:
        architecture: of `known_architecture`.
        optimizer: "SGD" or "AdamW".
        base_lr: `SOLVER.BASE_LR`.
        images: `SOLVER.IMS_PER_BATCH`.
    """
    rate = _RATES.get(architecture or "")
    if optimizer != "SGD" or rate is None:
        which = optimizer if optimizer != "SGD" else "this meta-architecture"
        message = f"SOLVER.BASE_LR {base_lr:g} with {which}: there is no rule to check it with"
        return [Finding("learning-rate-unchecked", message)]
    rule = rate * images / _RATE_IMAGES
    if 1 / _RATE_OFF <= base_lr / rule <= _RATE_OFF:
        return []
    factor = f"{base_lr / rule:.3g} times" if base_lr else "0 instead of"
    message = (
        f"SOLVER.BASE_LR {base_lr:g} is {factor} the {rule:g} of the linear rule for SOLVER.IMS_PER_BATCH "
        f"{images} with SGD"
    )
    fix = Fix(f"linear rule: {rate} · {images} / {_RATE_IMAGES} images", "SOLVER.BASE_LR", rule)
    return [Finding("learning-rate", message, fixes=[fix])]


def memory_facts(cfg: CfgNode, model: Any, train: Mapping[str, Table]) -> MemoryFacts | None:
    """Estimate the memory of a training step on one device.

    Weights, gradients and optimizer are exact. Activations are the tensors that autograd keeps in backbone
    and head, for a batch of the largest image at the largest size of `INPUT.*`, and the gradients of the
    head's output. They count half if autocast lowers the precision. The sum is an upper estimate: the
    backward pass frees activations while it allocates gradients.

    Args:
        cfg: full config.
        model: of `build_without_memory`.
        train: the datasets to train on, by name.

    Returns:
        The facts, None without images or for another meta-architecture than ours.
    """
    sizes: Sequence[np.ndarray] = [table.sizes for table in train.values() if len(table)]
    if not sizes or not isinstance(model, FocalRetinaNet):
        return None
    largest = cfg.clone()
    largest.defrost()
    largest.INPUT.MIN_SIZE_TRAIN = (max(cfg.INPUT.MIN_SIZE_TRAIN),)
    largest.INPUT.FOCAL.SCALE_JITTER = [max(cfg.INPUT.FOCAL.SCALE_JITTER)] * 2
    seen = training_inputs(largest, np.concatenate(sizes)).sizes
    divisibility = max(model.backbone.size_divisibility, 1)
    seen = -(-seen // divisibility) * divisibility
    height, width = seen[seen.prod(1).argmax()].tolist()
    images = cfg.SOLVER.IMS_PER_BATCH
    shape = (images, len(cfg.MODEL.PIXEL_MEAN), height, width)
    activations = _kept_for_backward(model.train(), shape)
    precision = configured_type(cfg)
    weights = sum(x.numel() * x.element_size() for x in [*model.parameters(), *model.buffers()])
    trained = [x for x in model.parameters() if x.requires_grad]
    gradients = sum(x.numel() * x.element_size() for x in trained)
    return MemoryFacts(
        parameters=sum(x.numel() for x in model.parameters()),
        trained=sum(x.numel() for x in trained),
        weights=weights,
        gradients=gradients,
        # SGD keeps the momentum, AdamW two moments.
        optimizer=gradients * (2 if cfg.SOLVER.FOCAL.OPTIMIZER == "AdamW" else 1),
        activations=activations if precision is None else activations // 2,
        images=images,
        height=height,
        width=width,
    )


def _kept_for_backward(model: Any, shape: tuple[int, int, int, int]) -> int:
    """Count the bytes that autograd keeps for the backward pass, and those of the outputs' gradients."""
    weights = {storage_number(x) for x in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: Tensor) -> Tensor:
        if (number := storage_number(x)) not in weights:
            kept[number] = x.untyped_storage()
        return x

    batch = torch.empty(shape, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = model.network(ImageList(batch, [shape[2:]] * shape[0]))[1]
    gradients = sum(x.numel() * x.element_size() for level in outputs for x in level)
    return sum(storage.nbytes() for storage in kept.values()) + gradients
