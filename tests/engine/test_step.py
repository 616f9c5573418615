from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from focal_d2.engine.step import FocalLoop, MovingAverage
from tests.conftest import make_cfg
from tests.modeling.test_retinanet import make_image
from tests.waits import PretendedGPU


def normed(layers: int) -> nn.Module:
    """Layers with a weight and a bias in float32, the last ones in float64, and with three buffers each."""
    model = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(layers)))
    model[-1].double()
    return model


def make_loop(model: nn.Module, *, parts: int = 1, average: MovingAverage | None = None) -> FocalLoop:
    return FocalLoop(
        model,
        [],
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        parts=parts,
        precision=nullcontext,
        scale_loss=False,
        average=average,
        stopping=Mock(),
        on_not_finite=Mock(),
    )


def change(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    with torch.no_grad():
        for x in [*model.parameters(), *model.buffers()]:
            x.copy_(torch.randn(x.shape) * 9)


def test_moving_average_by_hand():
    model = nn.Linear(1, 1)
    average = MovingAverage(model, decay=0.2)
    for x in (1.0, 2.0, 4.0):
        nn.init.constant_(model.weight, x)
        average.update()
    # The first step is taken over; then 2/11 and, as 3/12 is more than the decay, 0.2 of the average stay.
    second = 2 / 11 * 1 + 9 / 11 * 2
    assert average.module.weight.item() == pytest.approx(0.2 * second + 0.8 * 4)


def test_moving_average_is_pytorchs_to_the_bit():
    model = normed(4)
    average = MovingAverage(model, decay=0.7)

    def update(averaged, current, count):
        n = int(count)
        get_ema_multi_avg_fn(min(0.7, (1 + n) / (10 + n)))(averaged, current, count)

    theirs = AveragedModel(model, multi_avg_fn=update)
    for step in range(12):
        change(model, step)
        if step == 5:
            model[1].running_mean = model[1].running_mean.clone()  # a module that replaces its buffer
        average.update()
        theirs.update_parameters(model)
        expected = theirs.module.state_dict()
        assert all(torch.equal(x, expected[name]) for name, x in average.module.state_dict().items())


def test_moving_average_and_kept_buffers_are_few_operations_and_no_wait():
    with PretendedGPU() as gpu:
        model = normed(20).to("cuda")
        average = MovingAverage(model, decay=0.9)
        loop = make_loop(model, average=average)
        for _ in range(2):  # the second step is an average, and later ones are as the second
            gpu.clear()
            average.update()
            # A list for each type: float32 and float64 weights; float32, float64 and int64 buffers.
            assert sum(gpu.operations.values()) == 5
            gpu.clear()
            loop._keep_buffers()
        assert gpu.operations == {"aten::_foreach_copy_": 3}
        loop.undo()
        assert not gpu.waits


@pytest.mark.parametrize(
    "name, parts, scale", [("focal", 1, None), ("fixed_weights", 1, 1024.0), ("focal", 3, 8.0)]
)
def test_losses_know_the_gradient_that_backward_will_give_them(name, parts, scale):
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NAME=name))
    features = [torch.empty(1, 1, -(-64 // s), -(-64 // s)) for s in (8, 16, 32, 64, 128)]
    outputs = [[torch.randn(1, 9 * c, *x.shape[2:], requires_grad=True) for x in features] for c in (3, 4)]
    model.network = lambda images: (features, outputs)
    expected, given = [], []

    def note(module, arguments, loss):
        expected.append(arguments[0].upstream)
        loss.register_hook(lambda x: given.append(x))

    model.cls_loss.register_forward_hook(note)
    loop = make_loop(model, parts=parts)
    if scale is not None:
        loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    loop._backward([make_image(2, 3, size=(64, 64)) for _ in range(parts)])
    assert len(expected) == parts
    assert torch.equal(torch.stack(expected), torch.stack(given))  # to the bit
    assert model.loss_normalizer.upstream is None


@pytest.mark.parametrize("scaled, waits", [(False, 1), (True, 2)])
def test_a_step_waits_once_and_once_more_in_the_gradient_scaler(monkeypatch, scaled, waits):
    with PretendedGPU() as gpu, EventStorage() as storage:
        model = nn.Linear(3, 2).to("cuda")
        loop = make_loop(model, average=MovingAverage(model, decay=0.9))
        if scaled:
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        losses = {
            "loss_cls": torch.tensor(1.5, device="cuda"),
            "loss_box_reg": torch.tensor(2.0, device="cuda"),
        }

        def backward(data):
            for p in model.parameters():
                p.grad = loop.scaler.scale(torch.full_like(p, gradients[0]))
            return losses

        monkeypatch.setattr(loop, "_fetch", lambda: ([], 0.0))
        monkeypatch.setattr(loop, "_backward", backward)
        gradients = [1.0]
        for _ in range(2):
            gpu.clear()
            loop.run_step()
        assert len(gpu.waits) == waits, gpu.waits
        assert loop.average.steps == 2
        assert storage.latest()["total_loss"][0] == 3.5
        if scaled:  # gradients that overflow: the optimizer makes no step, and the average none
            before, gradients[0] = model.weight.tolist(), float("inf")
            loop.run_step()
            assert model.weight.tolist() == before
            assert loop.average.steps == 2
            assert loop.scaler.get_scale() == 2
