from __future__ import annotations

import pytest
import torch
from detectron2 import layers
from fvcore import nn

from focal_d2.ops.losses import iou


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (iou.giou_loss, nn.giou_loss),
        (iou.diou_loss, layers.diou_loss),
        (iou.ciou_loss, layers.ciou_loss),
    ],
)
def test_value_and_gradient_are_fvcores_to_the_bit(ours, theirs):
    low = torch.rand(500, 2) * 100
    targets = torch.cat([low, low + 1 + torch.rand(500, 2) * 60], 1)
    low = low + torch.rand(500, 2) * 40 - 20
    boxes = torch.cat([low, low + 1 + torch.rand(500, 2) * 60], 1)
    boxes[:20] = targets[:20]
    boxes[20:40] += 500  # far away
    boxes[40:60, 0] = torch.minimum(boxes[40:60, 2], targets[40:60, 0])  # a side in common
    boxes[60:70, 2] = boxes[60:70, 0]  # no width
    outcomes = []
    for loss in (ours, theirs):
        x = boxes.clone().requires_grad_()
        values = loss(x, targets)
        outcomes.append((values, *torch.autograd.grad(values.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert ours(boxes[:0], targets[:0]).shape == (0,)


def test_nan_in_one_box_makes_its_loss_nan():
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [float("nan"), 0.0, 5.0, 5.0]])
    for loss in (iou.giou_loss, iou.diou_loss, iou.ciou_loss):
        assert loss(boxes, boxes.nan_to_num()).isnan().tolist() == [False, True]
