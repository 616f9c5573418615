"""Checkpoints that earlier versions wrote.

earlier_checkpoint.pth is model_0000003.pth of the job below, written by the code of commit 361826d, the last
one before `FocalTrainer.owners`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from focal_d2.engine import FocalTrainer, load_config
from tests.conftest import REPOSITORY
from tests.engine.test_resume import differences, saved

CHECKPOINT = Path(__file__).parent / "earlier_checkpoint.pth"
NEWER_KEYS = ["FOCAL.LAYER_DECAY"]  # of SOLVER, which the checkpoint does not have


def write_job(folder: Path, data: Any) -> Path:
    """Write a config whose training has every kind of state."""
    config = {
        "_BASE_": str(REPOSITORY / "configs/Base-FocalRetinaNet.yaml"),
        "SEED": 1,
        "OUTPUT_DIR": str(folder / "out"),
        "MODEL": {
            "DEVICE": "cpu",
            "WEIGHTS": "",
            "BACKBONE": {"NAME": "TinyPyramid", "FREEZE_AT": 0},
            "FPN": {"OUT_CHANNELS": 2, "NORM": "BN"},
            "ANCHOR_GENERATOR": {"SIZES": [[16.0], [32.0], [64.0]], "ASPECT_RATIOS": [[1.0]]},
            "RETINANET": {
                "IN_FEATURES": ["p3", "p4", "p5"],
                "NUM_CONVS": 1,
                "NUM_CLASSES": 3,
                "BBOX_REG_LOSS_TYPE": "ghm_r",
                "NORM": "",
            },
            "FOCAL": {"LOSS": {"NAME": "ghm"}},
        },
        "DATASETS": {"FOCAL": [data.entry], "TRAIN": [data.name], "TEST": [data.name]},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {
            "IMS_PER_BATCH": 2,
            "MAX_ITER": 8,
            "CHECKPOINT_PERIOD": 4,
            "WARMUP_ITERS": 2,
            "BASE_LR": 0.001,
            "FOCAL": {"OPTIMIZER": "AdamW", "EMA": 0.9},
        },
        "TEST": {"EVAL_PERIOD": 2, "FOCAL": {"BEST_METRIC": "bbox/AP"}},
        "INPUT": {"MIN_SIZE_TRAIN": [0], "MIN_SIZE_TEST": 0, "FOCAL": {"BRIGHTNESS": 0.3}},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_a_checkpoint_from_before_owners_comes_back_whole(coco_dataset, tmp_path, monkeypatch):
    path = write_job(tmp_path, coco_dataset(images=6))
    (tmp_path / "out").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "out/model_0000003.pth")
    (tmp_path / "out/last_checkpoint").write_text("model_0000003.pth")
    warnings: list[str] = []
    monkeypatch.setattr("focal_d2.engine.trainer.logger.warning", warnings.append)

    trainer = FocalTrainer(load_config(str(path)))
    trainer.resume_or_load(True)

    # Nothing is computed here, so this holds on every kind of CPU.
    content = saved(CHECKPOINT)
    assert differences(content["trainer"], trainer.state_dict()) == NEWER_KEYS
    assert differences(content["model"], dict(trainer.offered.state_dict())) == []
    assert (trainer.start_iter, warnings) == (4, [])
    assert trainer.state_dict()["data"]["images"] == 8
    # The fifth batch, whose images the earlier code drew as well.
    assert [x["image_id"] for x in next(iter(trainer.data_loader))] == [3, 5]
