"""Waits are found and named, whether PyTorch warns of them or refuses them."""

from __future__ import annotations

import time
import warnings

import pytest

from focal_d2.analysis.benchmark.cuda import CpuCalls
from focal_d2.analysis.gpu_check import waits
from focal_d2.analysis.gpu_check.lines import Check
from focal_d2.analysis.gpu_check.sizes import REHEARSAL

MESSAGE = "called a synchronizing CUDA operation"


class Waiting:
    """A stage that waits as often as asked, as PyTorch shows it in its debug modes."""

    def __init__(self, cuda: CpuCalls, times: int, *, silent: bool = False) -> None:
        self.cuda, self.times, self.silent = cuda, times, silent

    def __call__(self) -> None:
        for _ in range(self.times):
            if self.cuda.get_sync_debug_mode() == "error":
                raise RuntimeError(MESSAGE)
            if self.cuda.get_sync_debug_mode() == "warn" and not self.silent:
                warnings.warn(MESSAGE, stacklevel=1)


def test_waits_are_counted_by_line():
    cuda = CpuCalls()
    counts = waits.waits_of(Waiting(cuda, 3), cuda)
    assert counts.total() == 3
    assert [place.split(":")[0] for place in counts] == ["analysis/gpu_check/test_waits.py"]
    assert cuda.get_sync_debug_mode() == "default"


def test_forbidden_waits_are_named():
    cuda = CpuCalls()
    assert waits.forbidden_wait(Waiting(cuda, 0), cuda) == ""
    assert waits.forbidden_wait(Waiting(cuda, 1), cuda).startswith("analysis/gpu_check/test_waits.py:")
    with pytest.raises(RuntimeError, match="another"):
        waits.forbidden_wait(lambda: (_ for _ in ()).throw(RuntimeError("another error")), cuda)
    assert cuda.get_sync_debug_mode() == "default"


@pytest.mark.parametrize("silent", [False, True])
def test_a_step_that_waits_misses_the_aim(silent, monkeypatch, tmp_path):
    cuda = CpuCalls()
    monkeypatch.setattr(Check, "cuda", cuda)

    class Step:
        def __init__(self, check, overrides):
            self.stages = {"labels": Waiting(cuda, 2, silent=silent), "losses": Waiting(cuda, 0)}

    monkeypatch.setattr(waits, "_Step", Step)
    (line,) = waits._count(Check("cpu", REHEARSAL, tmp_path, time.monotonic() + 100), "focal")
    assert line.value == (1 if silent else 2)  # in the mode "error" the first one ends the stage
    assert line.met is False
    assert "in labels: analysis/gpu_check/test_waits.py:" in line.beside
