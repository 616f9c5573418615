"""Every loss learns."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from tests.conftest import make_cfg
from tests.modeling.losses.test_losses import NAMES
from tests.modeling.test_retinanet import make_image


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_loss_lowers_itself_in_30_iterations(name):
    # "paper": the moving average would rise or fall by itself.
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NAME=name, MODEL__FOCAL__LOSS__NORMALIZER="paper"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    batch = [make_image(4, 3), make_image(3, 3)]
    values = []
    for _ in range(30):
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        values.append(losses["loss_cls"].item())
    assert torch.tensor(values).isfinite().all()
    assert sum(values[-3:]) < 0.8 * sum(values[:3])
