"""Time from images to detections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import Pair, build_pair, detectron2_precision, make_batch
from focal_d2.analysis.benchmark.postprocessing import LARGEST_LOGIT, after_network
from focal_d2.analysis.benchmark.setting import Setting

# Of the logits in the inference benchmark: some thousand an image exceed a score of 0.05, as after training.
_LOGIT_MEAN, _LOGIT_STD = -7.0, 1.3


def time_inference(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """From the head's output to detections, and the whole way from images."""
    pair = build_pair(cfg, setting)
    batch = make_batch(setting)
    with torch.no_grad():
        prepare_for_inference(pair, batch)
        after = timing.take_turns(after_network(pair, setting, _LOGIT_MEAN, _LOGIT_STD), setting)

        def network() -> None:
            with pair.ours.precision():
                pair.ours.network(pair.ours.preprocess_image(batch))

        whole = timing.take_turns({**whole_inference(pair, batch, setting), "limit": network}, setting)
    return [
        timing.timed("post-processing", after, LARGEST_LOGIT),
        timing.timed("inference", whole, "backbone and head alone"),
    ]


def whole_inference(
    pair: Pair, batch: list[dict[str, Any]], setting: Setting
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Return the way from a batch of images on the host to detections, of both detectors."""

    def detectron2_whole() -> list[dict[str, Any]]:
        with detectron2_precision(setting):
            detections: list[dict[str, Any]] = pair.detectron2(batch)
        return detections

    return {"ours": lambda: pair.ours(batch), "detectron2": detectron2_whole}


def prepare_for_inference(pair: Pair, batch: list[dict[str, Any]]) -> None:
    """Put both into evaluation mode, and scale the logits so that an untrained network has candidates."""
    for model in pair:
        model.eval()
    layer = pair.ours.head.cls_score
    logits = torch.cat([x.flatten() for x in pair.ours.network(pair.ours.preprocess_image(batch))[1][0]])
    layer.weight.mul_(_LOGIT_STD / logits.float().std())
    layer.bias.fill_(_LOGIT_MEAN)
    pair.detectron2.head.cls_score.load_state_dict(layer.state_dict())
