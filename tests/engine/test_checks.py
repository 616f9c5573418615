"""The list of checks that training, evaluation, the doctor and a study share."""

from __future__ import annotations

import pytest

from focal_d2 import UserError
from focal_d2.analysis.doctor import examine
from focal_d2.engine import FocalTrainer, check_job, load_config
from focal_d2.engine.checks import CHECKS, PHASES, run_checks
from focal_d2.modeling.build import build_without_memory
from tests.engine.runs import run_main

MISTAKES = {
    "DATALOADER.SAMPLER_TRAIN": ("none", "legal values: TrainingSampler"),
    "SOLVER.IMS_PER_BATCH": ("0", "SOLVER.IMS_PER_BATCH is 0"),
    "SOLVER.FOCAL.ACCUMULATE": ("3", "within 1 and the 2 images"),
    "TEST.FOCAL.BEST_METRIC": ("bbox/nothing", "TEST.EVAL_PERIOD is 0|the evaluation gives AP"),
    "OUTPUT_DIR": ("", "OUTPUT_DIR is empty"),
    "TEST.EXPECTED_RESULTS": ("[['segm', 'AP', 1.0, 1.0]]", 'names the task "segm"; legal values: bbox'),
    "MODEL.KEYPOINT_ON": ("True", "MODEL.KEYPOINT_ON (is True, but .* has no|True needs) keypoints"),
}


def trainer(path, overrides):
    FocalTrainer(load_config(path, overrides))


def doctor(path, overrides):
    cfg = load_config(path, overrides)
    return examine(cfg, build_without_memory(cfg), decode=False)


@pytest.mark.parametrize("key, value, message", [(key, *x) for key, x in MISTAKES.items()])
@pytest.mark.parametrize("program", [trainer, doctor, check_job])
def test_every_program_finds_the_same_mistakes(job, program, key, value, message):
    if program is check_job and key == "OUTPUT_DIR":
        message = "OUTPUT_DIR is set for each run"
    with pytest.raises(UserError, match=message):
        program(str(job[0]), [key, value])


@pytest.mark.parametrize("key, value, message", [(key, *x) for key, x in MISTAKES.items()])
def test_a_job_writes_nothing_before_it_is_checked(job, tmp_path, monkeypatch, capfd, key, value, message):
    assert run_main(monkeypatch, "--config-file", job[0], key, value) == 2
    assert not (tmp_path / "out").exists()


def test_an_evaluation_needs_nothing_of_training(job, monkeypatch, capfd):
    overrides = ["DATALOADER.SAMPLER_TRAIN", "none", "SOLVER.FOCAL.ACCUMULATE", "3", "DATASETS.TRAIN", "()"]
    assert run_main(monkeypatch, "--eval-only", "--config-file", job[0], *overrides) == 2
    assert "error: --eval-only needs a checkpoint" in capfd.readouterr().err


def test_a_warm_up_longer_than_the_training_cannot_be_rescaled(job):
    overrides = ["SOLVER.RESCALE_INTERVAL", "True", "SOLVER.WARMUP_ITERS", "1000"]
    with pytest.raises(UserError, match="SOLVER.WARMUP_ITERS is 1000; with SOLVER.RESCALE_INTERVAL"):
        trainer(str(job[0]), overrides)


def test_a_study_checks_the_batch_of_several_processes(job, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    check_job(str(job[0]), num_gpus=2)
    with pytest.raises(UserError, match="IMS_PER_BATCH is 3; it must be a multiple of .* processes, 2"):
        check_job(str(job[0]), ["SOLVER.IMS_PER_BATCH", "3"], num_gpus=2)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:1"])
def test_several_processes_do_not_share_the_gpu_that_a_config_names(job, device):
    cfg = load_config(str(job[0]))
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    run_checks(cfg, "config", processes=1)
    if device == "cuda":
        run_checks(cfg, "config", processes=2)
    else:
        with pytest.raises(
            UserError, match=f"MODEL.DEVICE is {device}, one GPU for 2 processes: set it to cu"
        ):
            run_checks(cfg, "config", processes=2)


def test_every_check_is_in_a_phase():
    assert {phase for phase, _ in CHECKS} == set(PHASES)


def test_an_image_that_annotations_make_huge_is_refused(job):
    """Its anchors would take 68 GB."""
    path, data = job
    text = data.annotations.read_text().replace('"width": 64', '"width": 1048576')
    data.annotations.write_text(text.replace('"height": 64', '"height": 1048576'))
    with pytest.raises(UserError, match="1048576 pixels by its annotations, more than INPUT"):
        check_job(str(path), [])
    assert "image-too-large" in {finding.code for finding in doctor(str(path), []).findings}
