from __future__ import annotations

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    build_anchor_generator,
    build_model,
)

from focal_d2 import FocalRetinaNet, Predictor, add_focal_config, build_focal_resnet_fpn_backbone
from focal_d2.config import leaves
from focal_d2.config.unread_keys import _COUNTERPARTS, is_unused, unread_keys
from focal_d2.data import check_datasets, register_datasets
from focal_d2.engine import FocalTrainer, load_config
from focal_d2.engine.setup import set_up_job
from focal_d2.inference.views import use_views
from focal_d2.modeling.build import resolve_device
from tests.conftest import make_resnet_cfg
from tests.engine.runs import run_main
from tests.recording import RecordingConfig
from tests.test_configs import CONFIGS, EXAMPLES, name_of

ZOO = Path(model_zoo.__file__).parent / "configs"

# Read where a recording config does not see it: when YAML is merged.
READ_OTHERWISE = {"VERSION"}
# The loader and the mapper read these, but no RetinaNet uses what they load for it.
FOR_OTHER_DETECTORS = {"MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"}
# Their range is checked with every architecture; only FocalRetinaNet uses the values.
CHECKED = {"TEST.AUG.MIN_SIZES", "TEST.AUG.MAX_SIZE", "TEST.FOCAL.AUG_TURNS"} | {
    f"TEST.FOCAL.TILES.{name}" for name in ("ENABLED", "WINDOW", "OVERLAP", "MERGE")
}
# What makes trainer, loader and mapper read more.
MORE = [
    {
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "INPUT__CROP__ENABLED": True,
        "TEST__PRECISE_BN__ENABLED": True,
        "MODEL__RESNETS__NORM": "BN",
        "DATALOADER__SAMPLER_TRAIN": "RepeatFactorTrainingSampler",
        "SOLVER__LR_SCHEDULER_NAME": "WarmupStepWithFixedGammaLR",
        "SOLVER__MAX_ITER": 5000,
    },
    {"SOLVER__LR_SCHEDULER_NAME": "WarmupCosineLR", "SOLVER__FOCAL__OPTIMIZER": "AdamW"},
    {"MODEL__LOAD_PROPOSALS": True, "MODEL__MASK_ON": True},
]


def recorded(reads: set[str], **overrides: object) -> RecordingConfig:
    return RecordingConfig(make_resnet_cfg(MODEL__RETINANET__NUM_CONVS=1, **overrides), reads)


@pytest.fixture
def job_settings(coco_dataset, tmp_path) -> dict[str, object]:
    data = coco_dataset(images=6)
    register_datasets([data.entry])
    ids = [x["image_id"] for x in DatasetCatalog.get(data.name)]
    nothing = {"boxes": [np.zeros((0, 4))] * 6, "objectness_logits": [np.zeros(0)] * 6, "ids": ids}
    (tmp_path / "proposals.pkl").write_bytes(pickle.dumps(nothing))
    return {
        "DATASETS__TRAIN": (data.name,),
        "DATASETS__TEST": (data.name,),
        "DATASETS__PROPOSAL_FILES_TRAIN": (str(tmp_path / "proposals.pkl"),),
        "DATASETS__PROPOSAL_FILES_TEST": (str(tmp_path / "proposals.pkl"),),
        "SOLVER__MAX_ITER": 1,
        "OUTPUT_DIR": str(tmp_path / "out"),
    }


def reads_of_jobs(settings: dict[str, object], **overrides: object) -> set[str]:
    """Run jobs of all kinds and return the keys that were read."""
    reads = set(READ_OTHERWISE)
    cfg = recorded(reads, **settings, **overrides)
    resolve_device(cfg)
    check_datasets(cfg, training=True)
    set_up_job(cfg, argparse.Namespace(eval_only=False))
    trainer = FocalTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    (image, *_) = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    Predictor(cfg)(image["file_name"])
    for more in MORE:
        cfg = recorded(reads, **{**settings, **overrides, **more})
        FocalTrainer(cfg)
        FocalTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])
    use_views(recorded(reads, TEST__AUG__ENABLED=True, **overrides), trainer.offered)
    build_model(recorded(reads, MODEL__BACKBONE__NAME="build_retinanet_resnet_fpn_backbone", **overrides))
    rotated = recorded(reads, MODEL__ANCHOR_GENERATOR__NAME="RotatedAnchorGenerator")
    build_anchor_generator(rotated, [ShapeSpec(stride=8)] * 5)
    return reads


def all_keys() -> list[str]:
    cfg = get_cfg()
    add_focal_config(cfg)
    return list(leaves(cfg))


