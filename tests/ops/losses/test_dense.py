"""The one-pass losses against their references, computed as on a CPU and as on a GPU without kernels."""

from __future__ import annotations

import math

import pytest
import torch

from focal_d2.ops import (
    dense_focal_loss,
    dense_quality_focal_loss,
    dense_varifocal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)
from focal_d2.ops.losses import dense, dense_chunks, dense_masked

LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}


@pytest.fixture(autouse=True, params=["CPU", "GPU"])
def _path(request, monkeypatch) -> None:
    """Let the CPU compute as a GPU without kernels does."""
    if request.param == "GPU":
        monkeypatch.setattr(
            dense,
            "_in_chunks",
            lambda levels, gradients, *more: dense_masked.masked_loss(
                list(zip(levels, gradients, strict=True)), *more
            ),
        )
        monkeypatch.setattr(dense_chunks, "_NEAR_1", -1.0)  # a GPU takes the way for all logits


def make_levels(
    n=2, a=3, k=4, sizes=((5, 6), (2, 3)), *, scale=4.0, dtype=torch.float64, layout="contiguous"
):
    logits = [
        (torch.randn(n, a * k, h, w, dtype=torch.float64) * scale - 2)
        .to(dtype, memory_format=LAYOUTS[layout])
        .requires_grad_()
        for h, w in sizes
    ]
    labels = torch.randint(-1, k + 1, (n, sum(h * w * a for h, w in sizes)))
    labels[torch.rand(labels.shape) < 0.7] = k
    return logits, labels


def make_level(n=2, a=3, k=4, h=5, w=6, **more):
    (logits,), labels = make_levels(n, a, k, [(h, w)], **more)
    return logits, labels


