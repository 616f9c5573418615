from __future__ import annotations

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform

from focal_d2 import UserError
from focal_d2.modeling.losses import BOX_LOSSES, BoxLoss, LossNormalizer
from focal_d2.modeling.losses.box import encode


def box_loss(kind: str, **changes) -> BoxLoss:
    arguments = {"smooth_l1_beta": 0.0, "ghm_mu": 0.02, "ghm_bins": 10, "ghm_momentum": 0.0, **changes}
    return BoxLoss(kind=kind, transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)), **arguments)


def test_smooth_l1_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    gt = torch.tensor([[1.0, 0.0, 11.0, 10.0]])  # moved by a tenth of its width: dx = 0.1
    deltas = torch.tensor([[0.3, 0.0, 0.0, -0.05]])
    l1 = box_loss("smooth_l1")(deltas, anchors, gt)
    assert l1.item() == pytest.approx(0.2 + 0.05, rel=1e-6)
    smooth = box_loss("smooth_l1", smooth_l1_beta=0.1)(deltas, anchors, gt)
    assert smooth.item() == pytest.approx((0.2 - 0.05) + 0.5 * 0.05**2 / 0.1, rel=1e-5)


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_loss_is_zero_for_exact_boxes_and_for_none(kind):
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [5.0, 5.0, 45.0, 25.0]])
    gt = torch.tensor([[2.0, 1.0, 9.0, 12.0], [0.0, 0.0, 30.0, 30.0]])
    loss = box_loss(kind)
    exact = loss(loss.transform.get_deltas(anchors, gt), anchors, gt)
    assert exact.item() == pytest.approx(0, abs=1e-5)
    none = torch.zeros(0, 4, requires_grad=True)
    nothing = loss(none, anchors[:0], gt[:0])
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, none)[0].shape == (0, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_box_loss_of_diverged_deltas_is_not_finite_and_raises_nothing(kind, value):
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    deltas = torch.tensor([[value, 0.0, 0.0, 0.0]], requires_grad=True)
    loss = box_loss(kind)(deltas, anchors, anchors)
    assert not loss.isfinite()
    loss.backward()


@pytest.mark.parametrize("kind", BOX_LOSSES)
def test_what_a_box_loss_is_divided_by(kind):
    assert box_loss(kind).divided_by_positives == (kind != "ghm_r")


@pytest.mark.parametrize("change", [{"ghm_mu": 0.0}, {"ghm_bins": 0}, {"ghm_momentum": 1.5}])
def test_ghm_r_parameters_out_of_range_are_named(change):
    with pytest.raises(UserError, match="MODEL.FOCAL.GHM_R: MU is .* are needed"):
        box_loss("ghm_r", **change)


def test_ghm_r_by_hand():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    # μ = 3, differences 4, 4, 0, 0: √(d² + μ²) - μ is 2, 2, 0, 0 and the norms are 0.8, 0.8, 0, 0.
    deltas = torch.tensor([[4.0, -4.0, 0.0, 0.0]], requires_grad=True)
    loss = box_loss("ghm_r", ghm_mu=3.0, ghm_bins=2)
    value = loss(deltas, anchors, anchors)
    # Two bins with two each: density 2 / ½ = 4.
    assert value.item() == pytest.approx((2 + 2) / 4)
    assert loss.histogram.tolist() == [2, 2]
    assert "histogram" in loss.state_dict()
    # The density is a constant: the gradient is the norm, with its sign, over it.
    grad = torch.autograd.grad(value, deltas)[0]
    torch.testing.assert_close(grad, torch.tensor([[0.2, -0.2, 0.0, 0.0]]))


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


def test_deltas_are_detectron2s_to_the_bit():
    low = torch.rand(500, 2) * 800
    anchors = torch.cat([low, low + 1 + torch.rand(500, 2) * 300], 1)
    boxes = anchors + torch.rand(500, 4)
    for weights in ((1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (1.0, 2.0, 3.0, 4.0)):
        expected = Box2BoxTransform(weights=weights).get_deltas(anchors, boxes)
        assert torch.equal(encode(anchors, boxes, weights), expected)
