"""What a loss keeps for backward, as docs/losses.md says."""

from __future__ import annotations

import pytest
import torch

from tests.modeling.losses import test_losses
from tests.modeling.losses.test_losses import build, make_batch


@pytest.mark.parametrize(
    "implementation, dtype, expected",
    [
        ("reference", torch.bfloat16, 25),
        ("reference", torch.float32, 25),
        ("fused", torch.bfloat16, 2),
        ("fused", torch.float32, 4),
    ],
)
def test_bytes_that_are_kept_for_each_logit(monkeypatch, implementation, dtype, expected):
    monkeypatch.setattr(test_losses, "K", 80)  # few classes: what is kept for each anchor would count
    loss = build("focal", implementation=implementation)
    batch = make_batch(loss)
    batch = batch._replace(logits=[x.detach().to(dtype).requires_grad_() for x in batch.logits])
    storages = {}

    def note(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        value = loss(batch)
    for x in batch.logits:
        storages.pop(x.untyped_storage().data_ptr(), None)
    kept = sum(x.nbytes() for x in storages.values())
    if implementation == "fused":
        kept += sum(x.nbytes for x in value.grad_fn.gradients)
    assert kept / sum(x.numel() for x in batch.logits) == pytest.approx(expected, abs=0.2)
