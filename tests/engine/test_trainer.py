from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, check_job
from tests.conftest import make_cfg


@pytest.mark.parametrize("name, kind", [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_optimizer_is_what_yaml_says(name, kind):
    cfg = make_cfg(SOLVER__FOCAL__OPTIMIZER=name, SOLVER__BASE_LR=0.003, SOLVER__WEIGHT_DECAY=0.07)
    optimizer = FocalTrainer.build_optimizer(cfg, build_model(cfg))
    assert isinstance(optimizer, kind)
    assert {group["lr"] for group in optimizer.param_groups} == {0.003}
    # detectron2 exempts norms (SOLVER.WEIGHT_DECAY_NORM).
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.07, 0.0}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradients_are_clipped_if_yaml_says_so(name):
    cfg = make_cfg(SOLVER__FOCAL__OPTIMIZER=name)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = build_model(cfg)
    optimizer = FocalTrainer.build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * 10
    optimizer.step()
    assert all(p.grad.norm().item() == pytest.approx(0.5, rel=1e-3) for p in model.parameters())


def test_check_job_returns_what_makes_two_runs_comparable(job):
    path = str(job[0])
    config = check_job(path)
    assert "SEED: -1\n" in config
    assert "OUTPUT_DIR: ''\n" in config
    assert check_job(path, ["SOLVER.BASE_LR", "0.5"]) != config
    # α itself depends on the data, the config does not.
    assert "ALPHA: auto" in check_job(path, ["MODEL.FOCAL.LOSS.ALPHA", "auto"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["DATASETS.TRAIN", "('nothing',)"], 'dataset "nothing" is not registered'),
        (["MODEL.FOCAL.LOSS.BETA", "1.0"], "the loss focal does not read it"),
        (["SEED", "7"], "SEED is set for each run"),
        (["OUTPUT_DIR", "elsewhere"], "OUTPUT_DIR is set for each run"),
    ],
)
def test_check_job_finds_what_would_stop_the_job(job, overrides, message):
    with pytest.raises(UserError, match=message):
        check_job(str(job[0]), overrides)
