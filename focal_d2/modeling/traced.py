"""Detection in a form that PyTorch can record: `torch.jit.trace`, `torch.export` and both ONNX exporters.

The recorded graph must be right for images of other sizes and for other numbers of candidates. So no value
that depends on the image becomes a Python number, and every step exists as an operator of ONNX.

Shapes: N images, L levels, A anchors a cell, C logits an anchor, R anchors a level, K classes, E logits above
the threshold, T candidates of an image and level (`test_topk_candidates`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

if TYPE_CHECKING:
    from focal_d2.modeling.losses import ClassificationLoss
    from focal_d2.modeling.retinanet import FocalRetinaNet


def is_recording() -> bool:
    """Return whether PyTorch records the operators that run now, to run them later on other images."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def detect(model: FocalRetinaNet, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Instances]]:
    """Return the same detections as the model in evaluation; every step can be recorded.

    Args:
        model: in evaluation mode.
        batched_inputs: N dicts with "image" (channels, H, W) and, optionally, "height" and "width".
    """
    images = _pad(model, batched_inputs)
    features, (logits, deltas) = model.network(images)
    with torch.autocast(model.device.type, enabled=False):
        anchors = [boxes.tensor for boxes in model.anchor_generator(features)]
        results = []
        for i, (size, inputs) in enumerate(zip(images.image_sizes, batched_inputs, strict=True)):
            boxes, scores, labels = _candidates(
                model, [x[i] for x in logits], [x[i] for x in deltas], anchors
            )
            kept = _suppress(boxes, scores, labels, model.test_nms_thresh, model.num_classes)
            kept = kept[: model.max_detections_per_image]
            wanted = (inputs.get("height", size[0]), inputs.get("width", size[1]))
            results.append({"instances": _resize(boxes[kept], scores[kept], labels[kept], size, wanted)})
        return results


