"""The one-pass focal loss against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from focal_d2.ops import dense_focal_loss, fused, sigmoid_focal_loss

LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


def make_level(n=2, a=3, k=4, h=5, w=6, *, scale=4.0, dtype=torch.float64, layout="contiguous"):
    logits = (torch.randn(n, a * k, h, w, dtype=torch.float64) * scale - 2).to(dtype)
    labels = torch.randint(-1, k + 1, (n, h * w * a))
    labels[torch.rand(labels.shape) < 0.7] = k
    return logits.to(memory_format=LAYOUTS[layout]).requires_grad_(), labels


def reference(logits, labels, k, alpha, gamma):
    flat = logits.unflatten(1, (-1, k)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    return sigmoid_focal_loss(flat, labels, num_classes=k, alpha=alpha, gamma=gamma)


def value_and_gradient(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_value_and_gradient_are_the_references(layout, alpha, gamma, monkeypatch):
    monkeypatch.setattr(fused, "_CHUNK", 37)  # several chunks, the last one short
    logits, labels = make_level(layout=layout)
    expected = value_and_gradient(reference(logits, labels, 4, alpha, gamma), logits)
    got = value_and_gradient(
        dense_focal_loss(logits, labels, num_classes=4, alpha=alpha, gamma=gamma), logits
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert got[1].is_contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(8))
def test_random_levels(dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    n, a, k, h, w = (int(torch.randint(1, m, (), generator=generator)) for m in (4, 5, 20, 9, 9))
    alpha = float(torch.rand((), generator=generator))
    gamma = float(torch.rand((), generator=generator) * 5)
    torch.manual_seed(seed)
    logits, labels = make_level(n, a, k, h, w, dtype=dtype)
    expected = value_and_gradient(reference(logits, labels, k, alpha, gamma), logits)
    got = value_and_gradient(
        dense_focal_loss(logits, labels, num_classes=k, alpha=alpha, gamma=gamma), logits
    )
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got[1], expected[1], rtol=tolerance, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("x", [-1e4, -88.0, -17.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 17.0, 88.0, 1e4])
def test_float32_is_precise_for_any_logit(x, gamma):
    for label in (0, 1):  # positive, background
        results = []
        for dtype in (torch.float32, torch.float64):
            logits = torch.full((1, 1, 1, 1), x, dtype=torch.float32).to(dtype).requires_grad_()
            labels = torch.tensor([[label]])
            if dtype == torch.float32:
                loss = dense_focal_loss(logits, labels, num_classes=1, alpha=0.25, gamma=gamma)
            else:
                loss = reference(logits, labels, 1, 0.25, gamma)
            results.append(torch.stack([y.double().squeeze() for y in value_and_gradient(loss, logits)]))
        assert results[0].isfinite().all()
        # A positive was summed as a negative first: what is left of that is a rounding of |x|.
        torch.testing.assert_close(results[0][0], results[1][0], rtol=3e-6, atol=1e-7 * abs(x))
        torch.testing.assert_close(results[0][1], results[1][1], rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("label", [-1, 4])
def test_all_ignored_and_no_positives(label):
    logits, labels = make_level(dtype=torch.float32)
    labels.fill_(label)
    loss = dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    loss.backward()
    if label == -1:
        assert loss == 0
        assert (logits.grad == 0).all()
    else:
        torch.testing.assert_close(loss, reference(logits, labels, 4, 0.25, 2.0))


def test_zero_images_have_a_gradient_path():
    logits, labels = make_level(n=0)
    loss = dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == logits.shape


def test_backward_scales_and_runs_once():
    logits, labels = make_level()
    loss = dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    (3 * loss).backward(retain_graph=True)
    (expected,) = torch.autograd.grad(reference(logits, labels, 4, 0.25, 2.0), logits)
    torch.testing.assert_close(logits.grad, 3 * expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="IMPLEMENTATION reference"):
        loss.backward()


def test_a_second_derivative_raises():
    logits, labels = make_level()
    loss = dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_gradients_accumulate_over_batches():
    logits, labels = make_level()
    for _ in range(2):
        dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0).backward()
    (expected,) = torch.autograd.grad(reference(logits, labels, 4, 0.25, 2.0), logits)
    torch.testing.assert_close(logits.grad, 2 * expected, rtol=1e-9, atol=1e-12)


def test_without_gradient_only_the_value():
    logits, labels = make_level()
    with torch.no_grad():
        loss = dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(logits, labels, 4, 0.25, 2.0).detach())


def test_worked_example():
    # p_t = 0.9 at γ 2 is 100 times below cross entropy.
    logits = torch.full((1, 1, 1, 1), math.log(9.0))
    labels = torch.zeros(1, 1, dtype=torch.int64)
    loss = dense_focal_loss(logits, labels, num_classes=1, alpha=-1.0, gamma=2.0)
    assert loss.item() == pytest.approx(-math.log(0.9) / 100, rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 5}, "do not fit: with K=5"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"gamma": -1.0}, "gamma is -1.0"),
    ],
)
def test_bad_arguments_raise(change, message):
    logits, labels = make_level()
    with pytest.raises(ValueError, match=message):
        dense_focal_loss(logits, labels, **{"num_classes": 4, "alpha": 0.25, "gamma": 2.0, **change})
    with pytest.raises(ValueError, match="labels must be int64"):
        dense_focal_loss(logits, labels.int(), num_classes=4, alpha=0.25, gamma=2.0)
