from __future__ import annotations

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from focal_d2.modeling.folding import FoldedConv2d, fold_norms
from tests.conftest import make_resnet_cfg


def make_pair(**more):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for buffer in (norm.weight, norm.bias, norm.running_mean):
        buffer.copy_(torch.randn(6))
    norm.running_var.copy_(torch.rand(6) + 0.1)
    shape = {"kernel_size": 3, "stride": 2, "padding": 1, **more}
    plain = Conv2d(4, 6, norm=norm, **shape).double()
    folded = Conv2d(4, 6, norm=FrozenBatchNorm2d(6), **shape).double()
    folded.load_state_dict(plain.state_dict())
    assert fold_norms(nn.Sequential(folded)) == 1
    return plain, folded


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("more", [{}, {"activation": nn.ReLU()}, {"groups": 2}, {"dilation": 2, "stride": 1}])
def test_folding_is_the_same_function(bias, more):
    results = []
    for layer in make_pair(bias=bias, **more):
        x = torch.linspace(-2, 2, 2 * 4 * 9 * 9, dtype=torch.float64).view(2, 4, 9, 9).requires_grad_()
        assert 2 * 9 * 9 // 4 >= 4 * 9  # more cells than the weights of a filter: it does fold
        y = layer(x)
        results.append([y, *torch.autograd.grad((y**3).sum(), [x, *layer.parameters()])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


def test_names_stay_and_what_is_loaded_counts():
    plain, folded = make_pair(bias=False)
    x = torch.randn(1, 4, 15, 15, dtype=torch.float64)
    assert list(folded.state_dict()) == list(plain.state_dict())
    plain.norm.weight.mul_(2)
    folded.load_state_dict(plain.state_dict())
    torch.testing.assert_close(folded(x), plain(x))
    folded.norm = plain.norm = nn.BatchNorm2d(6).double()
    torch.testing.assert_close(folded(x), plain(x))


@pytest.mark.parametrize("norm, folds", [("FrozenBN", True), ("BN", False), ("GN", False)])
@pytest.mark.parametrize("wanted", [True, False])
def test_only_frozen_norms_and_only_if_asked(norm, folds, wanted):
    cfg = make_resnet_cfg(MODEL__RESNETS__NORM=norm, MODEL__FOCAL__FOLD_FROZEN_NORMS=wanted)
    layers = [m for m in build_model(cfg).modules() if isinstance(m, FoldedConv2d)]
    assert len(layers) == (20 if folds and wanted else 0)  # ResNet-18's convolutions


def test_weights_larger_than_the_output_are_left_alone(monkeypatch):
    folded = make_pair(bias=False)[1]
    calls = []
    monkeypatch.setattr(Conv2d, "forward", lambda self, x: calls.append(x.shape) or x)
    folded(torch.zeros(1, 4, 12, 12, dtype=torch.float64))  # 36 cells, 36 weights a filter
    assert calls == []
    folded(torch.zeros(1, 4, 10, 10, dtype=torch.float64))
    assert len(calls) == 1
