"""Other meta-architectures than ours, through `train_net.py` and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN
from detectron2.structures import Boxes, Instances
from torch import nn

from focal_d2 import Predictor, UserError
from focal_d2.config.architectures import class_key, known_architecture
from focal_d2.engine import FocalTrainer, load_config
from tests.conftest import make_cfg
from tests.engine.runs import metrics, run_command, run_main

PYRAMID = ["p2", "p3", "p4", "p5"]
FASTER_RCNN = {
    "META_ARCHITECTURE": "GeneralizedRCNN",
    "DEVICE": "cpu",
    "BACKBONE": {"NAME": "build_resnet_fpn_backbone", "FREEZE_AT": 0},
    "RESNETS": {
        "DEPTH": 18,
        "RES2_OUT_CHANNELS": 64,
        "NORM": "GN",
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    },
    "FPN": {"IN_FEATURES": ["res2", "res3", "res4", "res5"], "OUT_CHANNELS": 32, "NORM": "GN"},
    "ANCHOR_GENERATOR": {"SIZES": [[8], [16], [32], [64], [128]], "ASPECT_RATIOS": [[0.5, 1.0, 2.0]]},
    "RPN": {"IN_FEATURES": [*PYRAMID, "p6"], "POST_NMS_TOPK_TRAIN": 50, "POST_NMS_TOPK_TEST": 50},
    "ROI_HEADS": {"NAME": "StandardROIHeads", "IN_FEATURES": PYRAMID, "NUM_CLASSES": "auto"},
    "ROI_BOX_HEAD": {"NAME": "FastRCNNConvFCHead", "NUM_FC": 2, "FC_DIM": 64, "POOLER_RESOLUTION": 7},
}


@pytest.fixture
def faster_rcnn(job) -> Path:
    """detectron2's Faster R-CNN with ResNet-18 and FPN, small, on the dataset of `job`."""
    config, _ = job
    content = yaml.safe_load(config.read_text())
    del content["_BASE_"]
    content["MODEL"] = {**FASTER_RCNN, "ROI_HEADS": {**FASTER_RCNN["ROI_HEADS"], "SCORE_THRESH_TEST": 0.001}}
    content["VERSION"] = 2
    config.write_text(yaml.safe_dump(content))
    return config


def test_faster_rcnn_trains_evaluates_and_resumes(faster_rcnn, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out"
    assert run_main(monkeypatch, "--config-file", faster_rcnn, "SOLVER.MAX_ITER", 4) == 0
    figures = {name for line in metrics(out) for name in line}
    assert {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"} <= figures
    assert metrics(out)[-1]["bbox/AR@100"] > 0
    assert yaml.safe_load((out / "config.yaml").read_text())["MODEL"]["ROI_HEADS"]["NUM_CLASSES"] == 3
    evaluate = ["--eval-only", "--config-file", out / "config.yaml", "MODEL.WEIGHTS", out / "model_final.pth"]
    assert run_main(monkeypatch, *evaluate, "OUTPUT_DIR", tmp_path / "eval") == 0
    results = [x / "inference/squares_train/coco_instances_results.json" for x in (out, tmp_path / "eval")]
    assert results[0].read_text() == results[1].read_text() != "[]"
    assert run_main(monkeypatch, "--resume", "--config-file", faster_rcnn, "SOLVER.MAX_ITER", 5) == 0
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["MODEL.ROI_HEADS.NUM_CLASSES", 80], "has 3 classes (class0, class1, class2) but "
         "MODEL.ROI_HEADS.NUM_CLASSES is 80: set it to 3, or to auto"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "many"], 'ROI_HEADS.NUM_CLASSES is "many"; legal values: auto'),
        (["MODEL.MASK_ON", True], "has boxes only, but MODEL.MASK_ON True needs masks"),
        (["MODEL.KEYPOINT_ON", True], "has boxes only, but MODEL.KEYPOINT_ON True needs keypoints"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "but MODEL.META_ARCHITECTURE PanopticFPN "
         "needs classes of pixels"),
    ],
)  # fmt: skip
def test_mistakes_with_faster_rcnn_give_one_line(faster_rcnn, monkeypatch, capfd, arguments, expected):
    assert run_main(monkeypatch, "--config-file", faster_rcnn, *arguments) == 2
    errors = capfd.readouterr().err.splitlines()
    assert len([x for x in errors if expected in x]) == 1
    assert "Traceback" not in "".join(errors)


def test_keypoints_are_refused_for_a_retinanet_too(job, monkeypatch, capfd):
    assert run_main(monkeypatch, "--config-file", job[0], "MODEL.KEYPOINT_ON", True) == 2
    assert "has boxes only, but MODEL.KEYPOINT_ON True needs keypoints" in capfd.readouterr().err


def test_doctor_says_what_it_does_not_examine_of_faster_rcnn(faster_rcnn, monkeypatch, capsys):
    train = ["DATASETS.TEST", "()", "SOLVER.BASE_LR", 0.01, "SOLVER.FOCAL.OPTIMIZER", "SGD"]
    doctor = ["doctor", "--config-file", faster_rcnn, "--json"]
    assert run_command(monkeypatch, *doctor, *train, "MODEL.ROI_HEADS.NUM_CLASSES", 80) == 1
    report = json.loads(capsys.readouterr().out)
    messages = {x["code"]: x["message"] for x in report["findings"]}
    assert messages["class-count"] == "3 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 80"
    assert messages["architecture-unexamined"] == (
        "not examined of GeneralizedRCNN: anchors, and their balance; memory of a training step"
    )
    # detectron2's Faster R-CNN: 0.02 for 16 images.
    assert messages["learning-rate"].startswith("SOLVER.BASE_LR 0.01 is 4 times the 0.0025 of")
    assert not {"imbalance", "anchor-recall", "box-tiny"} & messages.keys()
    assert report["anchors"] is report["memory"] is None
    assert run_command(monkeypatch, *doctor[:-1], *train) == 0
    assert "not examined of GeneralizedRCNN" in capsys.readouterr().out


