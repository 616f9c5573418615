from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.utils.data import DataLoader

from focal_d2.data.handover import hand_over
from focal_d2.errors import UserError, user_message
from tests.conftest import REPOSITORY

DTYPES = [torch.uint8, torch.bool, torch.int64, torch.float32, torch.float64, torch.bfloat16, torch.complex64]


def through_a_worker(samples: object) -> object:
    """Hand over a sample as the loader does, from another process."""
    (arrived,) = DataLoader([samples], batch_size=None, collate_fn=hand_over, num_workers=1)
    return arrived


def test_all_arrives_as_it_was():
    whole = torch.randn(5, 7)
    tensors = {
        **{
            f"{dtype} {shape}": torch.ones(shape, dtype=dtype)
            for dtype in DTYPES
            for shape in [(3, 5), (), (0, 4)]
        },
        "columns": whole[:, 1:3],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(whole),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "odd": torch.arange(13, dtype=torch.uint8),
        "after odd": torch.randn(3, dtype=torch.float64),
    }
    instances = Instances((4, 5), gt_boxes=Boxes(torch.randn(2, 4)), gt_classes=torch.arange(2))
    arrays = [np.arange(6, dtype=np.float16).reshape(2, 3), np.zeros((0, 4)), np.arange(9).reshape(3, 3).T]
    sample = {
        "file_name": "é.png",
        "sampling_seed": 7,
        "tensors": tensors,
        "instances": instances,
        "arrays": arrays,
    }
    arrived = through_a_worker(sample)
    assert {**arrived, "tensors": 0, "instances": 0, "arrays": 0} == {
        **sample,
        "tensors": 0,
        "instances": 0,
        "arrays": 0,
    }
    for name, x in tensors.items():
        y = arrived["tensors"][name]
        assert (type(y), y.dtype, y.shape, y.stride()) == (type(x), x.dtype, x.shape, x.stride()), name
        assert torch.equal(y, x), name
        assert y.requires_grad == x.requires_grad
    assert arrived["instances"].image_size == (4, 5)
    assert torch.equal(arrived["instances"].gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(arrived["instances"].gt_classes, instances.gt_classes)
    for x, y in zip(arrays, arrived["arrays"], strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_what_arrives_can_be_written_to():
    arrived = through_a_worker([torch.zeros(3), np.zeros(3)])
    for x in arrived:
        x += 1
        assert x.sum() == 3


def test_without_workers_samples_stay_as_they_are():
    samples = [{"image": torch.zeros(3)}]
    assert hand_over(samples) is samples


def handles() -> int:
    return len(os.listdir("/dev/fd"))


def test_large_batches_of_many_workers_need_few_handles():
    """With PyTorch's own way each of the 4 * 2 * 64 * 3 tensors would be a handle."""
    samples = [{name: torch.zeros(3) for name in ("image", "boxes", "classes")}] * 64 * 16
    before = handles()
    most, kept = 0, []
    for batch in DataLoader(samples, batch_size=64, collate_fn=hand_over, num_workers=4):
        kept.append(batch)
        most = max(most, handles())
    assert len(kept) == 16
    assert most - before <= 4 * 4 + 4


def test_a_worker_without_handles_is_one_line(monkeypatch):
    def none_left(name):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "memfd_create", none_left)
    with pytest.raises(UserError, match="Too many open files") as raised:
        through_a_worker([torch.zeros(3)])
    assert user_message(raised.value) == (
        "a process that reads images cannot hand over a batch: [Errno 24] Too many open files; raise the "
        "number of file handles (ulimit -n) or lower DATALOADER.NUM_WORKERS"
    )


@pytest.mark.slow  # another process that imports PyTorch
def test_batches_larger_than_dev_shm_arrive():
    script = """
import torch
from torch.utils.data import DataLoader
from focal_d2.data.handover import hand_over
for x in DataLoader([torch.ones(2**21)] * 4, batch_size=2, collate_fn=hand_over, num_workers=1):
    assert x[0].sum() == x[1].sum() == 2**21
"""
    shell = 'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", shell, sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("mounting a tmpfs is not permitted here")
    assert done.returncode == 0, done.stderr
