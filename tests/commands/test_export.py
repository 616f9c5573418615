from __future__ import annotations

import sys

import pytest

from focal_d2.export import run
from tests.engine.runs import run_command
from tests.export.models import make_checkpoint

pytest.importorskip("onnxruntime")


@pytest.fixture
def export(coco_dataset, tmp_path, monkeypatch, capsys):
    """Run the command on a detector of two datasets; returns its status and what it printed."""
    train, val = coco_dataset("train", images=2), coco_dataset("val", images=2)
    cfg = make_checkpoint(tmp_path, DATASETS__TRAIN=(train.name,), DATASETS__TEST=(val.name,))
    cfg.DATASETS.VAL = (val.name,)
    cfg.DATASETS.FOCAL = [train.entry, val.entry]
    (tmp_path / "config.yaml").write_text(cfg.dump())

    def run_it(*arguments: object) -> tuple[int, list[str], str]:
        status = run_command(monkeypatch, "export", "--config-file", tmp_path / "config.yaml", *arguments)
        printed = capsys.readouterr()
        return status, printed.out.splitlines(), printed.err

    return run_it


def test_export_writes_the_files_and_prints_how_they_agree(export, tmp_path):
    status, lines, _ = export("--format", "onnx", "--format", "torchscript", "--output", tmp_path / "out")
    assert status == 0
    assert {x.name for x in (tmp_path / "out").iterdir()} == {"model.onnx", "model.ts", "run.py"}
    for name, line in zip(("model.onnx", "model.ts"), lines, strict=True):
        assert line.startswith(f"{tmp_path / 'out' / name}: ")
        assert "detections in 2 pictures" in line
        assert ": the same; score within" in line


def test_export_fails_if_a_file_detects_something_else(export, tmp_path, monkeypatch):
    load = run.load

    def load_wrong(*args, **kwargs) -> run.Detector:
        detector = load(*args, **kwargs)
        detector.metadata["image_format"] = "RGB"
        return detector

    monkeypatch.setattr(run, "load", load_wrong)
    status, (line,), _ = export()
    assert status == 1
    assert line.startswith(str(tmp_path / "export" / "model.onnx"))
    assert "DIFFERENT" in line


def test_int8_is_written_with_its_loss_and_refused_above_the_largest(export, tmp_path):
    path = tmp_path / "export" / "model_int8.onnx"
    status, (line,), _ = export("--format", "int8", "--max-loss", 100)
    assert status == 0
    assert "a loss of" in line
    assert "removed" not in line
    assert run.load(path).metadata["precision"] == "int8"
    status, (line,), _ = export("--format", "int8", "--max-loss", -100)
    assert status == 1
    assert "the file is removed (--max-loss allows more)" in line
    assert not path.exists()
    status, _, error = export("--format", "int8", "DATASETS.VAL", "()")
    assert status == 2
    assert error.splitlines()[-1].endswith("DATASETS.VAL is empty: the loss in AP of int8 is measured there")


def test_a_missing_package_is_one_line(export, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, error = export()
    assert status == 2
    assert "pip install 'focal_d2[export]'" in error.splitlines()[-1]
