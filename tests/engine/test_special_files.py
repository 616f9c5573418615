"""Pipes, devices, folders and sparse files where a program reads or writes a file: one line, at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from focal_d2.engine import load_config
from focal_d2.storage.checkpoint import FocalCheckpointer
from tests.engine.runs import run_command, run_main
from tests.special_files import SPECIAL, put

SOME = ("pipe", "endless device", "sparse file")  # tests/storage/test_files.py has all
pytestmark = pytest.mark.timeout(60)  # what waits for a pipe waits for ever


def said(capfd, status: int) -> str:
    """The last line on standard error."""
    assert status == 2
    err = capfd.readouterr().err
    assert "Traceback" not in err
    return err.splitlines()[-1]


def weights_of(config: Path, folder: Path) -> Path:
    model = build_model(load_config(str(config)))
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.mark.parametrize("kind", SPECIAL)
def test_config(job, monkeypatch, capfd, kind):
    config, _data = job
    base = config.with_name("base.yaml")
    says = put(base, kind)
    config.write_text(f"_BASE_: {base}")
    for given in (base, config):
        assert says in said(capfd, run_main(monkeypatch, "--config-file", given))
        assert says in said(capfd, run_command(monkeypatch, "doctor", "--config-file", given))
    if "system" not in kind:
        trusted = ["--config-file", base, "--trust-files"]
        assert says in said(capfd, run_main(monkeypatch, *trusted))


@pytest.mark.parametrize("kind", SOME)
def test_grid(job, tmp_path, monkeypatch, capfd, kind):
    says = put(tmp_path / "grid.yaml", kind)
    arguments = ["--config-file", job[0], "--grid", tmp_path / "grid.yaml", "--output", tmp_path / "study"]
    assert says in said(capfd, run_command(monkeypatch, "study", *arguments))


@pytest.mark.parametrize("kind", SOME)
def test_annotations(job, tmp_path, monkeypatch, capfd, kind):
    config, data = job
    says = put(data.annotations, kind)
    arguments = ["--config-file", config]
    assert says in said(capfd, run_main(monkeypatch, *arguments))
    assert says in said(capfd, run_command(monkeypatch, "anchors", *arguments))
    predict = [*arguments, "--dataset", data.name, "--output", tmp_path / "out"]
    assert says in said(capfd, run_command(monkeypatch, "predict", *predict))
    run_command(monkeypatch, "doctor", *arguments)
    out, err = capfd.readouterr()
    assert says in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "kind, backend", [("pipe", "pil"), ("endless device", "opencv"), ("sparse file", "opencv")]
)
def test_image(job_file, tmp_path, monkeypatch, capfd, kind, backend):
    config = job_file
    content = yaml.safe_load(config.read_text())
    (entry,) = content["DATASETS"]["FOCAL"]
    weights = weights_of(config, tmp_path)
    image = Path(entry["IMAGES"], "0.png")
    says = put(image, kind)
    arguments = ["--config-file", config, "INPUT.FOCAL.BACKEND", backend, "MODEL.WEIGHTS", weights]
    is_file = image.is_file()
    for mode in ([], ["--eval-only"]):
        line = said(capfd, run_main(monkeypatch, *mode, *arguments))
        assert (says if is_file else "images are missing; the first is") in line
    run_command(monkeypatch, "doctor", *arguments)
    out, err = capfd.readouterr()
    assert says in out
    assert "Traceback" not in err
    assert run_command(monkeypatch, "predict", image.parent, "--json", *arguments) == 1
    out, err = capfd.readouterr()
    assert says in err  # it is named, and the other images are done
    assert "Traceback" not in err
    assert sum('"boxes"' in line for line in out.splitlines()) == 5


@pytest.mark.parametrize("kind", SOME)
def test_weights(job_file, tmp_path, monkeypatch, capfd, kind):
    weights = tmp_path / "a.pth"
    says = put(weights, kind)
    arguments = ["--config-file", job_file, "MODEL.WEIGHTS", weights]
    (image,) = list(tmp_path.glob("train/images/0.png"))
    assert says in said(capfd, run_main(monkeypatch, *arguments))
    assert says in said(capfd, run_main(monkeypatch, "--eval-only", *arguments))
    predict = [image, "--json", *arguments]
    assert says in said(capfd, run_command(monkeypatch, "predict", *predict))
    (tmp_path / "nonfinite_0000001").mkdir()
    says = put(tmp_path / "nonfinite_0000001/step_rank0.pth", kind)
    assert says in said(capfd, run_command(monkeypatch, "replay", tmp_path / "nonfinite_0000001"))


@pytest.mark.parametrize("kind", SPECIAL)
def test_last_checkpoint_and_newest_checkpoint_are_passed_over(tmp_path, kind):
    model = torch.nn.Linear(2, 2)
    checkpointer = FocalCheckpointer(model, str(tmp_path), partial=False)
    for i in (1, 2):
        checkpointer.save(f"model_{i:07d}", iteration=i)
    put(tmp_path / "last_checkpoint", kind)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 2
    put(tmp_path / "model_0000002.pth", kind)
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1


@pytest.mark.parametrize("name", ["log.txt", "config.yaml", "metrics.json"])
def test_output_folder(job_file, tmp_path, monkeypatch, capfd, name):
    (tmp_path / "out").mkdir()
    for mode, kind in (([], "pipe"), (["--resume"], "socket"), (["--eval-only"], "endless device")):
        put(tmp_path / "out" / name, kind)
        line = said(capfd, run_main(monkeypatch, "--config-file", job_file, *mode))
        assert "remove it" in line
        assert f"out/{name} is " in line


def test_names_that_are_not_utf_8_are_refused_before_training(job_file, tmp_path, monkeypatch, capfd):
    """TensorBoard writes its file after the first iteration."""
    folder = tmp_path / os.fsdecode(b"f\xfcnf")
    line = said(capfd, run_main(monkeypatch, "--config-file", job_file, "OUTPUT_DIR", folder))
    assert line.endswith("f\\udcfcnf, which is not UTF-8: choose another folder, or set PYTHONUTF8=1")
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["pipe", "endless device", "folder"])
def test_page_anchors_and_pictures(job_file, tmp_path, monkeypatch, capfd, kind):
    says = put(tmp_path / "page", kind)
    arguments = ["--config-file", job_file]
    assert says in said(capfd, run_command(monkeypatch, "doctor", *arguments, "--html", tmp_path / "page"))
    output = ["--output", tmp_path / "page"]
    assert says in said(capfd, run_command(monkeypatch, "anchors", *arguments, *output))
    (tmp_path / "pictures/pictures").mkdir(parents=True)
    says = put(tmp_path / "pictures/pictures/0.png", kind)
    output = ["--output", tmp_path / "pictures", "MODEL.WEIGHTS", weights_of(job_file, tmp_path)]
    images = tmp_path / "train/images"
    assert says in said(capfd, run_command(monkeypatch, "predict", images, *arguments, *output))


def test_predictions(job_file, tmp_path, monkeypatch):
    """What is written in one step replaces what is there."""
    data = yaml.safe_load(job_file.read_text())["DATASETS"]["TEST"][0]
    folder = tmp_path / "out/inference" / data
    folder.mkdir(parents=True)
    for name in ("coco_instances_results.json", "analysis.json"):
        put(folder / name, "pipe")
    arguments = ["--config-file", job_file, "MODEL.WEIGHTS", weights_of(job_file, tmp_path)]
    assert run_main(monkeypatch, "--eval-only", *arguments) == 0
    assert isinstance(json.loads((folder / "coco_instances_results.json").read_text()), list)
    assert os.path.isfile(folder / "analysis.json")
