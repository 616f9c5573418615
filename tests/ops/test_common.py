from __future__ import annotations

import pytest
import torch

from focal_d2.ops.common import sum_rows


@pytest.mark.parametrize("count", [0, 1, 255, 256, 257, 700, 2000])
def test_sum_of_rows_has_the_same_bits_whatever_zeros_follow(count):
    rows = (torch.randn(count, 4) * 10 ** torch.empty(count, 1).uniform_(-6, 4)).requires_grad_()
    total = sum_rows(rows)
    torch.testing.assert_close(total, rows.sum(), rtol=1e-5, atol=1e-3)
    for length in (count, count + 1, 2 * count, 4096):
        padded = torch.cat([rows, torch.zeros(length - count, 4)])
        assert torch.equal(sum_rows(padded), total)
    assert torch.equal(torch.autograd.grad(total, rows)[0], torch.ones(count, 4))
