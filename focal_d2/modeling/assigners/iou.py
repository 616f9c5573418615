"""Anchors are positive from a fixed IoU on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.matcher import Matcher
from torch import Tensor

from focal_d2.config import focal_config
from focal_d2.modeling.anchors import Anchors
from focal_d2.modeling.assigners.base import Assigner
from focal_d2.ops.common import MATCHING_KERNELS, find_kernels
from focal_d2.ops.matching.match import Matches, match_anchors


class IoUAssigner(Assigner):
    """The paper's rule (section 4): positive from one IoU on, negative below another one, ignored between.

    Departure from the paper, as in detectron2: the anchors with the highest IoU with a box are positive, also
    if this IoU is low, unless `MODEL.FOCAL.LOW_QUALITY_MATCHES` is false.
    """

    def __init__(self, matcher: Matcher) -> None:
        """Read the matcher's thresholds, labels and allow_low_quality_matches; see `match_anchors`."""
        self._rules: dict[str, Any] = {
            "thresholds": matcher.thresholds[1:-1],  # without the infinities around them
            "labels": matcher.labels,
            "low_quality_matches": matcher.allow_low_quality_matches,
        }

    @classmethod
    def from_config(cls, cfg: CfgNode) -> IoUAssigner:
        """Read `MODEL.RETINANET.IOU_THRESHOLDS` and `IOU_LABELS`, and `MODEL.FOCAL.LOW_QUALITY_MATCHES`."""
        matcher = Matcher(
            cfg.MODEL.RETINANET.IOU_THRESHOLDS,
            cfg.MODEL.RETINANET.IOU_LABELS,
            allow_low_quality_matches=focal_config(cfg).LOW_QUALITY_MATCHES,
        )
        return cls(matcher)

    def assign(self, boxes: Tensor, anchors: Anchors) -> Matches:
        """See `Assigner.assign`; `matched` is the box of the highest IoU."""
        return match_anchors(boxes, anchors.boxes, anchors.grid, **self._rules)

    def batch_kernels(self, anchors: Tensor) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
        """See `Assigner.batch_kernels`. The kernels are for float32 on a GPU with Triton."""
        kernels = find_kernels(MATCHING_KERNELS, anchors)
        if kernels is None or anchors.dtype != torch.float32:
            return None
        return partial(kernels.label_batch, **self._rules)
