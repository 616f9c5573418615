"""The range of every key: what is refused, and that what people use is not."""

from __future__ import annotations

import math
from pathlib import Path

import detectron2.model_zoo
import pytest
import yaml
from detectron2.config import get_cfg

from focal_d2 import UserError, add_focal_config
from focal_d2.config import KEYS, RANGES, leaves
from focal_d2.config.files import merge_file
from focal_d2.config.legal_values import check_values
from focal_d2.engine import load_config
from focal_d2.engine.trainer import FocalTrainer
from focal_d2.modeling.build import building
from tests.conftest import REPOSITORY, make_cfg
from tests.test_configs import CONFIGS, EXAMPLES, name_of

BASE = REPOSITORY / "configs/Base-FocalRetinaNet.yaml"
ZOO = Path(detectron2.model_zoo.__file__).parent / "configs"
ALL_CONFIGS = [*CONFIGS, *EXAMPLES, *sorted(ZOO.rglob("*.yaml"))]


NONSENSE = [
    ("SOLVER.MAX_ITER", 0, "at least 1 and at most 1000000000"),
    ("SOLVER.MAX_ITER", 10**20, "at least 1 and at most 1000000000"),
    ("SOLVER.BASE_LR", math.nan, "at least 0"),
    ("SOLVER.GAMMA", math.inf, "within 0 and 10"),
    ("SOLVER.WARMUP_FACTOR", -1.0, "within 0 and 1"),
    ("SOLVER.STEPS", [100, 50], "ascending"),
    ("SOLVER.WEIGHT_DECAY_BIAS", "none", "legal values: None; or it must be at least 0"),
    ("SEED", 10**20, "at least -2147483648 and at most 2147483647"),
    ("DATALOADER.NUM_WORKERS", -1, "within 0 and 1024"),
    ("DATALOADER.NUM_WORKERS", 100_000, "within 0 and 1024"),
    ("DATALOADER.REPEAT_THRESHOLD", 1.5, "within 0 and 1"),
    ("INPUT.MIN_SIZE_TRAIN", [], "a list of whole numbers, each within 0 and 100000"),
    ("INPUT.MIN_SIZE_TRAIN", [-800], "each within 0 and 100000"),
    ("INPUT.MIN_SIZE_TRAIN", ["a"], "a list of whole numbers"),
    ("INPUT.MAX_SIZE_TRAIN", 0, "at least 1 and at most"),
    ("INPUT.CROP.TYPE", "square", "legal values: absolute, absolute_range, relative"),
    ("MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "each above 0"),
    ("MODEL.PIXEL_MEAN", [1.0, math.nan, 1.0], "a list of finite numbers"),
    ("MODEL.BACKBONE.FREEZE_AT", 99, "within 0 and 5"),
    ("MODEL.FPN.OUT_CHANNELS", 10**9, "within 1 and 8192"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[]], "none can be empty"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [], "none can be empty"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[-32]], "a list of numbers, each within 0.001 and 100000"),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[1e30]], "each within 0.001 and 100000"),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0]], "each within 0.001 and 1000"),
    ("MODEL.RETINANET.BBOX_REG_WEIGHTS", [0.0] * 4, "a list of 4 numbers, each above 0"),
    ("MODEL.RETINANET.NUM_CLASSES", 10**9, "at least 1 and at most 1000000"),
    ("MODEL.RETINANET.IOU_THRESHOLDS", [0.5, 0.4], "not descending"),
    ("MODEL.FOCAL.LOSS.GAMMA", math.inf, "finite"),
    ("MODEL.FOCAL.LOSS.ALPHA", [0.5, math.nan], "finite"),
    ("SOLVER.BASE_LR", 1e300, "at least 0 and at most 1e"),
    ("DATASETS.TRAIN", [3], "a list of names"),
    ("TEST.EXPECTED_RESULTS", [[]], "a list of .task, metric, value, tolerance"),
    ("TEST.EXPECTED_RESULTS", [["bbox", "AP", "x", 1.0]], "a list of .task, metric, value, tolerance"),
    ("TEST.FOCAL.MAX_DETS", [10, 10], "ascending, or \\[\\]"),
]


@pytest.mark.parametrize("key, value, words", NONSENSE)
def test_nonsense_is_refused_with_key_value_and_range(tmp_path, key, value, words):
    content = value
    for name in reversed(key.split(".")):
        content = {name: content}
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"_BASE_": str(BASE), **content}))
    with pytest.raises(UserError, match=rf"^{key} is .*; .*{words}") as error:
        load_config(str(path), ["MODEL.DEVICE", "cpu"] if not key.startswith("MODEL.DEVICE") else [])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["meta", "mps", "gpu", "cpu:1"])
def test_devices_that_cannot_train_are_refused(device):
    with pytest.raises(UserError, match=f"MODEL.DEVICE is .?{device}.?; (legal values|it must be numbered)"):
        load_config(str(BASE), ["MODEL.DEVICE", device])


def test_a_division_by_a_value_is_one_line():
    cfg = make_cfg(SOLVER__LR_SCHEDULER_NAME="WarmupCosineLR", SOLVER__BASE_LR=0.0)
    with pytest.raises(UserError, match="cannot build the trainer .*ZeroDivisionError"), building("trainer"):
        FocalTrainer.build_lr_scheduler(cfg, None)


def test_what_detectron2_was_not_compiled_with_is_one_line():
    with (
        pytest.raises(UserError, match="cannot build .*ImportError: no DeformConv"),
        building("model"),
    ):
        raise ImportError("no DeformConv")


@pytest.mark.parametrize("path", ALL_CONFIGS, ids=name_of)
def test_every_config_of_ours_and_of_the_model_zoo_is_legal(path):
    cfg = get_cfg()
    add_focal_config(cfg)
    merge_file(cfg, str(path))
    check_values(cfg)
    check_values(cfg, "")  # those that its architecture does not read as well


def test_every_key_of_ours_has_a_range():
    plain, ours = get_cfg(), get_cfg()
    add_focal_config(ours)
    assert set(leaves(ours)) - set(leaves(plain)) == set(KEYS)
    assert set(leaves(ours)) >= set(RANGES)


@pytest.mark.parametrize("key", RANGES)
def test_no_range_holds_nan(key):
    kind = type(leaves(make_cfg())[key])
    values = [math.nan, *([] if key.endswith("NORM_TYPE") else [math.inf, -math.inf])]
    if kind in (float, int):
        assert not any(RANGES[key].holds(x) for x in values)
    if kind in (list, tuple) and key != "DATASETS.FOCAL":
        assert not any(RANGES[key].holds([x] * n) for x in values for n in range(1, 6))


def test_keys_that_the_job_does_not_read_may_be_anything():
    cfg = make_cfg(MODEL__META_ARCHITECTURE="GeneralizedRCNN", MODEL__RETINANET__PRIOR_PROB=2.0)
    check_values(cfg)
    with pytest.raises(UserError, match="PRIOR_PROB is 2.0; it must be above 0 and below 1"):
        check_values(cfg, "MODEL.RETINANET.")
