"""Time and memory of the classification loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from fvcore.nn import sigmoid_focal_loss_jit
from torch import Tensor
from torch.nn import functional as F

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import Pair, build_pair, empty_images, make_batch, random_outputs
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.errors import UserError
from focal_d2.modeling.losses import DenseBatch


def time_loss(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """Classification loss, forward and backward, from the head's output (both bf16 if asked) to its gradient.

    Raises:
        UserError: for a loss that detectron2 does not have.
    """
    if cfg.MODEL.FOCAL.LOSS.NAME != "focal" or isinstance(cfg.MODEL.FOCAL.LOSS.ALPHA, (list, tuple, str)):
        raise UserError("detectron2 has but one loss: MODEL.FOCAL.LOSS.NAME focal, ALPHA a number")
    pair = build_pair(cfg, setting)
    ours, batch = pair.ours, _make_batch(pair, setting)
    logits, labels = batch.logits, batch.labels
    alpha, gamma = ours.cls_loss.alpha, ours.cls_loss.gamma

    def detectron2_loss() -> tuple[Tensor, ...]:
        # The code of RetinaNet.forward_training and RetinaNet.losses.
        flat = torch.cat([permute_to_N_HWA_K(x, setting.classes) for x in logits], dim=1)
        valid = labels >= 0
        one_hot = F.one_hot(labels[valid], num_classes=setting.classes + 1)[:, :-1]
        loss = sigmoid_focal_loss_jit(
            flat[valid], one_hot.to(flat.dtype), alpha=alpha, gamma=gamma, reduction="sum"
        )
        return torch.autograd.grad(loss / 100, logits)

    def own_loss() -> tuple[Tensor, ...]:
        return torch.autograd.grad(ours.cls_loss(batch) / 100, logits)

    size = sum(x.numel() * x.element_size() for x in logits)
    runs: dict[str, Callable[[], Any]] = {"ours": own_loss, "detectron2": detectron2_loss}
    if torch.device(setting.device).type == "cuda":
        times = timing.take_turns(runs, setting)
        # The logits are read and the gradient is written.
        times["limit"] = 2 * size / timing.copy_bandwidth(setting.device)
        limit_is = "reading the logits and writing the gradient at the measured copy bandwidth"
    else:
        runs["limit"] = lambda: [torch.sigmoid(x.detach()) for x in logits]
        times = timing.take_turns(runs, setting)
        limit_is = "one pass of sigmoid over the logits"
    return [
        timing.timed(
            "loss",
            times,
            limit_is,
            ours_bytes=timing.peak_bytes(own_loss, setting.device),
            detectron2_bytes=timing.peak_bytes(detectron2_loss, setting.device),
            limit_bytes=size,
        )
    ]


def _make_batch(pair: Pair, setting: Setting) -> DenseBatch:
    """Make random outputs of the head, such as in its first iterations, with the targets of a batch."""
    ours = pair.ours
    anchors = ours.anchors_for(empty_images(setting))
    targets = ours.label_anchors(anchors, [x["instances"].to(setting.device) for x in make_batch(setting)])
    logits = random_outputs(pair, setting, setting.classes, -4.6, 1.0, setting.dtype)
    return DenseBatch(
        logits=[x.requires_grad_() for x in logits],
        num_logits=setting.classes,
        labels=targets.labels,
        positive=targets.positive,
        **targets.positives()._asdict(),
        deltas=random_outputs(pair, setting, 4, 0.0, 0.2, setting.dtype),
        anchors=anchors.boxes,
        decode=ours.box2box_transform.apply_deltas,
        upstream=torch.ones((), device=setting.device) / 100,  # as the trainer gives it
    )
