from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from focal_d2.ops import IGNORE_LABEL, softmax_focal_loss

K = 5


def random_case(dtype=torch.float64):
    logits = (torch.randn(4, 9, K + 1, dtype=torch.float64) * 4).to(dtype).requires_grad_()
    return logits, torch.randint(-1, K + 1, (4, 9))


def plain(logits, labels, alpha, gamma):
    """The formula as it stands, in double precision."""
    total = logits.sum() * 0
    for x, y in zip(logits.reshape(-1, K + 1), labels.reshape(-1).tolist(), strict=True):
        if y == IGNORE_LABEL:
            continue
        p_t = x.softmax(0)[y]
        alpha_t = 1.0 if alpha < 0 else alpha if y < K else 1 - alpha
        total = total - alpha_t * (1 - p_t) ** gamma * p_t.log()
    return total


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.25])
def test_softmax_focal_loss_is_its_formula(alpha, gamma):
    logits, labels = random_case()
    actual = softmax_focal_loss(logits, labels, num_classes=K, alpha=alpha, gamma=gamma)
    expected = plain(logits, labels, alpha, gamma)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(actual, logits)[0],
        torch.autograd.grad(expected, logits)[0],
        rtol=1e-9,
        atol=1e-11,
    )


def test_softmax_focal_loss_is_cross_entropy_at_gamma_0():
    logits, labels = random_case()
    actual = softmax_focal_loss(logits, labels, num_classes=K, alpha=-1.0, gamma=0.0)
    expected = F.cross_entropy(
        logits.reshape(-1, K + 1), labels.reshape(-1), ignore_index=IGNORE_LABEL, reduction="sum"
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_loss_gradcheck(gamma):
    logits = torch.randn(4, K + 1, dtype=torch.float64) * 8
    labels = torch.tensor([1, K, IGNORE_LABEL, 0])
    assert torch.autograd.gradcheck(
        lambda x: softmax_focal_loss(x, labels, num_classes=K, alpha=0.25, gamma=gamma),
        logits.requires_grad_(),
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_softmax_focal_loss_is_finite_at_huge_logits(dtype, gamma):
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0], [1e4, 0.0]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    loss = softmax_focal_loss(logits, labels, num_classes=1, alpha=-1.0, gamma=gamma)
    assert loss.item() == pytest.approx(2 * float(logits[0, 0].detach()), rel=1e-6)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("anchors", [0, 3])
def test_softmax_focal_loss_of_nothing_is_zero_with_gradient(anchors):
    logits = torch.randn(2, anchors, K + 1, requires_grad=True)
    labels = torch.full((2, anchors), IGNORE_LABEL)
    loss = softmax_focal_loss(logits, labels, num_classes=K, alpha=0.25, gamma=2.0)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros_like(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_focal_loss_reduces_half_precision_in_float32(dtype):
    logits, labels = random_case(dtype)
    arguments = {"num_classes": K, "alpha": 0.25, "gamma": 2.0}
    actual = softmax_focal_loss(logits, labels, **arguments)
    assert actual.dtype == torch.float32
    assert actual.item() == softmax_focal_loss(logits.float(), labels, **arguments).item()
