"""`--import`: parts of a user's own in every command and in every process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog
from detectron2.modeling import BACKBONE_REGISTRY

from focal_d2 import UserError
from focal_d2.commands.cli import command_parser
from focal_d2.engine import load_config
from focal_d2.engine.user_modules import import_modules
from focal_d2.modeling.losses import LOSSES
from tests.engine.runs import run_command

# A loss, a backbone and a dataset; each process that imports it leaves a file.
MODULE = """
import os, pathlib
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.modeling import BACKBONE_REGISTRY
import focal_d2
from focal_d2.modeling.losses import ClassificationLoss, register_loss

@register_loss("scaled")
class Scaled(ClassificationLoss):
    def __init__(self, *, num_classes, margin=1.0):
        super().__init__(num_classes=num_classes)
        self.margin = margin
    def forward(self, batch):
        return self.margin * sum(x.square().mean() for x, _ in batch.levels())

@BACKBONE_REGISTRY.register()
def my_backbone(cfg, shape):
    return focal_d2.build_focal_resnet_fpn_backbone(cfg, shape)

DatasetCatalog.register("mine", lambda: load_coco_json("ANNOTATIONS", "IMAGES", "mine"))
MetadataCatalog.get("mine").set(json_file="ANNOTATIONS", image_root="IMAGES", evaluator_type="coco",
    thing_classes=["class0", "class1", "class2"])
pathlib.Path("FOLDER", f"imported_{os.getpid()}").touch()
"""
NAMES = [
    "MODEL.FOCAL.LOSS.NAME", "scaled", "MODEL.FOCAL.LOSS.MARGIN", "2.5", "MODEL.BACKBONE.NAME", "my_backbone",
    "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "()",
]  # fmt: skip


@pytest.fixture
def module(job, tmp_path, monkeypatch):
    """Write the module into the working folder; returns its name. Afterwards, its parts are forgotten."""
    _, data = job
    text = MODULE.replace("ANNOTATIONS", str(data.annotations)).replace("IMAGES", str(data.images))
    (tmp_path / "my_parts.py").write_text(text.replace("FOLDER", str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    yield "my_parts"
    sys.modules.pop("my_parts", None)
    LOSSES.pop("scaled", None)
    BACKBONE_REGISTRY._obj_map.pop("my_backbone", None)


def run_focal_d2(*arguments: object, folder) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "focal_d2", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_every_command_with_a_config_has_the_flag():
    for name in ("train", "eval", "predict", "doctor", "anchors", "study", "replay"):
        assert "--import" in command_parser(name).format_help()


def test_a_module_is_used_and_nothing_of_it_is_stored(job, module, tmp_path, monkeypatch):
    config, _ = job
    arguments = ["--config-file", config, "--import", module, *NAMES, "SOLVER.MAX_ITER", 1]
    assert run_command(monkeypatch, "train", *arguments, "DATALOADER.NUM_WORKERS", 1) == 0
    trained = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert trained["MODEL"]["FOCAL"]["LOSS"]["MARGIN"] == 2.5
    assert module not in (tmp_path / "out/config.yaml").read_text()
    assert module.encode() not in (tmp_path / "out/model_final.pth").read_bytes()
    # The written config is one that the same flag reads again.
    assert load_config(str(tmp_path / "out/config.yaml")).MODEL.FOCAL.LOSS.MARGIN == 2.5


def test_doctor_and_anchors_know_the_dataset(job, module, monkeypatch, capsys):
    config, _ = job
    given = ["--config-file", config, "--import", module]
    assert run_command(monkeypatch, "doctor", *given, "--json", *NAMES) in (0, 1)
    report = json.loads(capsys.readouterr().out)
    assert "mine" in json.dumps(report)
    assert "mine" in DatasetCatalog.list()


@pytest.mark.slow
def test_every_process_imports_it(job, module, tmp_path):
    config, _ = job
    if (os.cpu_count() or 1) < 2 or torch.cuda.device_count() == 1:
        pytest.skip("two processes need two cores, or two GPUs")
    arguments = ["--config-file", config, "--import", module, "--num-gpus", 2, *NAMES]
    done = run_focal_d2("train", *arguments, "SOLVER.MAX_ITER", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list(tmp_path.glob("imported_*"))) == 3  # the launcher, and two ranks


@pytest.mark.slow
def test_the_runs_of_a_study_import_it(job, module, tmp_path):
    config, _ = job
    grid = tmp_path / "grid.yaml"
    cells = [{"NAME": "m {MARGIN}", "SWEEP": {"MODEL.FOCAL.LOSS.MARGIN": [2.0]}}]
    grid.write_text(yaml.safe_dump({"SEEDS": [0], "CELLS": cells}))
    given = ["--config-file", config, "--import", module, "--grid", grid, "--output", tmp_path / "study"]
    names = [x for x in NAMES if x not in ("MODEL.FOCAL.LOSS.MARGIN", "2.5")]
    done = run_focal_d2("study", *given, "--json", *names, "SOLVER.MAX_ITER", 1, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [x["status"] for x in json.loads(done.stdout)] == ["finished"]
    assert len(list(tmp_path.glob("imported_*"))) == 2


@pytest.mark.parametrize(
    "name, expected",
    [
        ("nowhere", "--import nowhere: no module nowhere in "),
        ("json.nowhere", "--import json.nowhere: no module json.nowhere in "),
        ("my_parts.py", "--import my_parts.py: it must be the name of a module, such as my_losses"),
        ("../x", "it must be the name of a module"),
        ("", "it must be the name of a module"),
    ],
)
def test_a_module_that_is_not_there_is_one_line(name, expected, monkeypatch, capsys):
    assert run_command(monkeypatch, "train", f"--import={name}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_a_fault_inside_the_module_is_passed_on(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text("import surely_not_here")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModuleNotFoundError, match="surely_not_here"):
        import_modules(["faulty"])


def test_parameters_of_a_registered_loss_are_overrides(module, job):
    config, _ = job
    import_modules([module])
    cfg = load_config(str(config), ["MODEL.FOCAL.LOSS.NAME", "scaled", "MODEL.FOCAL.LOSS.MARGIN", "3.0"])
    assert cfg.MODEL.FOCAL.LOSS.MARGIN == 3.0
    with pytest.raises(UserError, match=r"LOSS.MARGN; did you mean MODEL.FOCAL.LOSS.MARGIN\?"):
        load_config(str(config), ["MODEL.FOCAL.LOSS.MARGN", "3.0"])
    assert "MARGIN" not in load_config(str(config)).MODEL.FOCAL.LOSS


def test_parameters_of_no_registered_loss_are_unknown_keys(job):
    with pytest.raises(UserError, match=r"command line: unknown key MODEL.FOCAL.LOSS.MARGIN"):
        load_config(str(job[0]), ["MODEL.FOCAL.LOSS.MARGIN", "3.0"])
