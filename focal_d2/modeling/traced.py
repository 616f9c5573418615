"""Detection in a form that PyTorch can record: `torch.jit.trace`, `torch.export` and both ONNX exporters.

The recorded graph must be right for other batches, for images of other sizes and for other numbers of
candidates. So no value that depends on the images becomes a Python number, and every step exists as an
operator of ONNX. All results have a constant length; what is missing has the score -inf.

Shapes: N images, L levels, A anchors a cell, C logits an anchor, R anchors a level, K classes, T candidates
of an image and level (`test_topk_candidates`), B = L·T, M detections of an image.
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
    best = _best_boxes(model, images)
    results = []
    for size, inputs, *of_image in zip(images.image_sizes, batched_inputs, *best, strict=True):
        boxes, scores, labels = of_image
        present = (scores > -math.inf).nonzero().squeeze(1)
        wanted = (inputs.get("height", size[0]), inputs.get("width", size[1]))
        results.append({"instances": _resize(boxes[present], scores[present], labels[present], size, wanted)})
    return results


def detect_batch(model: FocalRetinaNet, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the same detections as the model in evaluation; images have one size, and their number is free.

    Args:
        model: in evaluation mode.
        images: (N, channels, H, W) in [0, 255].

    Returns:
        Boxes (N, M, 4) XYXY in pixels of the images, scores (N, M) falling, labels (N, M) int64, and the
        number of detections of each image (N,) int64. Behind them boxes, scores and labels are 0.
    """
    height, width = images.shape[-2:]
    padded = _pad_batch(model, (images - model.pixel_mean) / model.pixel_std)
    boxes, scores, labels = _best_boxes(model, ImageList(padded, []))
    x, y = boxes[..., 0::2].clamp(min=0, max=width), boxes[..., 1::2].clamp(min=0, max=height)
    solid = (x[..., 1] > x[..., 0]) & (y[..., 1] > y[..., 0])
    scores, order = torch.where(solid, scores, -math.inf).topk(_most_detections(model))
    present = scores > -math.inf
    boxes = torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=2)
    boxes = torch.where(present.unsqueeze(2), _rows(boxes, order), 0.0)
    labels = torch.where(present, labels.gather(1, order), 0)
    return boxes, torch.where(present, scores, 0.0), labels, present.sum(1)


def _most_detections(model: FocalRetinaNet) -> int:
    """Return M; a number, where shapes are tensors while PyTorch records."""
    return min(model.max_detections_per_image, len(model.head_in_features) * model.test_topk_candidates)


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


