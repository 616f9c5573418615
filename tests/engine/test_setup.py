from __future__ import annotations

import pytest
import torch
import yaml
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.commands.cli import command_parser
from focal_d2.data.dataset_checks import check_files
from focal_d2.engine import load_config
from focal_d2.engine.setup import set_up_job
from focal_d2.modeling.build import building
from tests.conftest import REPOSITORY, make_resnet_cfg

DEMO = str(REPOSITORY / "configs/neon_trees/focal_retinanet_R_18_FPN_plain.yaml")
CPU = ["MODEL.DEVICE", "cpu"]


def test_overrides_win_over_the_file():
    cfg = load_config(DEMO, [*CPU, "SOLVER.MAX_ITER", "7"])
    assert cfg.SOLVER.MAX_ITER == 7
    assert cfg.MODEL.RESNETS.DEPTH == 18
    assert cfg.is_frozen()


def test_device_auto_is_what_there_is():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert expected == load_config(DEMO, ["MODEL.DEVICE", "auto"]).MODEL.DEVICE


def test_amp_on_a_cpu_is_bfloat16_in_the_model():
    cfg = load_config("", [*CPU, "SOLVER.AMP.ENABLED", "True"])
    assert not cfg.SOLVER.AMP.ENABLED  # detectron2's trainer for it insists on CUDA
    assert cfg.MODEL.FOCAL.AMP.ENABLED


def test_number_of_classes_may_come_from_the_data(job):
    config, _ = job
    assert load_config(str(config), ["MODEL.RETINANET.NUM_CLASSES", "auto"]).MODEL.RETINANET.NUM_CLASSES == 3
    assert load_config(str(config), CPU).MODEL.RETINANET.NUM_CLASSES == 3
    assert load_config("", CPU).MODEL.RETINANET.NUM_CLASSES == 80  # detectron2's default


def test_number_of_classes_comes_from_test_where_train_is_not_here(job):
    config, _ = job
    overrides = ["MODEL.RETINANET.NUM_CLASSES", "auto", "DATASETS.TRAIN", "('coco_2017_train',)"]
    assert load_config(str(config), overrides).MODEL.RETINANET.NUM_CLASSES == 3
    with pytest.raises(UserError, match="DATASETS.TRAIN: .*coco_2017_train.*not found"):
        load_config(str(config), [*overrides, "DATASETS.TEST", "()"])
    with pytest.raises(UserError, match="is auto, but DATASETS.TRAIN and DATASETS.TEST are empty"):
        load_config(str(config), [*overrides[:2], "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"])


