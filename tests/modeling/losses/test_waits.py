"""How often the host waits for a GPU in a step's losses: counted on a pretended one."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from focal_d2.modeling.losses import BOX_LOSSES, LOSSES, DenseBatch
from focal_d2.ops.losses import dense_masked
from tests.modeling.losses.test_box import box_loss
from tests.modeling.losses.test_losses import NAMES, build, make_batch
from tests.waits import PretendedGPU

IMAGES = 4
# Examples are counted once for all images; NMS, of each image, returns as many boxes as it keeps.
WAITS = {"hard_negative_mining": 1, "random_sampling": 1, "ohem": 1 + IMAGES, "ohem 1:3": 1 + IMAGES}


def on_gpu(batch: DenseBatch) -> DenseBatch:
    def move(x):
        if isinstance(x, list):
            return [move(y) for y in x]
        return x.detach().to("cuda") if isinstance(x, torch.Tensor) else x

    return DenseBatch(*map(move, batch))


@pytest.mark.parametrize("name", [*NAMES, "ohem 1:3"])
def test_waits_of_a_classification_loss(name):
    ratio = {"NEGATIVES_PER_POSITIVE": 3.0} if name == "ohem 1:3" else {}
    loss = build(name.split()[0], **ratio)
    batch = make_batch(loss, IMAGES)
    with torch.no_grad():
        expected = deepcopy(loss)(batch)
        with PretendedGPU() as gpu:
            loss, batch = loss.to("cuda"), on_gpu(batch)
            gpu.clear()
            value = loss(batch)
            assert len(gpu.waits) == WAITS.get(name, 0), gpu.waits
            assert torch.isclose(value.cpu(), expected)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.has_fused])
def test_fused_losses_without_kernels_do_not_wait(name, monkeypatch):
    loss = build(name, implementation="fused")
    batch = make_batch(loss, IMAGES)
    expected, operations = loss(batch).detach(), []
    for chunk in (dense_masked.CHUNK, 240):  # a chunk for each of two levels, then 2 + 1
        monkeypatch.setattr(dense_masked, "CHUNK", chunk)
        with PretendedGPU() as gpu, torch.no_grad():
            on_it, batch_on_it = deepcopy(loss).to("cuda"), on_gpu(batch)
            gpu.clear()
            value = on_it(batch_on_it)
            assert not gpu.waits
            operations.append(sum(gpu.operations.values()))
            assert torch.isclose(value.cpu(), expected)
    assert operations[1] - operations[0] < 100  # those of a chunk, views included


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_losses_do_not_wait(kind):
    low = torch.rand(20, 2) * 50
    boxes = torch.cat([low, low + 20], 1)
    arguments = torch.randn(20, 4) * 0.1, boxes + torch.randn(20, 4), boxes
    expected = box_loss(kind)(*arguments)
    with PretendedGPU() as gpu:
        loss, arguments = box_loss(kind).to("cuda"), [x.to("cuda") for x in arguments]
        gpu.clear()
        value = loss(*arguments)
        assert not gpu.waits
        assert torch.equal(value.cpu(), expected)
