from __future__ import annotations

import pytest
import torch

from focal_d2.ops.losses.ghm import gradient_histogram, harmonise


def test_histogram_counted_by_hand():
    norms = torch.tensor([0.0, 0.05, 0.25, 0.5, 0.99, 1.0, 0.6])
    counts = torch.tensor([True, True, True, True, True, True, False])
    # Four bins: [0, ¼) has two, [¼, ½) one, [½, ¾) one (0.6 is ignored), [¾, 1] two.
    assert gradient_histogram(norms, counts, bins=4).tolist() == [2, 1, 1, 2]


def test_density_by_hand():
    norms = torch.tensor([0.0, 0.1, 0.3, 0.9])
    histogram = torch.zeros(4)
    density = harmonise(norms, torch.ones(4, dtype=torch.bool), histogram, momentum=0.0)
    # Two share the first quarter: 2 examples / ¼ = 8; the others are alone: 1 / ¼ = 4.
    assert density.tolist() == [8, 8, 4, 4]
    assert histogram.tolist() == [2, 1, 0, 1]


def test_moving_histogram():
    histogram = torch.tensor([10.0, 0.0])
    norms = torch.tensor([0.1, 0.9, 0.9])
    density = harmonise(norms, torch.ones(3, dtype=torch.bool), histogram, momentum=0.75)
    assert histogram.tolist() == [0.75 * 10 + 0.25, 0.5]
    assert density.tolist() == [15.5, 1.0, 1.0]


def test_ignored_examples_in_an_empty_bin_have_a_density():
    density = harmonise(torch.tensor([0.9]), torch.tensor([False]), torch.zeros(2), momentum=0.0)
    assert density.item() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_histogram_on_cuda_is_the_cpus():
    norms, valid = torch.rand(100_003), torch.rand(100_003) < 0.9
    norms[:10] = 1.0
    expected = gradient_histogram(norms, valid, bins=30)
    assert torch.equal(gradient_histogram(norms.cuda(), valid.cuda(), bins=30).cpu(), expected)
