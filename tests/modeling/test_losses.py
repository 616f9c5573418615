from __future__ import annotations

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from focal_d2.modeling.losses import BOX_LOSSES, LossNormalizer, SigmoidFocalLoss, box_loss
from focal_d2.ops import sigmoid_focal_loss

TRANSFORM = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))


def test_focal_loss_reads_levels_cell_by_cell():
    n, a, k = 2, 3, 4
    sizes = [(4, 5), (2, 3)]
    logits = [torch.randn(n, a * k, h, w) for h, w in sizes]
    anchors = sum(h * w * a for h, w in sizes)
    labels = torch.randint(-1, k + 1, (n, anchors))
    expected, r = 0.0, 0
    for level, (h, w) in zip(logits, sizes, strict=True):
        for y in range(h):
            for x in range(w):
                for i in range(a):
                    expected += sigmoid_focal_loss(
                        level[:, i * k : (i + 1) * k, y, x],
                        labels[:, r],
                        num_classes=k,
                        alpha=0.25,
                        gamma=2.0,
                    )
                    r += 1
    actual = SigmoidFocalLoss(num_classes=k, alpha=0.25, gamma=2.0)(logits, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


def test_box_loss_smooth_l1_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    gt = torch.tensor([[1.0, 0.0, 11.0, 10.0]])  # moved by a tenth of its width: dx = 0.1
    deltas = torch.tensor([[0.3, 0.0, 0.0, -0.05]])
    arguments = {"transform": TRANSFORM, "loss_type": "smooth_l1"}
    l1 = box_loss(deltas, anchors, gt, smooth_l1_beta=0.0, **arguments)
    assert l1.item() == pytest.approx(0.2 + 0.05, rel=1e-6)
    smooth = box_loss(deltas, anchors, gt, smooth_l1_beta=0.1, **arguments)
    assert smooth.item() == pytest.approx((0.2 - 0.05) + 0.5 * 0.05**2 / 0.1, rel=1e-5)


@pytest.mark.parametrize("loss_type", BOX_LOSSES)
def test_box_loss_is_zero_for_exact_boxes_and_for_none(loss_type):
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 45.0, 25.0]])
    gt = torch.tensor([[2.0, 1.0, 9.0, 12.0], [0.0, 0.0, 30.0, 30.0]])
    arguments = {"transform": TRANSFORM, "loss_type": loss_type, "smooth_l1_beta": 0.0}
    exact = box_loss(TRANSFORM.get_deltas(anchors, gt), anchors, gt, **arguments)
    assert exact.item() == pytest.approx(0, abs=1e-5)
    none = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss(none, anchors[:0], gt[:0], **arguments)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, none)[0].shape == (0, 4)


def test_loss_normalizer_ema_is_detectron2s():
    normalizer = LossNormalizer(kind="ema")
    assert normalizer(torch.tensor(50)).item() == pytest.approx(0.9 * 100 + 0.1 * 50)
    assert normalizer(torch.tensor(0)).item() == pytest.approx(0.9 * 95 + 0.1 * 1)


def test_loss_normalizer_paper_is_this_batch():
    normalizer = LossNormalizer(kind="paper")
    assert [normalizer(torch.tensor(n)).item() for n in (50, 0)] == [50, 1]
    assert normalizer.ema.item() == LossNormalizer.INITIAL


def test_loss_normalizer_is_in_the_checkpoint():
    normalizer, other = LossNormalizer(kind="ema"), LossNormalizer(kind="ema")
    normalizer(torch.tensor(500))
    other.load_state_dict(normalizer.state_dict())
    assert other.ema.item() == normalizer.ema.item() == pytest.approx(140)


def test_loss_normalizer_loads_checkpoints_without_it():
    normalizer = LossNormalizer(kind="ema")
    normalizer(torch.tensor(500))
    normalizer.load_state_dict({})
    assert normalizer.ema.item() == pytest.approx(140)