def test_commands_for_retinanets_refuse_others(faster_rcnn, monkeypatch, capsys):
    assert run_command(monkeypatch, "anchors", "--config-file", faster_rcnn) == 2
    error = capsys.readouterr().err
    assert (
        "MODEL.META_ARCHITECTURE is GeneralizedRCNN; the anchors that this command proposes are for" in error
    )


def test_faster_rcnn_predicts(faster_rcnn, tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "--config-file", faster_rcnn, "SOLVER.MAX_ITER", 1) == 0
    config = tmp_path / "out/config.yaml"
    weights = ["MODEL.WEIGHTS", tmp_path / "out/model_final.pth"]
    arguments = [
        "--config-file",
        config,
        tmp_path / "train/images",
        "--output",
        tmp_path / "drawn",
    ]
    capsys.readouterr()
    assert run_command(monkeypatch, "predict", *arguments, "--json", "--threshold", 0, *weights) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert len(lines) == 6
    assert {x for line in lines for x in line["classes"]} <= {"class0", "class1", "class2"}


class OneBox(nn.Module):
    """An architecture of a user's own: a box in every image, moved by one weight."""

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: list[dict[str, Any]]) -> Any:
        if self.training:
            self.autocast = torch.is_autocast_enabled("cpu")
            return {"loss": (self.weight - 1).square()}
        result = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[0.0, 0.0, 32.0, 32.0]])))
        result.scores, result.pred_classes = self.weight[None].sigmoid(), torch.tensor([2])
        return [{"instances": result} for _ in inputs]


class MyRCNN(GeneralizedRCNN):
    pass


@pytest.fixture
def own_architectures():
    for kind in (OneBox, MyRCNN):
        META_ARCH_REGISTRY._do_register(kind.__name__, kind)
    ROI_HEADS_REGISTRY._do_register("MyHeads", nn.Identity)
    yield
    for kind in (OneBox, MyRCNN):
        del META_ARCH_REGISTRY._obj_map[kind.__name__]
    del ROI_HEADS_REGISTRY._obj_map["MyHeads"]


def test_architecture_of_the_users_own_trains_without_a_class_count(
    own_architectures, job, tmp_path, monkeypatch, capsys
):
    config, _ = job
    own = ["--config-file", config, "MODEL.META_ARCHITECTURE", "OneBox", "MODEL.RETINANET.NUM_CLASSES", 80]
    assert run_main(monkeypatch, *own, "SOLVER.MAX_ITER", 2, "VIS_PERIOD", 1) == 0
    assert metrics(tmp_path / "out")[-1]["bbox/AR@100"] >= 0
    capsys.readouterr()
    assert run_command(monkeypatch, "doctor", *own, "DATASETS.TEST", "()") == 0
    assert "not examined of OneBox: number of classes; anchors" in capsys.readouterr().out


@pytest.mark.parametrize("enabled", [True, False])
def test_mixed_precision_is_around_other_models(own_architectures, job, monkeypatch, enabled):
    overrides = ["MODEL.META_ARCHITECTURE", "OneBox", "SOLVER.AMP.ENABLED", str(enabled)]
    trainer = FocalTrainer(load_config(str(job[0]), [*overrides, "MODEL.FOCAL.AMP.DTYPE", "bfloat16"]))
    trainer.model.train()
    trainer.loop._backward([{}])
    assert trainer.model.autocast is enabled


def test_a_model_without_instances_is_told_so(faster_rcnn, tmp_path, monkeypatch):
    proposals = ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    assert run_main(monkeypatch, "--config-file", faster_rcnn, *proposals, "SOLVER.MAX_ITER", 1) == 0
    cfg = load_config(str(faster_rcnn), [*proposals, "MODEL.WEIGHTS", str(tmp_path / "out/model_final.pth")])
    with pytest.raises(UserError, match="ProposalNetwork returns proposals of an image"):
        Predictor(cfg)(next((tmp_path / "train/images").iterdir()))


@pytest.mark.parametrize(
    "architecture, heads, known, key",
    [
        ("FocalRetinaNet", "Res5ROIHeads", "FocalRetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("RetinaNet", "Res5ROIHeads", "RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("GeneralizedRCNN", "CascadeROIHeads", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("PanopticFPN", "StandardROIHeads", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("MyRCNN", "StandardROIHeads", "GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("GeneralizedRCNN", "MyHeads", None, None),
        ("ProposalNetwork", "StandardROIHeads", "ProposalNetwork", None),
        ("OneBox", "StandardROIHeads", None, None),
    ],
)
def test_class_key_is_the_one_that_is_read(own_architectures, architecture, heads, known, key):
    cfg = make_cfg(MODEL__META_ARCHITECTURE=architecture, MODEL__ROI_HEADS__NAME=heads)
    assert known_architecture(cfg) == known
    assert class_key(cfg) == key
