"""Every loss learns."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2.modeling.losses import DenseBatch
from focal_d2.ops import sigmoid_focal_loss
from focal_d2.ops.losses.ghm import harmonise
from tests.conftest import make_cfg
from tests.modeling.losses.test_losses import NAMES
from tests.modeling.test_retinanet import make_image


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_lowers_itself_in_30_iterations(name):
    # "paper": the moving average would rise or fall by itself.
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NAME=name, MODEL__FOCAL__LOSS__NORMALIZER="paper"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = [make_image(4, 3), make_image(3, 3)]
    batches: list[DenseBatch] = []
    model.cls_loss.register_forward_pre_hook(lambda _, args: batches.append(args[0]))
    for _ in range(30):
        losses = model(images)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        assert all(x.isfinite() for x in losses.values())
    first, *_, last = batches
    # IoU targets and what OHEM suppresses move with the predicted boxes: held where they were.
    last = last._replace(deltas=first.deltas)
    with torch.no_grad():
        if name == "ghm":
            before, after = harmonised_as_at_the_start(first, last)
        else:
            before, after = (model.cls_loss(x) for x in (first, last))
    assert after < 0.8 * before


def harmonised_as_at_the_start(*batches: DenseBatch) -> list[torch.Tensor]:
    # GHM's value hardly moves: every gradient norm that occurs weighs the same, however many examples have
    # it. What its gradient lowers is the cross entropy under each example's weight.
    def cross_entropy(batch):
        return sigmoid_focal_loss(
            batch.all_logits(), batch.labels, num_classes=3, alpha=-1.0, gamma=0.0, reduction="none"
        )

    norms = 1 - (-cross_entropy(batches[0])).exp()
    counts = (batches[0].labels >= 0).unsqueeze(-1).expand_as(norms)
    density = harmonise(norms, counts, torch.zeros(30), 0.0)
    return [(cross_entropy(batch) / density).sum() for batch in batches]
