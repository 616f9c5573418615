from __future__ import annotations

import doctest
import math

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss as fvcore_focal_loss
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

import focal_d2.ops.losses.focal as module
from focal_d2.ops import IGNORE_LABEL, sigmoid_focal_loss

K = 7


def random_case(dtype: torch.dtype = torch.float64, scale: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(5, 11, K) logits and labels of every kind: classes, background, ignored."""
    logits = (torch.randn(5, 11, K, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    labels = torch.randint(-1, K + 1, (5, 11))
    assert {IGNORE_LABEL, K} < set(labels.unique().tolist())
    return logits, labels


def one_hot(labels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return F.one_hot(labels.clamp(min=0), K + 1)[..., :-1].to(dtype)


def loss_and_grad(loss: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize(
    "reference, rtol, atol",
    [
        (torchvision_focal_loss, 1e-9, 1e-12),
        (fvcore_focal_loss, 1e-5, 1e-6),
    ],  # fvcore's computes in float32
)
def test_sigmoid_focal_loss_equals_other_operators(reference, rtol, atol, alpha, gamma):
    logits, labels = random_case()
    valid = labels != IGNORE_LABEL
    expected = loss_and_grad(
        reference(
            logits[valid],
            one_hot(labels, logits.dtype)[valid],
            alpha=alpha,
            gamma=gamma,
            reduction="sum",
        ),
        logits,
    )
    actual = loss_and_grad(
        sigmoid_focal_loss(logits, labels, num_classes=K, alpha=alpha, gamma=gamma), logits
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=rtol, atol=atol)


def test_sigmoid_focal_loss_is_cross_entropy_at_gamma_0():
    logits, labels = random_case()
    valid = labels != IGNORE_LABEL
    expected = F.binary_cross_entropy_with_logits(
        logits[valid], one_hot(labels, logits.dtype)[valid], reduction="sum"
    )
    actual = sigmoid_focal_loss(logits, labels, num_classes=K, alpha=-1.0, gamma=0.0)
    torch.testing.assert_close(
        loss_and_grad(actual, logits), loss_and_grad(expected, logits), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("label, alpha_t", [(0, 0.25), (1, 0.75)])
def test_sigmoid_focal_loss_is_100_times_below_cross_entropy_at_p_t_09(label, alpha_t):
    # Paper, section 3.2: with γ = 2 an example at p_t = 0.9 has 100 times lower loss than with CE.
    x = math.log(0.9 / 0.1) * (1 if label == 0 else -1)
    loss = sigmoid_focal_loss(
        torch.tensor([[x]], dtype=torch.float64),
        torch.tensor([label]),
        num_classes=1,
        alpha=0.25,
        gamma=2.0,
    )
    assert loss.item() == pytest.approx(alpha_t * -math.log(0.9) / 100, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sigmoid_focal_loss_gradcheck(gamma):
    extremes = torch.tensor([[-30.0, -8.0, 0.0, 8.0, 30.0, 0.3, -2.0]], dtype=torch.float64)
    logits = torch.cat([extremes, extremes, extremes]).requires_grad_()
    labels = torch.tensor([2, K, IGNORE_LABEL])
    assert torch.autograd.gradcheck(
        lambda x: sigmoid_focal_loss(x, labels, num_classes=K, alpha=0.25, gamma=gamma), logits
    )


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sigmoid_focal_loss_is_finite_at_huge_logits(dtype, gamma):
    logits = torch.tensor([[1e4], [-1e4], [1e4], [-1e4]], dtype=dtype, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 1])
    loss, grad = loss_and_grad(
        sigmoid_focal_loss(logits, labels, num_classes=1, alpha=0.25, gamma=gamma), logits
    )
    # The two wrong ones cost α_t · 10^4 each, the two right ones nothing.
    assert loss.item() == pytest.approx((0.25 + 0.75) * float(logits[0].detach()), rel=1e-6)
    torch.testing.assert_close(
        grad, torch.tensor([[0.0], [-0.25], [0.75], [0.0]], dtype=dtype), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sigmoid_focal_loss_reduces_half_precision_in_float32(dtype):
    logits, labels = random_case(dtype)
    upcast = logits.detach().float().requires_grad_()
    actual = sigmoid_focal_loss(logits, labels, num_classes=K, alpha=0.25, gamma=2.0)
    expected = sigmoid_focal_loss(upcast, labels, num_classes=K, alpha=0.25, gamma=2.0)
    assert actual.dtype == torch.float32
    assert actual.item() == expected.item()
    assert torch.autograd.grad(actual, logits)[0].dtype == dtype


def test_sigmoid_focal_loss_ignores_what_is_ignored():
    logits, labels = random_case()
    _, grad = loss_and_grad(sigmoid_focal_loss(logits, labels, num_classes=K, alpha=0.25, gamma=2.0), logits)
    assert torch.equal((grad == 0).all(-1), labels == IGNORE_LABEL)


@pytest.mark.parametrize("anchors", [0, 6])
def test_sigmoid_focal_loss_of_nothing_is_zero_with_gradient(anchors):
    logits = torch.randn(2, anchors, K, requires_grad=True)
    labels = torch.full((2, anchors), IGNORE_LABEL)
    loss, grad = loss_and_grad(
        sigmoid_focal_loss(logits, labels, num_classes=K, alpha=0.25, gamma=2.0), logits
    )
    assert loss.item() == 0
    assert torch.equal(grad, torch.zeros_like(logits))


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"num_classes": 3}, r"logits \(5, 11, 7\)"),
        ({"labels": torch.zeros(5, 10, dtype=torch.int64)}, r"labels' \(5, 10\)"),
        ({"labels": torch.zeros(5, 11)}, "int64"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"gamma": -1.0}, "gamma is -1.0"),
    ],
)
def test_sigmoid_focal_loss_raises(changes, match):
    logits, labels = random_case()
    arguments = {"labels": labels, "num_classes": K, "alpha": 0.25, "gamma": 2.0, **changes}
    with pytest.raises(ValueError, match=match):
        sigmoid_focal_loss(logits, **arguments)


def test_sigmoid_focal_loss_example_runs():
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted == 3
    assert result.failed == 0
