from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from focal_d2.ops import IGNORE_LABEL, paired_iou, quality_focal_loss, varifocal_loss

K = 4


def random_case(dtype=torch.float64):
    logits = (torch.randn(3, 8, K, dtype=torch.float64) * 4).to(dtype).requires_grad_()
    return logits, torch.randint(-1, K + 1, (3, 8)), torch.rand(3, 8, dtype=torch.float64)


def plain(logits, labels, quality, formula):
    """Sum a formula of p and the target y, anchor by anchor and class by class."""
    total = logits.sum() * 0
    p = logits.sigmoid()
    for index in torch.cartesian_prod(torch.arange(3), torch.arange(8)).tolist():
        label = labels[tuple(index)].item()
        if label == IGNORE_LABEL:
            continue
        for k in range(K):
            y = quality[tuple(index)] if k == label else torch.zeros((), dtype=quality.dtype)
            total = total + formula(p[(*index, k)], y)
    return total


def bce(p, y):
    return -(y * p.log() + (1 - y) * (1 - p).log())


def check(actual, expected, logits):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    grads = [torch.autograd.grad(x, logits)[0] for x in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_quality_focal_loss_is_its_formula(beta):
    logits, labels, quality = random_case()
    actual = quality_focal_loss(logits, labels, quality, num_classes=K, beta=beta)
    expected = plain(logits, labels, quality, lambda p, y: (y - p).abs() ** beta * bce(p, y))
    check(actual, expected, logits)


@pytest.mark.parametrize("alpha, gamma", [(0.75, 2.0), (1.0, 0.0), (0.25, 0.5)])
def test_varifocal_loss_is_its_formula(alpha, gamma):
    logits, labels, quality = random_case()
    actual = varifocal_loss(logits, labels, quality, num_classes=K, alpha=alpha, gamma=gamma)
    expected = plain(
        logits,
        labels,
        quality,
        lambda p, y: y * bce(p, y) if y > 0 else -alpha * p**gamma * (1 - p).log(),
    )
    check(actual, expected, logits)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["quality", "vari"])
def test_soft_losses_are_finite_at_huge_logits(loss, dtype):
    logits = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]], dtype=dtype, requires_grad=True)
    labels, quality = torch.tensor([0, 0, 1, 1]), torch.tensor([0.5, 1.0, 0.0, 0.0])
    if loss == "quality":
        value = quality_focal_loss(logits, labels, quality, num_classes=1, beta=2.0)
    else:
        value = varifocal_loss(logits, labels, quality, num_classes=1, alpha=0.75, gamma=2.0)
    assert value.isfinite()
    assert torch.autograd.grad(value, logits)[0].isfinite().all()


@pytest.mark.parametrize("anchors", [0, 3])
def test_soft_losses_of_nothing_are_zero_with_gradient(anchors):
    logits = torch.randn(2, anchors, K, requires_grad=True)
    labels, quality = torch.full((2, anchors), IGNORE_LABEL), torch.zeros(2, anchors)
    for loss in (
        quality_focal_loss(logits, labels, quality, num_classes=K, beta=2.0),
        varifocal_loss(logits, labels, quality, num_classes=K, alpha=0.75, gamma=2.0),
    ):
        assert loss.item() == 0
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


def test_soft_losses_need_a_quality_for_each_anchor():
    logits, labels, _ = random_case()
    with pytest.raises(ValueError, match="quality"):
        quality_focal_loss(logits, labels, torch.zeros(3), num_classes=K, beta=2.0)


def test_paired_iou_is_the_diagonal_of_box_iou():
    low = torch.rand(20, 2) * 50
    boxes = torch.cat([low, low + torch.rand(20, 2) * 30], 1)
    others = boxes + torch.randn(20, 4) * 3
    others[:, 2:] = torch.maximum(others[:, 2:], others[:, :2])
    torch.testing.assert_close(paired_iou(boxes, others), box_iou(boxes, others).diagonal())
    assert paired_iou(torch.zeros(1, 4), torch.zeros(1, 4)).item() == 0


@pytest.mark.parametrize("beta", [-1.0, 0.5, float("nan")])
def test_a_beta_without_a_gradient_is_refused(beta):
    logits, labels, quality = random_case()
    with pytest.raises(ValueError, match="beta is .*; it must be 0, or at least 1"):
        quality_focal_loss(logits, labels, quality, num_classes=K, beta=beta)


def test_varifocal_loss_has_no_negative_weight():
    logits, labels, quality = random_case()
    with pytest.raises(ValueError, match="alpha is -1"):
        varifocal_loss(logits, labels, quality, num_classes=K, alpha=-1.0, gamma=2.0)
