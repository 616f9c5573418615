from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_another_detectron2_project_trains_and_evaluates_our_model(tmp_path):
    command = [sys.executable, str(REPOSITORY / "examples/plain_detectron2/train.py")]
    subprocess.run([*command, "OUTPUT_DIR", str(tmp_path)], check=True, cwd=tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.json").read_text().splitlines()]
    losses = [x["total_loss"] for x in lines if "total_loss" in x]
    assert losses[-1] < losses[0]
    assert (tmp_path / "model_final.pth").is_file()
    # On pictures that it was not trained on; 56 was seen.
    (ap50,) = [x["bbox/AP50"] for x in lines if "bbox/AP50" in x]
    assert 20 < ap50 <= 100
