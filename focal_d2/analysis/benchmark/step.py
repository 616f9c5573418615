"""Time of a training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import build_pair, detectron2_precision, make_batch
from focal_d2.analysis.benchmark.setting import Setting

NETWORK = "backbone and head alone, forward and backward of their outputs' sum"


class Steps(NamedTuple):
    """A training step without the optimizer: forward, losses, backward; and the network's part of it."""

    ours: Callable[[], None]
    detectron2: Callable[[], None]
    limit: Callable[[], None]


def build_steps(cfg: CfgNode, setting: Setting) -> Steps:
    """Build both detectors and return their steps on the same batch."""
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
        with EventStorage(), detectron2_precision(setting):
            losses = pair.detectron2(batch)
        sum(losses.values()).backward()
        clear(pair.detectron2)

    def network() -> None:
        images = pair.ours.preprocess_image(batch)
        with pair.ours.precision():
            outputs = pair.ours.network(images)[1]
        torch.stack([x.sum(dtype=torch.float32) for level in outputs for x in level]).sum().backward()
        clear(pair.ours)

    return Steps(own_step, detectron2_step, network)


def time_step(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """A training step without the optimizer."""
    times = timing.take_turns(build_steps(cfg, setting)._asdict(), setting)
    return [timing.timed("step", times, NETWORK)]
