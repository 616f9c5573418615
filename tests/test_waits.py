from __future__ import annotations

import pytest
import torch

from tests.waits import PretendedGPU

WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "copy to the CPU": lambda x: x.cpu(),
    "copy from the CPU": lambda x: x.copy_(torch.zeros(3)),
    "a list": lambda x: torch.tensor([1, 2], device=x.device),
    "mask": lambda x: x[x > 1],
    "assignment by a mask": lambda x: x.index_put_((x > 1,), x.new_zeros(())),
    "indices on the CPU": lambda x: x[torch.tensor([0])],
    "nonzero": lambda x: x.nonzero(),
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: torch.repeat_interleave(x.long()),
}
NO_WAITS = {
    "arithmetic": lambda x: (x * 2 + 1).sum(),
    "where": lambda x: torch.where(x > 1, x, 0.0),
    "indices": lambda x: x[torch.arange(2, device=x.device)],
    "in place": lambda x: x[1:].zero_(),
    "copy that is not waited for": lambda x: x.to("cpu", non_blocking=True),
    "nonzero of a known size": lambda x: torch.nonzero_static(x, size=2),
    "repeat of a known size": lambda x: torch.repeat_interleave(x.long(), output_size=6),
    "on the CPU": lambda x: torch.ones(3).sum().item(),
}


@pytest.mark.parametrize("what", [*WAITS, *NO_WAITS])
def test_waits_are_listed_with_their_line(what):
    with PretendedGPU() as gpu:
        x = torch.arange(1.0, 4, device="cuda")
        gpu.clear()
        (WAITS | NO_WAITS)[what](x)
    assert [wait.split()[-1].split(":")[0] for wait in gpu.waits] == ["test_waits.py"] * (what in WAITS)


def test_values_and_devices_are_those_of_a_gpu():
    with PretendedGPU() as gpu:
        model = torch.nn.Linear(2, 1).to("cuda")
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[1.0, 2.0]]))
            model.bias.zero_()
        y = model(torch.ones(3, 2, device="cuda"))
        assert y.is_cuda
        assert y.tolist() == [[3.0]] * 3
        assert gpu.pageable[-1] == 8
        gpu.clear()
        torch.empty(2, pin_memory=True).copy_(y.flatten()[:2], non_blocking=True)
        y.flatten()[:2].copy_(torch.zeros(2, pin_memory=True), non_blocking=True)
    assert not gpu.pageable
    assert not gpu.waits
    assert gpu.operations["aten::copy_"] == 2
