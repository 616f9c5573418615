"""Every loss, in float64, against its formula written out plainly from probabilities."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from tests.modeling.losses.test_losses import NAMES, K, build, make_batch

# Away from the defaults, where there is a choice.
PARAMETERS = {
    "balanced_ce": {"ALPHA": 0.6},
    "fixed_weights": {"POSITIVE_WEIGHT": 3.0, "NEGATIVE_WEIGHT": 0.25},
    "focal": {"ALPHA": 0.3, "GAMMA": 1.5},
    "focal_star": {"ALPHA": 0.3, "GAMMA": 3.0, "BETA": 0.5},
    "ghm": {"BINS": 5, "MOMENTUM": 0.5},
    "hard_negative_mining": {"NEGATIVES_PER_POSITIVE": 2.0},
    "ohem": {"EXAMPLES": 9, "NMS_THRESH": 0.6},
    "quality_focal": {"BETA": 3.0},
    "softmax_focal": {"ALPHA": 0.3, "GAMMA": 1.5},
    "varifocal": {"ALPHA": 0.6, "GAMMA": 1.5},
}
# The weights of the others depend on the logits, and have no gradient.
SMOOTH = sorted(set(NAMES) - {"ghm", "ohem", "hard_negative_mining"})


def case(name, implementation):
    loss = build(name, implementation=implementation, **PARAMETERS.get(name, {}))
    batch = make_batch(loss)
    return loss, batch._replace(logits=[x.detach().double().requires_grad_() for x in batch.logits])


def formula(name, batch):
    """The loss of each anchor and class, (N, R, C), ignored anchors at 0."""
    x = batch.all_logits()
    label = batch.labels.unsqueeze(-1)
    y = (label == torch.arange(x.shape[-1])).double()
    p = x.sigmoid()
    p_t = p * y + (1 - p) * (1 - y)
    x_t = x * (2 * y - 1)
    quality = y * batch.quality().double().unsqueeze(-1)
    entropy = -(quality * p.log() + (1 - quality) * (1 - p).log())
    ce = -p_t.log()
    alpha_t = {a: a * y + (1 - a) * (1 - y) for a in (0.3, 0.6)}
    if name.startswith("softmax"):
        p_t = torch.where(label >= 0, (x.softmax(-1) * y).sum(-1, keepdim=True), 1.0)
        is_object = (batch.labels < K).double().unsqueeze(-1)
        weight = 0.3 * is_object + 0.7 * (1 - is_object)
        values = -p_t.log() if name == "softmax_ce" else -weight * (1 - p_t) ** 1.5 * p_t.log()
        return values
    values = {
        "balanced_ce": lambda: alpha_t[0.6] * ce,
        "fixed_weights": lambda: (3.0 * y + 0.25 * (1 - y)) * ce,
        "focal": lambda: alpha_t[0.3] * (1 - p_t) ** 1.5 * ce,
        "focal_star": lambda: -alpha_t[0.3] * (3.0 * x_t + 0.5).sigmoid().log() / 3.0,
        "quality_focal": lambda: (quality - p).abs() ** 3.0 * entropy,
        "varifocal": lambda: torch.where(quality > 0, quality * entropy, -0.6 * p**1.5 * (1 - p).log()),
    }.get(name, lambda: ce)()
    values = values * (label >= 0)
    if name == "ghm":
        return values / density((p - y).abs().detach(), label >= 0)
    if name in ("ohem", "hard_negative_mining"):
        return values * kept(name, values.sum(-1).detach(), batch)
    return values


def density(norms, counts):
    """From the first histogram: half of the counts, as the average starts at 0 with momentum 0.5."""
    bins = (norms * 5).floor().clamp(max=4)
    in_bin = torch.stack([((bins == j) & counts).sum() for j in range(5)])
    return 0.5 * in_bin[bins.long()] * 5


def kept(name, loss, batch):
    chosen = torch.zeros(*loss.shape, 1)
    for image, (row, labels) in enumerate(zip(loss, batch.labels, strict=True)):
        ranked = [i for i in row.argsort(descending=True).tolist() if labels[i] >= 0]
        if name == "hard_negative_mining":
            positives = [i for i in ranked if labels[i] < K]
            ranked = positives + [i for i in ranked if labels[i] == K][: 2 * len(positives)]
        else:
            boxes = batch.predicted_boxes(image, torch.arange(len(row)))
            survivors: list[int] = []
            for i in ranked:
                if not survivors or box_iou(boxes[i : i + 1], boxes[survivors]).max() <= 0.6:
                    survivors.append(i)
            ranked = survivors[:9]
        chosen[image, ranked] = 1
    return chosen


@pytest.mark.parametrize("implementation", ["reference", "auto"])
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_formulas(name, implementation):
    loss, batch = case(name, implementation)
    actual, expected = loss(batch), formula(name, batch).sum()
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(value, batch.logits) for value in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name):
    # Many backward passes through one graph, which the one-pass implementation has not.
    loss, batch = case(name, "reference")
    logits = [(x.detach() * 3).requires_grad_() for x in batch.logits]
    assert torch.autograd.gradcheck(lambda *x: loss(batch._replace(logits=list(x))), logits)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_loss_is_divided_by(name):
    # GHM's density is a number of examples already.
    assert build(name).divided_by_positives == (name != "ghm")
