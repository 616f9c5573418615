"""Time and memory of assigning boxes to anchors."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import build_pair, empty_features, empty_images, make_batch
from focal_d2.analysis.benchmark.setting import Setting


def time_assign(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """Labels of all anchors and matched boxes: detectron2's of all, ours of the positives."""
    pair = build_pair(cfg, setting)
    features = empty_features(pair, setting)
    instances = [x["instances"].to(setting.device) for x in make_batch(setting)]
    anchors = pair.ours.anchors_for(empty_images(setting))
    boxes = pair.detectron2.anchor_generator(features)

    def own_labels() -> None:
        pair.ours.label_anchors(anchors, instances).positives()

    def detectron2_labels() -> None:
        pair.detectron2.label_anchors(boxes, instances)

    shape = (setting.batch, len(anchors.boxes))
    times = timing.take_turns(
        {
            "ours": own_labels,
            "detectron2": detectron2_labels,
            "limit": lambda: torch.full(shape, setting.classes, device=setting.device),
        },
        setting,
    )
    return [
        timing.timed(
            f"assign, {shape[1]} anchors",
            times,
            "filling the labels",
            ours_bytes=timing.peak_bytes(own_labels, setting.device),
            detectron2_bytes=timing.peak_bytes(detectron2_labels, setting.device),
        )
    ]
