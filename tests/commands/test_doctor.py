from __future__ import annotations

import html
import json
import re

import pytest
import yaml
from PIL import Image

from focal_d2.data.checks.kinds import KINDS
from focal_d2.engine import load_config
from tests.conftest import REPOSITORY
from tests.engine.runs import run_command


def run(monkeypatch, capsys, *argv):
    return run_command(monkeypatch, "doctor", *argv), *capsys.readouterr()


@pytest.fixture
def well(job, coco_dataset):
    """The job, with a test set of its own; returns its config file and the dataset to train on."""
    path, data = job
    test = coco_dataset("test", images=7)
    for picture in test.images.iterdir():  # the same noise as the training set's
        Image.open(picture).rotate(180).save(picture)
    config = yaml.safe_load(path.read_text())
    config["DATASETS"] |= {"FOCAL": [data.entry, test.entry], "TEST": [test.name]}
    config["DATASETS"]["FOCAL"][0]["NAME"] = data.name
    path.write_text(yaml.safe_dump(config))
    content = json.loads(data.annotations.read_text())
    for box in content["annotations"][:12]:  # ten boxes a class are not few
        content["annotations"].append({**box, "id": 100 + box["id"], "bbox": [20, 20 + box["id"], 24, 24]})
    data.annotations.write_text(json.dumps(content))
    return path, data


def test_a_good_job_has_no_fault(well, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--config-file", well[0])
    assert out.startswith("0 errors, 0 warnings\n")
    assert code == 0
    code, out, _ = run(monkeypatch, capsys, "--config-file", well[0], "--fix-list")
    assert (code, out) == (0, "\n")


def test_errors_of_a_file_and_of_the_config_are_listed(well, monkeypatch, capsys):
    path, data = well
    content = json.loads(data.annotations.read_text())
    content["annotations"][3]["bbox"][2] = -5
    content["annotations"][4]["bbox"] = [300, 300, 20, 20]
    data.annotations.write_text(json.dumps(content))
    (data.images / "2.png").write_bytes(b"")
    wrong = ["SOLVER.FOCAL.OPTIMIZER", "SGD", "MODEL.RETINANET.NUM_CLASSES", "80"]
    code, out, err = run(monkeypatch, capsys, "--config-file", path, "--json", *wrong)
    assert (code, err) == (1, "")
    result = json.loads(out)
    found = {finding["code"]: finding for finding in result["findings"]}
    assert {"item-unreadable", "box-outside", "image-unreadable", "class-count"} <= set(found)
    assert result["errors"] == 4
    assert "annotations[3]" in found["item-unreadable"]["examples"][0]["text"]
    assert "learning-rate" not in found  # 0.001 is within 2 times 0.01 · 2 / 16


def test_lines_to_add_mend_the_config(well, monkeypatch, capsys, tmp_path):
    path, _ = well
    wrong = ["MODEL.RETINANET.NUM_CLASSES", "80", "SOLVER.FOCAL.OPTIMIZER", "SGD", "SOLVER.BASE_LR", "0.1"]
    code, out, _ = run(monkeypatch, capsys, "--config-file", path, "--fix-list", *wrong)
    assert code == 1
    fixes = yaml.safe_load(out)
    assert fixes.pop("_BASE_") == str(path)
    assert fixes == {"MODEL": {"RETINANET": {"NUM_CLASSES": 3}}, "SOLVER": {"BASE_LR": 0.00125}}
    assert "# linear rule: 0.01 · 2 / 16 images\n  BASE_LR: 0.00125\n" in out
    broken, mended = tmp_path / "broken.yaml", tmp_path / "mended.yaml"
    cfg = load_config(str(path), wrong)
    broken.write_text(cfg.dump())
    code, out, _ = run(monkeypatch, capsys, "--config-file", broken, "--fix-list")
    assert code == 1
    mended.write_text(out)
    code, out, _ = run(monkeypatch, capsys, "--config-file", mended)
    assert out.startswith("0 errors, 0 warnings\n")


def test_page_is_one_file_that_shows_the_worst(well, monkeypatch, capsys, tmp_path):
    path, data = well
    content = json.loads(data.annotations.read_text())
    content["annotations"][4]["bbox"] = [300, 300, 20, 20]
    content["images"][0]["file_name"] = "<script>.png"
    data.annotations.write_text(json.dumps(content))
    page = tmp_path / "page.html"
    code, _, _ = run(monkeypatch, capsys, "--config-file", path, "--html", page)
    assert code == 1
    text = page.read_text()
    assert "box-outside" in text
    assert "data:image/jpeg;base64," in text
    assert text.count("data:image/png;base64,") == 4
    assert "<script>" not in text
    assert html.escape("<script>.png") in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)

    run(monkeypatch, capsys, "--config-file", path, "--html", page, "--no-images")
    assert "data:image/jpeg" not in page.read_text()


def test_mistakes_are_one_line(well, monkeypatch, capsys, tmp_path):
    path, _ = well

    def mistake(*argv):
        code, out, err = run(monkeypatch, capsys, "--config-file", path, *argv)
        assert (code, out) == (2, "")
        assert len(err.splitlines()) == 1
        return err

    assert "cannot build the model" in mistake("MODEL.FPN.NORM", "XYZ")
    assert "page.html can't be written" in mistake("--html", tmp_path / "nowhere" / "page.html")
    assert "job.yaml is the config itself" in mistake("--html", path)
    assert "DATASETS.TRAIN is empty" in mistake("DATASETS.TRAIN", "()")
    assert "SOLVER.IMS_PER_BATCH is 0" in mistake("SOLVER.IMS_PER_BATCH", 0)
    assert "SCALE_JITTER" in mistake("INPUT.FOCAL.SCALE_JITTER", "[0.1, 2.0]")
    assert "TEST.FOCAL.EVAL_BACKEND" in mistake("TEST.FOCAL.EVAL_BACKEND", "coco")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("focal_d2.analysis.doctor.examination.decode_all", stop)
    assert run(monkeypatch, capsys, "--config-file", path) == (130, "", "focal-d2 doctor: stopped\n")


def test_a_file_that_cannot_be_read_stops_nothing(well, monkeypatch, capsys):
    path, data = well
    data.annotations.write_text("{")
    code, out, _ = run(monkeypatch, capsys, "--config-file", path, "MODEL.RETINANET.NUM_CLASSES", "auto")
    assert code == 1
    assert "dataset-unreadable" in out
    assert "squares_test  test" in out


def test_a_device_that_is_not_here_does_not_matter(well, monkeypatch, capsys):
    path, _ = well
    config = yaml.safe_load(path.read_text())
    config["MODEL"]["DEVICE"] = "cuda"
    path.write_text(yaml.safe_dump(config))
    assert run(monkeypatch, capsys, "--config-file", path)[0] == 0


def test_documentation_lists_every_code():
    documented = re.findall(r"^\| `([a-z-]+)` \| (\w+) \|", (REPOSITORY / "docs/doctor.md").read_text(), re.M)
    assert documented == [(code, kind.severity) for code, kind in KINDS.items()]
