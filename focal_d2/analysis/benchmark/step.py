"""Time of a training step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from detectron2 import solver
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from focal_d2.analysis.benchmark import timing
from focal_d2.analysis.benchmark.models import build_pair, detectron2_precision, make_batch
from focal_d2.analysis.benchmark.setting import Setting
from focal_d2.engine.nonfinite import BadStep
from focal_d2.engine.optimizer import build_optimizer
from focal_d2.engine.step import FocalLoop
from focal_d2.modeling.retinanet import precision_around

# Where a loss scaler starts. PyTorch's 65,536 makes random weights overflow, and such steps change nothing.
_LOSS_SCALE = 1024.0

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


def trainer_step(
    cfg: CfgNode, model: nn.Module, batch: list[dict[str, Any]], setting: Setting
) -> Callable[[], dict[str, float]]:
    """Return our trainer's whole step on the same batch, again and again; it returns the losses.

    Args:
        cfg: full config; `SOLVER` is read.
        model: ours, in training mode.
        batch: N images.
        setting: its precision decides whether the loss is scaled.
    """
    loop = FocalLoop(
        model,
        itertools.repeat(batch),
        build_optimizer(cfg, model),
        parts=1,
        precision=precision_around(cfg, model),
        scale_loss=False,
        average=None,
        stopping=lambda: False,
        on_not_finite=_refuse,
    )
    scaled = setting.precision == "fp16" and torch.device(setting.device).type == "cuda"
    loop.scaler = torch.amp.GradScaler(init_scale=_LOSS_SCALE, enabled=scaled)
    iterations = itertools.count()

    def step() -> dict[str, float]:
        loop.iter = next(iterations)
        with EventStorage(loop.iter):
            loop.run_step()
        return loop.steps[-1].losses

    return step


def detectron2_trainer_step(
    cfg: CfgNode, model: nn.Module, batch: list[dict[str, Any]], setting: Setting
) -> Callable[[], None]:
    """Return the whole step of detectron2's trainer; on CUDA that of its AMP: float16 with a loss scaler."""
    optimizer, batches = solver.build_optimizer(cfg, model), itertools.repeat(batch)
    trainer = SimpleTrainer(model, batches, optimizer)
    if setting.precision != "fp32" and torch.device(setting.device).type == "cuda":
        scaler = torch.amp.GradScaler(init_scale=_LOSS_SCALE)
        trainer = AMPTrainer(model, batches, optimizer, grad_scaler=scaler)
    iterations = itertools.count()

    def step() -> None:
        trainer.iter = next(iterations)
        with EventStorage(trainer.iter):
            trainer.run_step()

    return step


def _refuse(step: BadStep) -> NoReturn:
    raise FloatingPointError(f"the losses are not finite: {step.losses}")


def time_step(cfg: CfgNode, setting: Setting) -> list[timing.Row]:
    """A training step without the optimizer."""
    times = timing.take_turns(build_steps(cfg, setting)._asdict(), setting)
    return [timing.timed("step", times, NETWORK)]
