"""A timed trial of a config on this machine: some training iterations, with rising learning rates."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage

from focal_d2.data.loader import build_training_loader
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.engine.optimizer import build_optimizer
from focal_d2.engine.trainer import FocalTrainer
from focal_d2.errors import UserError
from focal_d2.modeling.build import building
from focal_d2.storage.checkpoint import FocalCheckpointer

LOWEST_RATE, HIGHEST_RATE = 1e-5, 3e-2
# Steps of the test: as many as the time allows. The first ones allocate memory, and are not timed.
_LEAST_STEPS, _MOST_STEPS, _UNTIMED = 8, 80, 2
_RISEN = 3.0  # times the lowest loss: the test has seen enough
_TEST_IMAGES = 2


class Trial(NamedTuple):
    """What was measured.

    Attributes:
        seconds: of an iteration, the median.
        rates: learning rates of the steps.
        losses: of the steps.
        test_seconds: of the detection in an image of the validation set.
    """

    seconds: float
    rates: list[float]
    losses: list[float]
    test_seconds: float


def try_training(cfg: CfgNode, *, seconds: float) -> Trial:
    """Train for a few iterations with rising rates, and detect objects in a few images.

    Nothing is written. The model of the trial is thrown away.

    Args:
        cfg: full config, whose schedule is not read.
        seconds: that the iterations may take, about.

    Raises:
        UserError: if images cannot be read or weights cannot be loaded.
    """
    seed_all_rng(max(cfg.SEED, 0))
    with building("trainer"):
        model = FocalTrainer.build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        loader = build_training_loader(cfg, FocalDatasetMapper(cfg, is_train=True))
    FocalCheckpointer(model, partial=True).load(cfg.MODEL.WEIGHTS)
    of_detection = _seconds_of_detection(cfg, model)  # before the rates are too high
    model.train()
    batches = iter(loader)
    times: list[float] = []
    rates: list[float] = []
    losses: list[float] = []
    with EventStorage():
        start = time.perf_counter()
        for step in range(_UNTIMED):
            begun = time.perf_counter()
            _step(model, optimizer, batches, LOWEST_RATE)
            if step == _UNTIMED - 1:
                start = begun
        steps = steps_within(seconds, time.perf_counter() - start)
        for rate in rates_of(steps):
            begun = time.perf_counter()
            loss = _step(model, optimizer, batches, rate)
            times.append(time.perf_counter() - begun)
            if not math.isfinite(loss) or loss > _RISEN * min([loss, *losses]):
                break
            rates.append(rate)
            losses.append(loss)
    if not losses:
        raise UserError(f"a trial of the config: the loss is not finite at the learning rate {LOWEST_RATE:g}")
    return Trial(statistics.median(times), rates, losses, of_detection)


def steps_within(seconds: float, of_one: float) -> int:
    """Return how many steps fit into the time."""
    return max(_LEAST_STEPS, min(_MOST_STEPS, int(seconds / max(of_one, 1e-6))))


def rates_of(steps: int) -> list[float]:
    """Return rising learning rates for so many steps, at least two, each the same factor above the last."""
    factor = HIGHEST_RATE / LOWEST_RATE
    return [LOWEST_RATE * factor ** (i / (steps - 1)) for i in range(steps)]


def _step(model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[Any], rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = sum(model(next(batches)).values())
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _seconds_of_detection(cfg: CfgNode, model: Any) -> float:
    """Return the seconds of an image of the validation set, reading included; the fastest of a few."""
    names = (*cfg.DATASETS.VAL, *cfg.DATASETS.TEST)
    if not names:
        return 0.0
    model.eval()
    times = []
    with torch.no_grad():
        images = iter(FocalTrainer.build_test_loader(cfg, names[0]))
        for _ in range(_TEST_IMAGES):
            begun = time.perf_counter()
            batch = next(images, None)
            if batch is None:
                break
            model(batch)
            times.append(time.perf_counter() - begun)
    return min(times)