@pytest.mark.parametrize(
    "text, match",
    [
        ("TEST: {FOCAL: {EVAL_BACKEND: coco}}", "EVAL_BACKEND is .coco.; legal values: hotcoco, pycocotools"),
        ("TEST: {FOCAL: {MAX_DETS: [100, 10]}}", "MAX_DETS is .100, 10.; it must be a list of .*ascending"),
        ("TEST: {FOCAL: {MAX_DETS: [true]}}", "MAX_DETS is .True."),
        ("MODEL: {RETINANET: {NUM_CLASES: 3}}", "NUM_CLASES; did you mean .*NUM_CLASSES"),
        ("MODEL: {FOCAL: {HEAD: {CHANNELS: many}}}", "MODEL.FOCAL.HEAD.CHANNELS"),
        ("SOLVER: {MAX_ITER: ten}", "SOLVER.MAX_ITER is ten; it must be a whole number$"),
        ("SOLVER: {BASE_LR: 1}", "SOLVER.BASE_LR is 1; it must be a number with a point, such as 1.0$"),
        (
            "DATASETS: {TRAIN: mine_train}",
            r"DATASETS.TRAIN is mine_train; it must be a list: \[mine_train\]$",
        ),
        ("TEST: {AUG: {ENABLED: 1}}", "TEST.AUG.ENABLED is 1; it must be True or False$"),
        ("SOLVER: {STEPS: {A: 1}}", "SOLVER.STEPS is .*; it must be a list$"),
        ("solver: {MAX_ITER: 1}", "unknown key solver; did you mean SOLVER?"),
        (
            "MODEL: {retinanet: {NUM_CLASSES: 3}}",
            "unknown key MODEL.retinanet; did you mean MODEL.RETINANET?",
        ),
        ("MODEL: [1, 2", "while parsing"),
        ("", "not a config"),
        ("- a", "not a config"),
        ("hello", "not a config"),
        ("MODEL: {1: 2}", "not a config|unknown key"),
        ("MODEL: 3", "not a config|MODEL"),
        ("MODEL: [1]", "MODEL"),
        ("_BASE_: bad.yaml", "bad.yaml: its _BASE_ leads back to it"),
        ("VERSION: foo", "not a config|VERSION"),
        ("SOLVER: {MAX_ITER: null}", "SOLVER.MAX_ITER is null; it must be a int"),
        ("MODEL: {DEVICE: null}", "MODEL.DEVICE is null"),
        (
            "DATASETS: {FOCAL: [{NAME: 3, ANNOTATIONS: a, IMAGES: b}]}",
            r"FOCAL\[0\].NAME is 3; it must be a text",
        ),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("MODEL: {META_ARCHITECTURE: FocalRetinanet}", "legal values: .*FocalRetinaNet"),
        ("MODEL: {BACKBONE: {NAME: resnet}}", "build_focal_resnet_fpn_backbone"),
        ("MODEL: {DEVICE: gpu}", "auto, cpu, cuda"),
        ("SOLVER: {FOCAL: {OPTIMIZER: Adam}}", "SGD, AdamW"),
        (
            "SOLVER: {FOCAL: {KEEP_CHECKPOINTS: -1}}",
            "SOLVER.FOCAL.KEEP_CHECKPOINTS is -1; it must be at least 0 .*0: all",
        ),
        (
            "MODEL: {META_ARCHITECTURE: RetinaNet, RETINANET: {NUM_CLASSES: many}}",
            'NUM_CLASSES is "many"; legal values: auto; or it must be at least 1 and at most 1000000',
        ),
        (
            "MODEL: {META_ARCHITECTURE: RetinaNet, RETINANET: {NUM_CLASSES: 3.0}}",
            "NUM_CLASSES is 3.0; legal values: auto; or",
        ),
        (
            "MODEL: {META_ARCHITECTURE: RetinaNet, RETINANET: {NUM_CLASSES: 0}}",
            "NUM_CLASSES is 0; legal values: auto; or",
        ),
    ],
)
def test_bad_yaml_gives_one_line(tmp_path, text, match):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    overrides = [] if "DEVICE" in text else CPU
    with pytest.raises(UserError, match=match) as error:
        load_config(str(path), overrides)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "overrides, match",
    [
        (["MODEL.FOCAL.AMP"], "KEY VALUE pairs"),
        (
            ["MODEL.FOCAL.AMPS.ENABLED", "True"],
            "unknown key MODEL.FOCAL.AMPS.ENABLED; did you mean",
        ),
        (["SOLVER.MAX_ITER", "1.5"], "SOLVER.MAX_ITER is 1.5; it must be a whole number"),
        (["solver.max_iter", "5"], "unknown key solver.max_iter; did you mean SOLVER.MAX_ITER?"),
        (["DATASETS.TRAIN", "mine"], r"DATASETS.TRAIN is mine; it must be a list: \"\['mine'\]\"$"),
        (["DATASETS.TRAIN", "mine,other"], r"is mine,other; it must be a list: \"\['mine', 'other'\]\"$"),
        (["DATASETS.TRAIN", "(mine)"], r"is \(mine\); it must be a list: \"\['mine'\]\"$"),
        (["DATASETS.FOCAL", "x"], "DATASETS.FOCAL is x; it must be a list of mappings with NAME, IMAGES, A"),
        (
            [*CPU, "DATASETS.FOCAL", "[x]"],
            r"DATASETS.FOCAL\[0\] is 'x'; it must have NAME, IMAGES, ANNOTATIONS",
        ),
        (["INPUT.MIN_SIZE_TRAIN", "800"], r"MIN_SIZE_TRAIN is 800; it must be a list: \"\[800\]\"$"),
        (["SEED", "1", "--resume"], "--resume must come before the KEY VALUE pairs, .* begin with SEED"),
        (["SEED", "1", "--num-gpus", "2"], "--num-gpus must come before the KEY VALUE pairs"),
        (["SEED", "--resume"], "--resume must come before the KEY VALUE pairs"),
        (["SEED=1"], "SEED=1: write SEED 1, without ="),
        (["SEED", "1", "VERSION"], "VERSION has no value"),
    ],
)
def test_bad_overrides_give_one_line(overrides, match):
    with pytest.raises(UserError, match=match):
        load_config("", overrides)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("[mine_train]", ("mine_train",)),
        ("[mine_train, 'other set']", ("mine_train", "other set")),
        ("['a,b']", ("a,b",)),
        ("('a',)", ("a",)),
        ("[]", ()),
    ],
)
def test_lists_of_texts_are_read_as_in_yaml(text, expected):
    cfg = load_config("", [*CPU, "DATASETS.TRAIN", text, "MODEL.WEIGHTS", "[a]", "SOLVER.STEPS", "[1, 2]"])
    assert expected == cfg.DATASETS.TRAIN
    assert cfg.MODEL.WEIGHTS == "[a]"  # no list
    assert cfg.SOLVER.STEPS == (1, 2)


