from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from focal_d2.modeling.losses import BOX_LOSSES, LOSSES
from focal_d2.modeling.targets import AnchorTargets, TargetBuffers, _count
from tests.conftest import make_cfg
from tests.modeling.test_retinanet import losses_and_gradients, make_image
from tests.waits import PretendedGPU

FIXED = [name for name, loss in LOSSES.items() if loss.fixed_shapes]


def test_positives_are_read_when_the_copys_own_stream_has_made_it(monkeypatch):
    streams, event = {torch.device("cuda:0"): "stream of 0", torch.device("cuda:1"): "stream of 1"}, Mock()
    with PretendedGPU() as gpu:
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device="cuda:0": streams[torch.device(device)]
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        positive = torch.eye(3, dtype=torch.bool).to("cuda:1")
        gpu.clear()
        number = _count(positive)
        event.record.assert_called_once_with("stream of 1")
        event.synchronize.assert_not_called()
        assert number() == 3
        event.synchronize.assert_called_once_with()
        monkeypatch.undo()
    assert not gpu.waits


def make_targets(count: int, shape=(2, 3000)) -> AnchorTargets:
    """Targets with so many positives at random anchors, of seven boxes or none."""
    chosen = torch.randperm(shape[0] * shape[1])[:count]
    positive = torch.zeros(shape, dtype=torch.bool)
    positive.view(-1)[chosen] = True
    boxes = torch.rand(7 if count else 0, 4)
    matched = torch.randint(0, max(1, len(boxes)), shape)
    return AnchorTargets(positive.long(), positive, matched, boxes, positive.sum().item)


def test_buffers_stay_in_place_and_grow_with_the_positives():
    buffers, pointers = TargetBuffers(), []
    for count in (0, 40, 256, 257, 3, 1100, 600):
        targets = make_targets(count)
        held, expected = buffers.hold(targets), targets.positives()
        positives = held.positives()
        assert positives.valid.sum() == count
        for name in ("image", "anchor", "gt_boxes"):
            assert torch.equal(getattr(positives, name)[:count], getattr(expected, name))
        assert torch.equal(held.labels, targets.labels)
        assert torch.equal(held.positive, targets.positive)
        pointers.append((len(positives.valid), *[x.data_ptr() for x in (held.labels, *positives)]))
    assert [rows for rows, *_ in pointers] == [256, 256, 256, 512, 512, 2048, 2048]
    assert pointers[0] == pointers[1] == pointers[2]
    assert pointers[3] == pointers[4]
    assert pointers[5] == pointers[6]


@pytest.fixture
def make_pair(monkeypatch):
    """Return a function that builds a model with `COMPILE`, which compiles nothing here, and one without."""
    monkeypatch.setattr(nn.Module, "compile", lambda self: None)

    def make(loss: str, box_loss: str, implementation: str = "auto"):
        keys = {"MODEL__FOCAL__LOSS__NAME": loss, "MODEL__RETINANET__BBOX_REG_LOSS_TYPE": box_loss}
        keys["MODEL__FOCAL__LOSS__IMPLEMENTATION"] = implementation
        fixed, plain = (build_model(make_cfg(MODEL__FOCAL__COMPILE=x, **keys)) for x in (True, False))
        fixed.load_state_dict(plain.state_dict())
        return fixed, plain

    return make


@pytest.mark.parametrize(
    "loss, box_loss", [*((name, "smooth_l1") for name in FIXED), *(("focal", kind) for kind in BOX_LOSSES)]
)
def test_targets_of_fixed_shape_change_no_bit_on_a_cpu(make_pair, loss, box_loss):
    fixed, plain = make_pair(loss, box_loss)
    assert plain.target_buffers is None
    for boxes in ((3, 5), (0, 0), (60, 0), (2, 1)):  # (60, 0) has more positives than the buffers
        batch = [make_image(n, 3) for n in boxes]
        (actual, gradients), (expected, wanted) = (losses_and_gradients(x, batch) for x in (fixed, plain))
        assert all(torch.equal(actual[name], x) for name, x in expected.items())
        assert all(torch.equal(gradients[name], x) for name, x in wanted.items())
        assert all(torch.equal(x, y) for x, y in zip(fixed.buffers(), plain.buffers(), strict=True))
    assert fixed.target_buffers.rows > 256


class _Shapes(TorchDispatchMode):
    """Lists each operation with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
        self.seen.append((func.name(), *[tuple(x.shape) for x in tensors]))
        return result


def shapes_of_losses(model, boxes, buffers=None) -> list[tuple]:
    """The operations from the head's outputs to their gradients, for images with so many boxes."""
    batch = [make_image(n, 3) for n in boxes]
    images = model.preprocess_image(batch)
    anchors = model.anchors_for(images)
    targets = model.label_anchors(anchors, [x["instances"] for x in batch])
    with torch.no_grad():
        outputs = [[x.requires_grad_() for x in part] for part in model.network(images)[1]]
    targets = buffers.hold(targets) if buffers else targets
    with _Shapes() as shapes:
        losses = model.compute_losses(outputs, anchors, targets, range(2), images.image_sizes)
        torch.autograd.grad(sum(losses.values()), [x for part in outputs for x in part])
    return shapes.seen


@pytest.mark.parametrize(
    "loss, box_loss", [*((name, "smooth_l1") for name in FIXED), *(("focal", kind) for kind in BOX_LOSSES)]
)
def test_no_shape_of_the_losses_depends_on_the_boxes(make_pair, loss, box_loss):
    model, buffers = make_pair(loss, box_loss, "reference")[1], TargetBuffers()
    few, many = (shapes_of_losses(model, boxes, buffers) for boxes in ((0, 1), (4, 3)))
    assert few == many
    few, many = (shapes_of_losses(model, boxes) for boxes in ((0, 1), (4, 3)))
    assert few != many


@pytest.mark.parametrize("name", sorted(set(LOSSES) - set(FIXED)))
def test_losses_that_choose_anchors_keep_targets_of_changing_shape(make_pair, name):
    assert make_pair(name, "smooth_l1")[0].target_buffers is None
