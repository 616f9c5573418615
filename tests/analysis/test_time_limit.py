from __future__ import annotations

import pytest

from focal_d2 import UserError
from focal_d2.analysis.new.probe import Trial
from focal_d2.analysis.time_limit import fit_schedule
from tests.conftest import make_cfg


def fit(minutes, *, seconds=0.5, test_seconds=0.1, images=30, val=("val",)):
    cfg = make_cfg(
        DATASETS__VAL=val,
        DATASETS__TEST=("test", "other"),
        SOLVER__MAX_ITER=1000,
        SOLVER__STEPS=(600, 900),
        SOLVER__WARMUP_ITERS=50,
        SOLVER__CHECKPOINT_PERIOD=400,
        TEST__EVAL_PERIOD=500,
    )
    measured = Trial(seconds, [], [], test_seconds)
    scaled, line = fit_schedule(cfg, minutes, trial=lambda cfg, seconds: measured, count=lambda name: images)
    return dict(zip(scaled[::2], scaled[1::2], strict=True)), line


def test_the_schedule_is_scaled_to_the_time():
    # 15 s of start and end; two validations of 30 images and two test sets of 30, 0.1 s each: 12 s. Of 277 s
    # 250 s are left: 500 iterations of 0.5 s.
    scaled, line = fit(277 / 60)
    assert scaled == {
        "SOLVER.MAX_ITER": "500",
        "SOLVER.STEPS": "(300, 450)",
        "SOLVER.WARMUP_ITERS": "25",
        "SOLVER.CHECKPOINT_PERIOD": "200",
        "TEST.EVAL_PERIOD": "250",
    }
    assert line == "0.5 s an iteration on this machine: 500 of 1000 iterations"


def test_a_schedule_that_fits_is_left_alone():
    assert fit(60) == ({}, "0.5 s an iteration on this machine: 1000 of 1000 iterations")


def test_without_validation_sets_the_test_sets_are_evaluated_every_time():
    # Two evaluations of 60 images: 12 s again.
    assert fit(277 / 60, val=())[0]["SOLVER.MAX_ITER"] == "500"


def test_short_schedules_keep_legal_values():
    scaled, _ = fit(28 / 60, seconds=0.5)
    assert scaled["SOLVER.MAX_ITER"] == "2"
    assert scaled["SOLVER.STEPS"] == "(1, 2)"
    assert (
        scaled["SOLVER.WARMUP_ITERS"]
        == scaled["SOLVER.CHECKPOINT_PERIOD"]
        == scaled["TEST.EVAL_PERIOD"]
        == "1"
    )


def test_a_time_that_is_too_short_is_named():
    with pytest.raises(UserError, match="--minutes 0.4 is too short: start and evaluation take 27 s"):
        fit(0.4)