def _pad(model: FocalRetinaNet, batched_inputs: list[dict[str, Any]]) -> ImageList:
    """Normalise, pad and batch as `preprocess_image` does."""
    if torch.jit.is_tracing():  # then detectron2's code keeps sizes as tensors
        return model.preprocess_image(batched_inputs)
    images = [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in batched_inputs]
    sizes = [(x.shape[-2], x.shape[-1]) for x in images]
    constraints = model.backbone.padding_constraints or {}
    divisor = max(constraints.get("size_divisibility", model.backbone.size_divisibility), 1)
    square = constraints.get("square_size", 0)
    height, width = (square, square) if square > 0 else sizes[0]
    if square <= 0:
        for other_height, other_width in sizes[1:]:
            height, width = torch.sym_max(height, other_height), torch.sym_max(width, other_width)
    height, width = ((side + divisor - 1) // divisor * divisor for side in (height, width))
    batch = torch.stack([F.pad(x, (0, width - x.shape[-1], 0, height - x.shape[-2])) for x in images])
    layout = torch.channels_last if model.channels_last else torch.contiguous_format
    return ImageList(batch.contiguous(memory_format=layout), sizes)


def _candidates(
    model: FocalRetinaNet, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the candidates for detections in one image.

    Args:
        model: defines the meaning of logits and deltas, the threshold and T.
        logits: L × (A·C, H, W).
        deltas: L × (A·4, H, W).
        anchors: L × (R, 4) XYXY.

    Returns:
        Boxes (at most L·T, 4) XYXY in the padded image's pixels, their scores and labels.
    """
    parts = []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        anchor, label, score = _best_of_level(
            level_logits, model.cls_loss, model.test_score_thresh, model.test_topk_candidates
        )
        by_anchor = level_deltas.unflatten(0, (-1, 4)).permute(2, 3, 0, 1).reshape(-1, 4)  # (R, 4)
        parts.append((by_anchor[anchor], level_anchors[anchor], label, score))
    chosen_deltas, chosen_anchors, labels, scores = (torch.cat(field) for field in zip(*parts, strict=True))
    valid = (scores > -math.inf).nonzero().squeeze(1)
    boxes = model.box2box_transform.apply_deltas(chosen_deltas[valid], chosen_anchors[valid])
    return boxes, scores[valid], labels[valid]


def _best_of_level(
    logits: Tensor, cls_loss: ClassificationLoss, threshold: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the anchors, labels and scores, each (T,), of the best logits (A·C, H, W) of an image and level.

    If fewer than T scores are above the threshold, the remaining scores are -inf. So the results have a
    constant length, and only one operator has the length E, which depends on the image.
    """
    by_anchor = logits.unflatten(0, (-1, cls_loss.num_logits)).permute(2, 3, 0, 1)  # (H, W, A, C)
    cut = cls_loss.least_logit(threshold)
    if cut is None:
        values = cls_loss.probabilities(by_anchor.float()).flatten(0, 2)  # (R, K)
        anchor, label = (values > threshold).nonzero().unbind(1)
        score = values[anchor, label]
    else:  # most logits are far below the threshold: probabilities are computed of the others only
        # The comparison rounds the threshold to the logits' type, so it is lowered by the rounding error.
        cut -= abs(cut) * torch.finfo(logits.dtype).eps if math.isfinite(cut) else 0.0
        values = by_anchor.flatten(0, 2)
        anchor, label = (values > cut).nonzero().unbind(1)
        score = cls_loss.probabilities(values[anchor, label].float())
        score = torch.where(score > threshold, score, -math.inf)
    filler_scores = score.new_full((most,), -math.inf)
    score, best = torch.cat([score, filler_scores]).topk(most)
    filler = anchor.new_zeros(most)
    return torch.cat([anchor, filler])[best], torch.cat([label, filler])[best], score


def _suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, num_classes: int) -> Tensor:
    """Suppress boxes that overlap a better box of their class; return the indices of the others, best first.

    The boxes of each class are moved to a separate region of the plane. The regions form a square. If they
    formed a row, coordinates of the last of 1,203 classes would be so large that float32 rounds them to
    quarters of a pixel; ONNX has no NMS in float64.

    Args:
        boxes: (n, 4) XYXY.
        scores: (n,).
        labels: (n,) int64, in [0, K).
        threshold: IoU above which the box with the lower score is suppressed.
        num_classes: K.
    """
    side = math.ceil(math.sqrt(num_classes))
    sizes = torch.where(boxes.isfinite(), boxes.abs(), 0.0).flatten()
    region_side = torch.cat([sizes, sizes.new_zeros(1)]).max() * 2 + 1
    corner = torch.stack([labels % side, labels // side], dim=1) * region_side
    return nms(boxes + corner.repeat(1, 2), scores, threshold)


def _resize(boxes: Tensor, scores: Tensor, labels: Tensor, size: Any, wanted: tuple[Any, Any]) -> Instances:
    """Scale boxes (n, 4) from an image's size to the wanted size, clip them, and drop those without area.

    Sizes are (height, width), integers or tensors (). detectron2's `detector_postprocess` does the same.
    """
    x_scale, y_scale = wanted[1] / size[1], wanted[0] / size[0]
    x = (boxes[:, 0::2] * x_scale).clamp(min=0, max=wanted[1])
    y = (boxes[:, 1::2] * y_scale).clamp(min=0, max=wanted[0])
    boxes = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], dim=1)
    solid = ((x[:, 1] > x[:, 0]) & (y[:, 1] > y[:, 0])).nonzero().squeeze(1)
    # Assigning the fields would compare their lengths, which `torch.export` does not know; so would Boxes(…).
    result = Instances(_as_tensor(wanted))
    wrapped = Boxes(boxes.new_zeros(0, 4))
    wrapped.tensor = boxes[solid]
    result.get_fields().update(pred_boxes=wrapped, scores=scores[solid], pred_classes=labels[solid])
    return result


def _as_tensor(size: tuple[Any, Any]) -> Tensor:
    return torch.stack(
        [x if isinstance(x, Tensor) else torch.scalar_tensor(x, dtype=torch.int64) for x in size]
    )