def _pad_batch(model: FocalRetinaNet, images: Tensor) -> Tensor:
    """Pad images (N, C, H, W) below and on the right, as `preprocess_image` does."""
    constraints = model.backbone.padding_constraints or {}
    divisor = max(constraints.get("size_divisibility", model.backbone.size_divisibility), 1)
    square = constraints.get("square_size", 0)
    height, width = (square, square) if square > 0 else images.shape[-2:]
    height, width = ((side + divisor - 1) // divisor * divisor for side in (height, width))
    images = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
    layout = torch.channels_last if model.channels_last else torch.contiguous_format
    return images.contiguous(memory_format=layout)


def _best_boxes(model: FocalRetinaNet, images: ImageList) -> tuple[Tensor, Tensor, Tensor]:
    """Detect objects in padded images.

    Returns:
        Boxes (N, M, 4) XYXY in the padded images' pixels, scores (N, M) falling, -inf where there are fewer
        detections, and labels (N, M).
    """
    features, (logits, deltas) = model.network(images)
    with torch.autocast(model.device.type, enabled=False):
        anchors = [boxes.tensor for boxes in model.anchor_generator(features)]
        boxes, scores, labels = _candidates(model, logits, deltas, anchors)
        most = _most_detections(model)
        kept = _unsuppressed(boxes, scores, labels, model.test_nms_thresh, model.num_classes, most)
        is_kept = torch.zeros_like(scores).flatten().scatter(0, kept, 1.0).view_as(scores) > 0
        scores, order = torch.where(is_kept, scores, -math.inf).topk(most)
        return _rows(boxes, order), scores, labels.gather(1, order)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows of x (N, n, 4) that an index (N, m) names: (N, m, 4)."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, 4))


def _candidates(
    model: FocalRetinaNet, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the candidates for detections.

    Args:
        model: defines the meaning of logits and deltas, the threshold and T.
        logits: L × (N, A·C, H, W).
        deltas: L × (N, A·4, H, W).
        anchors: L × (R, 4) XYXY.

    Returns:
        Boxes (N, B, 4) XYXY in the padded images' pixels, scores (N, B), -inf where there are fewer, and
        labels (N, B).
    """
    parts = []
    for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        cell, a, label, score = _best_of_level(model, level_logits)
        height, width = level_deltas.shape[-2:]
        cells, per_cell = height * width, level_deltas.shape[1] // 4
        # Number j of an anchor's 4 deltas is at (4a + j) · H · W + cell.
        first = (a * 4 * cells + cell).unsqueeze(2)
        place = first + torch.arange(4, device=first.device) * cells  # (N, T, 4)
        chosen = level_deltas.flatten(1).gather(1, place.flatten(1)).view_as(place)
        parts.append((chosen, level_anchors[cell * per_cell + a], label, score))
    chosen_deltas, chosen_anchors, labels, scores = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    boxes = model.box2box_transform.apply_deltas(chosen_deltas.flatten(0, 1), chosen_anchors.flatten(0, 1))
    return boxes.view_as(chosen_anchors), scores, labels


def _best_of_level(model: FocalRetinaNet, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Find the best scores of a level (N, A·C, H, W) that are above the threshold; of equal ones the first.

    The best T pairs of anchor and class belong to the T anchors whose best class is best. So only one value
    of each anchor is sorted.

    Returns:
        Cell in [0, H·W), anchor of the cell in [0, A), label and score, each (N, T). If there are fewer than
        T, the other scores are -inf.
    """
    cls_loss, most = model.cls_loss, model.test_topk_candidates
    num_images, _, height, width = logits.shape
    cells, num_logits = height * width, cls_loss.num_logits
    values = logits.reshape(num_images, -1, num_logits, height, width)  # (N, A, C, H, W)
    as_logits = cls_loss.least_logit(model.test_score_thresh) is not None
    if not as_logits:
        values = cls_loss.probabilities(values.permute(0, 1, 3, 4, 2).float()).permute(0, 1, 4, 2, 3)
    per_cell, classes = logits.shape[1] // num_logits, model.num_classes
    filler = values.new_full((num_images, most), -math.inf)
    best = values.amax(2)
    # In the order of memory, so that of equal values the same are chosen as without recording.
    best = best.permute(0, 2, 3, 1) if model.channels_last else best
    value, place = torch.cat([best.flatten(1), filler], dim=1).topk(most)
    is_filler = place >= per_cell * cells
    place = torch.where(is_filler, 0, place)
    if model.channels_last:
        cell, a = place // per_cell, place % per_cell
    else:
        a = place // cells
        cell = place - a * cells  # the newer ONNX exporter has no remainder of a number that it does not know
    label = torch.zeros_like(cell)
    if classes > 1:
        first = (a * classes * cells + cell).unsqueeze(2)
        place = first + torch.arange(classes, device=first.device) * cells  # (N, T, K)
        value = values.flatten(1).gather(1, place.flatten(1)).view_as(place)
        value = torch.where(is_filler.unsqueeze(2), -math.inf, value)
        value, place = value.flatten(1).topk(most)
        of_best = place // classes
        cell, a, label = cell.gather(1, of_best), a.gather(1, of_best), place % classes
    score = cls_loss.probabilities(value.float()) if as_logits else value
    return cell, a, label, torch.where(score > model.test_score_thresh, score, -math.inf)


def _unsuppressed(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, num_classes: int, most: int
) -> Tensor:
    """Suppress boxes that overlap a better box of their class in their image.

    Args:
        boxes: (N, B, 4) XYXY.
        scores: (N, B); boxes of score -inf are left out.
        labels: (N, B) int64, in [0, K).
        threshold: IoU above which the box with the lower score is suppressed.
        num_classes: K.
        most: at least so many of the best boxes of an image are complete.

    Returns:
        (n,) int64, into N·B.
    """
    if torch.onnx.is_in_onnx_export() and torch.jit.is_tracing():
        classes = torch.arange(num_classes, device=labels.device).view(1, -1, 1)
        of_class = torch.where(labels.unsqueeze(1) == classes, scores.unsqueeze(1), -math.inf)  # (N, K, B)
        chosen = _NonMaxSuppression.apply(boxes, of_class, threshold, most)
        return chosen[:, 0] * scores.shape[1] + chosen[:, 2]
    return _unsuppressed_apart(boxes, scores, labels, threshold, num_classes)


def _unsuppressed_apart(
    boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float, num_classes: int
) -> Tensor:
    """Do the same for all images and classes at once, moved to separate regions of the plane.

    The regions form a square: in a row, coordinates of the last of 1,203 classes would be rounded to quarters
    of a pixel in float32, which `torch.export` needs, because ONNX has no NMS in float64.
    """
    place = (scores.flatten() > -math.inf).nonzero().squeeze(1)
    group = place // scores.shape[1] * num_classes + labels.flatten()[place]
    side = math.ceil(math.sqrt(num_classes))
    dtype = boxes.dtype if torch.compiler.is_exporting() else torch.float64
    apart = boxes.flatten(0, 1)[place].to(dtype)
    sizes = torch.where(apart.isfinite(), apart.abs(), 0.0).flatten()
    region_side = torch.cat([sizes, sizes.new_zeros(1)]).max() * 2 + 1
    corner = torch.stack([group % side, group // side], dim=1) * region_side
    return place[nms(apart + corner.repeat(1, 2), scores.flatten()[place].to(dtype), threshold)]


class _NonMaxSuppression(torch.autograd.Function):
    """ONNX's operator, which keeps images and classes apart without moving boxes."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
        """Return the indices (n, 3) of image, class and box that are kept.

        Args:
            ctx: not used.
            boxes: (N, B, 4) XYXY.
            scores: (N, K, B); -inf: not a box of this class. A box has one class.
            threshold: IoU above which the box with the lower score is suppressed.
            most: boxes of an image and class that the operator returns.
        """
        best, labels = scores.max(dim=1)
        kept = _unsuppressed_apart(boxes, best, labels, threshold, scores.shape[1])
        return torch.stack([kept // best.shape[1], labels.flatten()[kept], kept % best.shape[1]], dim=1)

    @staticmethod
    def symbolic(graph: Any, boxes: Any, scores: Any, threshold: float, most: int) -> Any:
        """Return the operator for `torch.onnx.export`."""

        def constant(value: Tensor) -> Any:
            return graph.op("Constant", value_t=value)

        lowest = torch.tensor([torch.finfo(torch.float32).min])  # -inf is below
        return graph.op(
            "NonMaxSuppression",
            boxes,
            scores,
            constant(torch.tensor([most])),
            constant(torch.tensor([threshold], dtype=torch.float32)),
            constant(lowest),
        )


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
