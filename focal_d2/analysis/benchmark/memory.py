"""Memory of a training step."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import Tensor

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import (
    build_pair,
    empty_features,
    empty_images,
    make_batch,
    random_outputs,
)
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.analysis.benchmark.step import NETWORK, build_steps


def measure_memory(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """Most memory that a training step takes beyond weights and buffers, and what is not the network's."""
    return [step_memory(cfg, setting), losses_memory(cfg, setting)]


def step_memory(cfg: CfgNode, setting: Setting) -> timing.Row:
    """Measure the peak of a whole step, and of its network alone."""
    ours, theirs, network = (timing.peak_bytes(run, setting.device) for run in build_steps(cfg, setting))
    return timing.Row(
        "memory of a step",
        limit_is=NETWORK,
        ours_bytes=ours,
        detectron2_bytes=theirs,
        limit_bytes=network,
    )


def losses_memory(cfg: CfgNode, setting: Setting) -> timing.Row:
    """Measure the peak from boxes and the head's output to its gradient: assignment, losses, backward."""
    pair = build_pair(cfg, setting)
    images, features = empty_images(setting), empty_features(pair, setting)
    instances = [x["instances"].to(setting.device) for x in make_batch(setting)]
    logits = random_outputs(pair, setting, setting.classes, -4.6, 1.0, setting.dtype)
    outputs = [logits, random_outputs(pair, setting, 4, 0.0, 0.2, setting.dtype)]
    leaves = [x.requires_grad_() for level in outputs for x in level]

    def own_losses() -> tuple[Tensor, ...]:
        anchors = pair.ours.anchors_for(images)
        targets = pair.ours.label_anchors(anchors, instances)
        losses = pair.ours.compute_losses(outputs, anchors, targets, seeds=range(setting.batch))
        return torch.autograd.grad(list(losses.values()), leaves)

    def detectron2_losses() -> tuple[Tensor, ...]:
        with EventStorage():
            losses = pair.detectron2.forward_training(images, features, outputs, instances)
        return torch.autograd.grad(list(losses.values()), leaves)

    return timing.Row(
        "memory of assignment and losses",
        limit_is="the logits",
        ours_bytes=timing.peak_bytes(own_losses, setting.device),
        detectron2_bytes=timing.peak_bytes(detectron2_losses, setting.device),
        limit_bytes=sum(x.numel() * x.element_size() for x in logits),
    )