@pytest.mark.parametrize("architecture", ["FocalRetinaNet", "RetinaNet"])
def test_list_of_unused_keys_is_what_jobs_do_not_read(architecture, job_settings):
    reads = reads_of_jobs(job_settings, MODEL__META_ARCHITECTURE=architecture) - FOR_OTHER_DETECTORS
    reads -= CHECKED if architecture != "FocalRetinaNet" else set()
    cfg = make_resnet_cfg(MODEL__META_ARCHITECTURE=architecture)
    unused = {key for key in all_keys() if is_unused(cfg, key)}
    unread = {key for key in all_keys() if key not in reads and key != "DATASETS.FOCAL"}  # of load_config
    assert unused == unread, "what was read has changed: correct the lists in focal_d2/config/unread_keys.py"


@pytest.mark.parametrize(
    "config",
    ["COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", "Misc/cascade_mask_rcnn_R_50_FPN_1x",
     "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "COCO-Detection/rpn_R_50_C4_1x"],
)  # fmt: skip
def test_other_architectures_read_no_key_of_the_list(config):
    reads: set[str] = set()
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"]
    cfg = load_config(str(ZOO / f"{config}.yaml"), overrides)
    build_model(RecordingConfig(cfg, reads))
    assert len(reads) > 40
    assert {key for key in reads if is_unused(cfg, key)} == set()
    assert is_unused(cfg, "MODEL.RETINANET.NUM_CLASSES")
    assert is_unused(cfg, "MODEL.FOCAL.LOSS.NAME")


def test_a_job_without_retinanet_reads_no_key_of_the_list(job_settings):
    r_cnn = {
        "MODEL__BACKBONE__NAME": "build_resnet_fpn_backbone",
        "MODEL__RPN__IN_FEATURES": ["p3", "p4", "p5", "p6"],
        "MODEL__ROI_HEADS__IN_FEATURES": ["p3", "p4", "p5"],
        "MODEL__ROI_HEADS__NAME": "StandardROIHeads",
        "MODEL__ROI_HEADS__NUM_CLASSES": 3,
        "MODEL__ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead",
        "MODEL__ROI_BOX_HEAD__NUM_FC": 1,
        "MODEL__ANCHOR_GENERATOR__SIZES": [[32]],
        "MODEL__META_ARCHITECTURE": "GeneralizedRCNN",
    }
    reads: set[str] = set()
    cfg = recorded(reads, **job_settings, **r_cnn)
    set_up_job(cfg, argparse.Namespace(eval_only=False))
    trainer = FocalTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert {key for key in reads - CHECKED if is_unused(cfg, key)} == set()


def test_unread_keys_names_what_is_read_instead():
    cfg = make_resnet_cfg(
        MODEL__ROI_HEADS__NUM_CLASSES=7,
        MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.5,
        MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE=64,
        MODEL__MASK_ON=True,
        GLOBAL__HACK=2.0,
    )
    assert unread_keys(cfg) == [
        "MODEL.ROI_HEADS.NUM_CLASSES is 7, which FocalRetinaNet does not read: it reads "
        "MODEL.RETINANET.NUM_CLASSES, which is 3",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST is 0.5, which FocalRetinaNet does not read: it reads "
        "MODEL.RETINANET.SCORE_THRESH_TEST, which is 0.05",
        "FocalRetinaNet and focal_d2's trainer make no use of MODEL.MASK_ON, "
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE, GLOBAL.HACK",
    ]


@pytest.mark.parametrize(
    "architecture, key, value, named",
    [
        ("FocalRetinaNet", "TEST__AUG__ENABLED", True, False),
        ("FocalRetinaNet", "GLOBAL__HACK", 2.0, True),
        ("FocalRetinaNet", "MODEL__LOAD_PROPOSALS", True, True),
        ("FocalRetinaNet", "MODEL__KEYPOINT_ON", True, True),
        ("FocalRetinaNet", "MODEL__RPN__BATCH_SIZE_PER_IMAGE", 8, True),
        ("RetinaNet", "MODEL__FOCAL__LOSS__NAME", "ghm", True),
        ("RetinaNet", "MODEL__FOCAL__FPN__INIT", "paper", False),
        ("RetinaNet", "MODEL__FOCAL__TIMM__NAME", "resnet18", True),  # of a ResNet of detectron2
        ("FocalRetinaNet", "MODEL__FOCAL__LOSS__NAME", "ghm", False),
        ("GeneralizedRCNN", "TEST__AUG__ENABLED", True, True),
        ("GeneralizedRCNN", "MODEL__RETINANET__NMS_THRESH_TEST", 0.4, True),
        ("GeneralizedRCNN", "MODEL__MASK_ON", True, False),
        ("GeneralizedRCNN", "MODEL__FOCAL__AMP__DTYPE", "float16", False),
        # Read, if need be under another key.
        ("FocalRetinaNet", "TEST__PRECISE_BN__ENABLED", True, False),
        ("FocalRetinaNet", "INPUT__CROP__SIZE", [0.5, 0.5], False),
        ("FocalRetinaNet", "SOLVER__CLIP_GRADIENTS__CLIP_VALUE", 5.0, False),
        ("FocalRetinaNet", "MODEL__RESNETS__DEFORM_MODULATED", True, False),
        ("FocalRetinaNet", "MODEL__ANCHOR_GENERATOR__ANGLES", [[0, 90]], False),
    ],
)
def test_unread_keys_names_keys_without_effect_only(architecture, key, value, named):
    plain = get_cfg()
    add_focal_config(plain)
    plain.MODEL.META_ARCHITECTURE = architecture
    assert unread_keys(plain) == []
    *sections, name = key.split("__")
    node = plain
    for section in sections:
        node = node[section]
    node[name] = value
    expected = f"{architecture} and focal_d2's trainer make no use of {key.replace('__', '.')}"
    assert unread_keys(plain) == ([expected] if named else [])


def test_unread_keys_names_those_of_another_assigner():
    changed = {"MODEL__RETINANET__IOU_THRESHOLDS": [0.3, 0.5], "MODEL__FOCAL__ASSIGNER__TOPK": 5}
    assert unread_keys(make_resnet_cfg(**changed)) == [
        "MODEL.FOCAL.ASSIGNER.TOPK has no effect, because MODEL.FOCAL.ASSIGNER.NAME is iou: only atss reads "
        "it"
    ]
    assert unread_keys(make_resnet_cfg(**changed, MODEL__FOCAL__ASSIGNER__NAME="atss")) == [
        "MODEL.RETINANET.IOU_THRESHOLDS has no effect, because MODEL.FOCAL.ASSIGNER.NAME is atss: only iou "
        "reads it"
    ]


class MyRetinaNet(FocalRetinaNet):
    pass


def my_backbone(cfg, input_shape):
    return build_focal_resnet_fpn_backbone(cfg, input_shape)


class MyAnchors:
    pass


@pytest.mark.parametrize(
    "key, registry, part",
    [
        ("MODEL__META_ARCHITECTURE", META_ARCH_REGISTRY, MyRetinaNet),
        ("MODEL__BACKBONE__NAME", BACKBONE_REGISTRY, my_backbone),
        ("MODEL__ANCHOR_GENERATOR__NAME", ANCHOR_GENERATOR_REGISTRY, MyAnchors),
    ],
)
def test_unread_keys_is_silent_where_a_part_may_read_them(monkeypatch, key, registry, part):
    monkeypatch.setitem(registry._obj_map, part.__name__, part)
    cfg = make_resnet_cfg(**{key: part.__name__}, TEST__AUG__ENABLED=True, MODEL__MASK_ON=True)
    assert unread_keys(cfg) == []


@pytest.mark.parametrize("path", CONFIGS + EXAMPLES, ids=name_of)
def test_our_configs_set_no_unread_key(path):
    assert unread_keys(load_config(str(path), ["MODEL.DEVICE", "cpu"])) == []


@pytest.mark.parametrize("path", sorted(ZOO.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_model_zoo_sets_no_unread_key(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"], trust_files=True)
    with_augmentation = path.stem == "mask_rcnn_R_50_FPN_inference_acc_test"
    assert unread_keys(cfg) == (
        ["GeneralizedRCNN and focal_d2's trainer make no use of TEST.AUG.ENABLED, TEST.AUG.MIN_SIZES"]
        if with_augmentation
        else []
    )
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        ours = load_config(
            str(path), ["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", "FocalRetinaNet"], trust_files=True
        )
        assert unread_keys(ours) == []


def test_unread_keys_are_one_warning_of_a_job(job, monkeypatch, capfd):
    # Of a backbone that is not registered here it is not known what it reads.
    overrides = ["MODEL.BACKBONE.NAME", "build_focal_resnet_fpn_backbone", "MODEL.RESNETS.DEPTH", 18]
    overrides += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.MASK_ON", True, "GLOBAL.HACK", 2.0]
    overrides += ["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
    assert run_main(monkeypatch, "--config-file", job[0], *overrides) == 0
    console = capfd.readouterr().out
    line = "FocalRetinaNet and focal_d2's trainer make no use of MODEL.MASK_ON, GLOBAL.HACK"
    assert console.count("make no use of") == console.count(line) == 1


def test_counterparts_are_keys():
    keys = set(all_keys())
    for pair in _COUNTERPARTS.items():
        assert {f"MODEL.{key}" for key in pair} <= keys


def test_a_written_config_has_no_unread_keys():
    cfg = make_resnet_cfg()
    again = make_resnet_cfg()
    again.merge_from_other_cfg(CfgNode.load_cfg(cfg.dump()))
    assert unread_keys(again) == []