def test_missing_file_is_named():
    with pytest.raises(UserError, match="config file not found: no/such.yaml"):
        load_config("no/such.yaml")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_says_what_to_set():
    with pytest.raises(UserError, match="MODEL.DEVICE cpu"):
        load_config("", ["MODEL.DEVICE", "cuda"])


@pytest.mark.parametrize("enabled, dtype", [(False, "bfloat16"), (True, "bfloat16"), (True, "float16")])
def test_amp_on_cuda(enabled, dtype, monkeypatch):
    # Which trainer is taken, decided without a GPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    opts = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", str(enabled), "MODEL.FOCAL.AMP.DTYPE", dtype]
    cfg = load_config("", opts)
    assert enabled == cfg.MODEL.FOCAL.AMP.ENABLED
    assert (enabled and dtype == "float16") == cfg.SOLVER.AMP.ENABLED  # only this one scales the loss


@pytest.fixture
def tf32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("value", [True, False])
def test_tf32_is_set(value, tmp_path, tf32):
    cfg = load_config("", [*CPU, "OUTPUT_DIR", str(tmp_path), "MODEL.FOCAL.TF32", str(value)])
    set_up_job(cfg, command_parser("train").parse_args([]))
    assert torch.backends.cudnn.allow_tf32 == value
    assert torch.backends.cuda.matmul.allow_tf32 == value


@pytest.mark.parametrize("device, chosen", [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_the_models_gpu_is_the_current_one(device, chosen, tmp_path, tf32, monkeypatch):
    made_current = []
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    cfg = load_config("", [*CPU, "OUTPUT_DIR", str(tmp_path)])
    cfg.defrost()
    cfg.MODEL.DEVICE = device
    set_up_job(cfg, command_parser("train").parse_args([]))
    assert made_current == chosen


@pytest.mark.parametrize(
    "yaml_text, override, expected",
    [
        ("on", [], "on"),  # YAML makes a boolean of it
        ("'off'", [], "off"),
        ("auto", [], "auto"),
        ("off", ["on"], "on"),
        ("on", ["off"], "off"),
        ("on", ["auto"], "auto"),
    ],
)
def test_kernels_may_be_on_or_off_in_yaml(tmp_path, yaml_text, override, expected):
    path = tmp_path / "config.yaml"
    path.write_text(f"MODEL: {{FOCAL: {{KERNELS: {yaml_text}}}}}")
    cfg = load_config(str(path), [*CPU, *[x for value in override for x in ("MODEL.FOCAL.KERNELS", value)]])
    assert expected == cfg.MODEL.FOCAL.KERNELS


def test_negative_values_are_no_options():
    assert load_config("", [*CPU, "SEED", "-1"]).SEED == -1


def test_a_users_folder_may_be_written_short(coco_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = coco_dataset()
    names = tmp_path / "names.txt"
    names.write_text("class0\nclass1\nclass2\n")
    entry = {**data.entry, "CLASSES": str(names)}
    entry = {key: x.replace(str(tmp_path), "~") for key, x in entry.items()}
    assert entry["IMAGES"] == "~/train/images"
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"DATASETS": {"FOCAL": [entry]}}))
    overrides = ["DATASETS.TRAIN", str([data.name]), "OUTPUT_DIR", "~/out", "MODEL.WEIGHTS", "~/a.pth"]
    cfg = load_config("~/a.yaml", [*CPU, *overrides, "MODEL.RETINANET.NUM_CLASSES", "auto"])
    assert (f"{tmp_path}/out", f"{tmp_path}/a.pth") == (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    check_files("DATASETS.TRAIN", data.name)


def test_a_failed_check_is_quoted():
    with (
        pytest.raises(UserError, match=r"res5_dilation cannot be 3. \(assert res5_dilation in \{1, 2\}\)$"),
        building("model"),
    ):
        build_model(make_resnet_cfg(MODEL__RESNETS__RES5_DILATION=3))
    with pytest.raises(UserError, match=r"AssertionError: foo \(assert sample_style in "), building("mapper"):
        ResizeShortestEdge((800,), sample_style="foo")
