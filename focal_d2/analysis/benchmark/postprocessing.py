"""Time from the head's output to detections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import Pair, build_pair, empty_features, empty_images, random_outputs
from focal_d2.analysis.benchmark.setting import Setting

# Those of the post-processing benchmark: a model's first evaluations. One in eight exceeds a score of 0.02.
_EARLY_MEAN, _EARLY_STD = -4.6, 0.6


_THRESHOLDS = (0.001, 0.02, 0.05, 0.3)


LARGEST_LOGIT = "finding the largest logit"


def time_postprocessing(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """From the head's output to detections where many scores exceed the threshold, for several thresholds."""
    pair = build_pair(cfg, setting)
    rows = []
    with torch.no_grad():
        runs = after_network(pair, setting, _EARLY_MEAN, _EARLY_STD)
        for threshold in _THRESHOLDS:
            for model in pair:
                model.eval().test_score_thresh = threshold
            times = timing.take_turns(runs, setting)
            rows.append(timing.timed(f"post-processing, scores above {threshold}", times, LARGEST_LOGIT))
    return rows


def after_network(pair: Pair, setting: Setting, mean: float, std: float) -> dict[str, Callable[[], Any]]:
    """From the head's output, with logits of this mean and deviation, to detections."""
    images, features = empty_images(setting), empty_features(pair, setting)
    logits = random_outputs(pair, setting, setting.classes, mean, std, torch.float32)
    deltas = random_outputs(pair, setting, 4, 0.0, 0.2, torch.float32)

    def detectron2_detections() -> list[Instances]:
        # It writes into the logits of a level of one cell or one channel: its permutation is a view of them.
        theirs = [x.clone() if 1 in (x.shape[1], x.shape[2:].numel()) else x for x in logits]
        return pair.detectron2.forward_inference(images, features, [theirs, deltas])

    return {
        "ours": lambda: pair.ours.forward_inference(images, features, [logits, deltas]),
        "detectron2": detectron2_detections,
        "limit": lambda: [x.amax() for x in logits],
    }