def flatten(levels, k):
    return torch.cat([x.unflatten(1, (-1, k)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in levels], dim=1)


def reference(logits, labels, k, alpha, gamma):
    return sigmoid_focal_loss(flatten([logits], k), labels, num_classes=k, alpha=alpha, gamma=gamma)


def value_and_gradient(loss, logits):
    gradients = torch.autograd.grad(loss, logits)
    return loss.detach(), *gradients


# One-pass loss, reference, and how random parameters are drawn for K classes.
LOSSES = {
    "focal": (
        dense_focal_loss,
        sigmoid_focal_loss,
        lambda k: {"alpha": torch.rand(()).item(), "gamma": torch.rand(()).item() * 5},
    ),
    "focal, α a class": (
        dense_focal_loss,
        sigmoid_focal_loss,
        lambda k: {"alpha": torch.rand(k), "gamma": float(torch.randint(0, 3, ()))},
    ),
    "quality focal": (
        dense_quality_focal_loss,
        quality_focal_loss,
        lambda k: {"beta": [0.0, 1.0, 1.5, 2.0, 3.0][torch.randint(0, 5, ())]},
    ),
    "varifocal": (
        dense_varifocal_loss,
        varifocal_loss,
        lambda k: {"alpha": torch.rand(()).item(), "gamma": torch.rand(()).item() * 5},
    ),
}


def compare_at_random(name, layout, dtype, seed):
    """Value and gradients of the one-pass loss and of its reference, for a random batch."""
    torch.manual_seed(seed)
    n, a, k, levels = (int(torch.randint(1, m, ())) for m in (4, 5, 20, 5))
    sizes = torch.randint(1, 9, (levels, 2)).tolist()
    logits, labels = make_levels(n, a, k, sizes, dtype=dtype, layout=layout)
    dense, plain, draw = LOSSES[name]
    more = {"num_classes": k, **draw(k)}
    soft = []
    if "quality" in name or "varifocal" in name:
        # A quality of 0 and of 1, too.
        soft = [(torch.rand(labels.shape, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)]
    expected = value_and_gradient(plain(flatten(logits, k), labels, *soft, **more), logits)
    got = value_and_gradient(dense(logits, labels, *soft, **more), logits)
    for gradient in got[1:]:
        assert gradient.is_contiguous(memory_format=LAYOUTS[layout])
        assert gradient.dtype == dtype
    return got, expected


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_the_references(name, layout, seed, monkeypatch):
    for module in (dense_chunks, dense_masked):
        monkeypatch.setattr(module, "CHUNK", 37)  # several chunks, the last one short
    got, expected = compare_at_random(name, layout, torch.float64, seed)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_special_parameters(alpha, gamma):
    logits, labels = make_level()
    expected = value_and_gradient(reference(logits, labels, 4, alpha, gamma), logits)
    loss = dense_focal_loss([logits], labels, num_classes=4, alpha=alpha, gamma=gamma)
    torch.testing.assert_close(value_and_gradient(loss, logits), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", LOSSES)
def test_in_lower_precision(name, seed, dtype):
    layout = list(LAYOUTS)[seed % 2]
    got, expected = compare_at_random(name, layout, dtype, seed)
    assert got[0].dtype == torch.float32
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(got[1:], expected[1:], rtol=tolerance, atol=2e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("x", [-1e4, -88.0, -17.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 17.0, 88.0, 1e4])
def test_float32_is_precise_for_any_logit(x, gamma):
    for label in (0, 1):  # positive, background
        results = []
        for dtype in (torch.float32, torch.float64):
            logits = torch.full((1, 1, 1, 1), x, dtype=torch.float32).to(dtype).requires_grad_()
            labels = torch.tensor([[label]])
            if dtype == torch.float32:
                loss = dense_focal_loss([logits], labels, num_classes=1, alpha=0.25, gamma=gamma)
            else:
                loss = reference(logits, labels, 1, 0.25, gamma)
            results.append(torch.stack([y.double().squeeze() for y in value_and_gradient(loss, logits)]))
        assert results[0].isfinite().all()
        # A positive was summed as a negative first: what is left of that is a rounding of |x|.
        torch.testing.assert_close(results[0][0], results[1][0], rtol=3e-6, atol=1e-7 * abs(x))
        # From γ = 1 on, the logarithm's rounding is left in: p^γ makes it as small as it has to be.
        rounding = gamma * 6e-8 / (1 + math.exp(min(-x, 88))) ** gamma if gamma >= 1 else 1e-30
        torch.testing.assert_close(results[0][1], results[1][1], rtol=3e-6, atol=rounding)


@pytest.mark.parametrize("label", [-1, 4])
def test_all_ignored_and_no_positives(label):
    logits, labels = make_level(dtype=torch.float32)
    labels.fill_(label)
    loss = dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0)
    loss.backward()
    if label == -1:
        assert loss == 0
        assert (logits.grad == 0).all()
    else:
        torch.testing.assert_close(loss, reference(logits, labels, 4, 0.25, 2.0))


def test_zero_images_have_a_gradient_path():
    logits, labels = make_level(n=0)
    loss = dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0)
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == logits.shape


def test_backward_scales_and_runs_once():
    logits, labels = make_level()
    loss = dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0)
    (3 * loss).backward(retain_graph=True)
    (expected,) = torch.autograd.grad(reference(logits, labels, 4, 0.25, 2.0), logits)
    torch.testing.assert_close(logits.grad, 3 * expected, rtol=1e-9, atol=1e-12)
    with pytest.raises(RuntimeError, match="IMPLEMENTATION reference"):
        loss.backward()


def test_float16_gradients_do_not_vanish_before_they_are_scaled():
    # As with a loss scaler: 3 p³ of p = 1/1000 is 3e-9, and float16 ends at 6e-8.
    logits, labels = make_level(scale=0.0, dtype=torch.float16)
    logits.data.fill_(-6.9)
    labels.fill_(4)
    loss = dense_focal_loss([logits], labels, num_classes=4, alpha=-1.0, gamma=2.0)
    (gradient,) = torch.autograd.grad(loss * 65536, logits)
    x = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference(x, labels, 4, -1.0, 2.0) * 65536, x)
    torch.testing.assert_close(gradient.double(), expected, rtol=2e-3, atol=0)


