"""Networks of timm in whole jobs."""

from __future__ import annotations

import shutil

import pytest

from tests.engine.runs import run_main
from tests.engine.test_resume import differences, saved

# One of each family that has a small one: timm's own test models, where there are some.
FAMILIES = [
    *("test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "test_nfnet", "test_byobnet"),
    *("lcnet_035", "efficientvit_b0"),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_network_of_timm_trains_and_resumes_to_the_bit(job_file, tmp_path, monkeypatch, name):
    common = ["--config-file", job_file, "MODEL.BACKBONE.NAME", "build_focal_timm_fpn_backbone"]
    common += ["MODEL.FOCAL.TIMM.NAME", name, "MODEL.FOCAL.TIMM.BATCH_NORM", "trained", "INPUT.FORMAT", "RGB"]
    common += ["DATASETS.TEST", "()", "SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1]
    common += ["MODEL.FPN.OUT_CHANNELS", 32, "SOLVER.FOCAL.LAYER_DECAY", 0.7, "OUTPUT_DIR"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_main(monkeypatch, *common, whole) == 0
    parts.mkdir()
    shutil.copy(whole / "model_0000000.pth", parts)
    (parts / "last_checkpoint").write_text("model_0000000.pth")
    assert run_main(monkeypatch, "--resume", *common, parts) == 0
    first, last, resumed = (
        saved(x) for x in (whole / "model_0000000.pth", whole / "model_final.pth", parts / "model_final.pth")
    )
    assert differences(last, resumed) == []
    assert differences(first["model"], last["model"])
