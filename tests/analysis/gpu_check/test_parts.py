"""What the parts compute from measurements, and what only a GPU takes."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import AMPTrainer, SimpleTrainer

from focal_d2.analysis.benchmark import Setting, step
from focal_d2.analysis.gpu_check import demo, kernel_times
from focal_d2.analysis.gpu_check.lines import Check
from focal_d2.analysis.gpu_check.sizes import GPU
from focal_d2.analysis.gpu_check.steps import Gap, Span, find_gaps
from focal_d2.ops.common import LOSS_KERNELS, MATCHING_KERNELS, import_kernels
from tests.conftest import make_cfg


def test_gaps_are_the_times_in_which_nothing_runs():
    spans = [Span(0, 10, "a"), Span(30, 31, "d"), Span(4, 6, "b"), Span(12, 20, "c"), Span(20, 25, "e")]
    assert find_gaps(spans) == [Gap(5, "e", "d"), Gap(2, "a", "c")]
    assert find_gaps([]) == []


@pytest.mark.skipif(import_kernels(LOSS_KERNELS) is None, reason="needs Triton")
@pytest.mark.parametrize(
    "module, sweep",
    [
        (LOSS_KERNELS, {name: values for name, (values, _) in kernel_times.LOSS_SWEEP.items()}),
        (MATCHING_KERNELS, kernel_times.MATCHING_SWEEP),
    ],
)
def test_swept_constants_exist_and_keep_their_values(module, sweep):
    kernels = import_kernels(module)
    for constant, values in sweep.items():
        before = getattr(kernels, constant)
        assert before not in values
        with kernel_times.replaced(module, constant, values[0]):
            assert getattr(kernels, constant) == values[0]
        assert getattr(kernels, constant) == before


@pytest.mark.filterwarnings("ignore:.*GradScaler is enabled, but CUDA is not available")
@pytest.mark.parametrize(
    "device, precision, kind",
    [("cuda", "bf16", AMPTrainer), ("cuda", "fp32", SimpleTrainer), ("cpu", "bf16", SimpleTrainer)],
)
def test_detectron2s_trainer_is_that_of_its_amp_on_a_gpu(device, precision, kind, monkeypatch):
    made = []
    monkeypatch.setattr(kind, "run_step", lambda self: made.append(type(self)))
    setting = Setting(device, 64, 1, 3, 1, 1, precision)
    step.detectron2_trainer_step(make_cfg(), torch.nn.Linear(1, 1), [], setting)()
    assert made == [kind]


def test_losses_that_are_not_finite_end_the_measurement():
    with pytest.raises(FloatingPointError, match="not finite"):
        step._refuse(argparse.Namespace(losses={"loss_cls": float("nan")}))


def test_trainings_on_a_gpu_have_its_precision_and_workers(monkeypatch, tmp_path):
    jobs = []

    def stream(function, args, log, deterministic, **_):
        jobs.append(args.opts)
        output = Path(args.opts[args.opts.index("OUTPUT_DIR") + 1])
        output.mkdir()
        (output / "metrics.json").write_text('{"total_loss": 1.0, "time": 0.5}\n')
        return iter(())

    monkeypatch.setattr(demo, "stream", stream)
    check = Check("cuda", GPU, tmp_path, time.monotonic() + 100)
    first, second, *_ = demo.measurements(check)
    for measurement in (first, second):
        (line,) = measurement.run()
        assert (line.value, line.met) == (500.0, True)
    assert all(opts[opts.index("DATALOADER.NUM_WORKERS") + 1] == "8" for opts in jobs)
    assert ["float16" in opts for opts in jobs] == [False, True]