def test_a_second_derivative_raises():
    logits, labels = make_level()
    loss = dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_gradients_accumulate_over_batches():
    logits, labels = make_level()
    for _ in range(2):
        dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0).backward()
    (expected,) = torch.autograd.grad(reference(logits, labels, 4, 0.25, 2.0), logits)
    torch.testing.assert_close(logits.grad, 2 * expected, rtol=1e-9, atol=1e-12)


def test_without_gradient_only_the_value():
    logits, labels = make_level()
    with torch.no_grad():
        loss = dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(logits, labels, 4, 0.25, 2.0).detach())


def test_worked_example():
    # p_t = 0.9 at γ 2 is 100 times below cross entropy.
    logits = torch.full((1, 1, 1, 1), math.log(9.0))
    labels = torch.zeros(1, 1, dtype=torch.int64)
    loss = dense_focal_loss([logits], labels, num_classes=1, alpha=-1.0, gamma=2.0)
    assert loss.item() == pytest.approx(-math.log(0.9) / 100, rel=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_classes": 5}, "do not fit: with K=5"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": torch.zeros(2)}, "alpha .* must be a number or"),
        ({"gamma": -1.0}, "gamma is -1.0"),
    ],
)
def test_bad_arguments_raise(change, message):
    logits, labels = make_level()
    with pytest.raises(ValueError, match=message):
        dense_focal_loss([logits], labels, **{"num_classes": 4, "alpha": 0.25, "gamma": 2.0, **change})
    with pytest.raises(ValueError, match="quality .* must be labels'"):
        dense_quality_focal_loss([logits], labels, torch.zeros(1), num_classes=4, beta=2.0)
    with pytest.raises(ValueError, match="labels must be int64"):
        dense_focal_loss([logits], labels.int(), num_classes=4, alpha=0.25, gamma=2.0)


def test_inside_autocast_nothing_changes():
    logits, labels = make_level(dtype=torch.float32)
    plain = value_and_gradient(
        dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0), logits
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0)
        inside = value_and_gradient(loss, logits)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


def test_inside_a_compiled_function_it_runs_as_it_is():
    logits, labels = make_level(dtype=torch.float32)

    def double(x):
        return 2 * dense_focal_loss([x * 1.0], labels, num_classes=4, alpha=0.25, gamma=2.0)

    expected = value_and_gradient(double(logits), logits)
    got = value_and_gradient(torch.compile(double, backend="eager")(logits), logits)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e4, 1e9])
@pytest.mark.parametrize("label", [-1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_wild_logit_of_a_special_anchor_hurts_no_other(value, label, layout):
    logits, labels = make_level(dtype=torch.float32, scale=1.0, layout=layout)
    labels[0, 0] = label
    with torch.no_grad():
        logits[0, 2, 0, 0] = value  # class 2 of the first anchor of the first cell
    expected = value_and_gradient(reference(logits, labels, 4, 0.25, 2.0), logits)
    got = value_and_gradient(dense_focal_loss([logits], labels, num_classes=4, alpha=0.25, gamma=2.0), logits)
    for gradient in (got[1], expected[1]):
        gradient[0, 2, 0, 0] = 0  # the reference's own is NaN there, even where it is ignored
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_labels_beyond_the_classes_are_background_and_below_0_ignored():
    logits, labels = make_level()
    results = []
    for background, ignored in ((4, -1), (9, -2)):
        changed = torch.where(labels == 4, background, torch.where(labels == -1, ignored, labels))
        results.append(reference(logits, changed, 4, 0.25, 2.0))
        results.append(dense_focal_loss([logits], changed, num_classes=4, alpha=0.25, gamma=2.0))
    torch.testing.assert_close(results[1:], results[:1] * 3)


def test_layouts_that_are_not_dense_are_copied():
    logits, labels = make_level(w=12)
    sliced = logits[..., ::2]
    expected = value_and_gradient(reference(sliced, labels[:, : labels.shape[1] // 2], 4, 0.25, 2.0), logits)
    loss = dense_focal_loss([sliced], labels[:, : labels.shape[1] // 2], num_classes=4, alpha=0.25, gamma=2.0)
    torch.testing.assert_close(value_and_gradient(loss, logits), expected, rtol=1e-9, atol=1e-12)
