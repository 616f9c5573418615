"""`run.py`, which needs nothing of this package, against the model in Python."""

from __future__ import annotations

import ast
import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from focal_d2.data import opencv
from focal_d2.export import Exporter, run
from focal_d2.export.check import Limits, compare_detections
from tests.export.models import make_checkpoint, write_pictures

pytest.importorskip("onnxruntime")

# Runs run.py where these packages can't be imported.
WITHOUT = (
    "import sys, runpy\n"
    "sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'detectron2', 'focal_d2', 'PIL', 'onnx']))\n"
    "sys.argv = sys.argv[1:]\n"
    "runpy.run_path(sys.argv[0], run_name='__main__')"
)
SIZES = [(96, 128), (150, 203), (96, 128), (260, 120)]
LIMITS = Limits(0.05, 100)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An exporter of a model that resizes and enlarges, its folder, and pictures of three sizes."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    exporter = Exporter(make_checkpoint(folder, INPUT__MIN_SIZE_TEST=128), folder / "out", threshold=0.0)
    exporter.write("onnx")
    return exporter, write_pictures(folder / "pictures", SIZES)


def run_py(exporter, *arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, exporter.folder / "run.py", *arguments, "--threads", "1"]
    return subprocess.run([str(x) for x in command], capture_output=True, text=True, check=False)


def test_run_py_without_torch_detects_what_the_predictor_does(exported, tmp_path):
    exporter, pictures = exported
    outputs = [
        "--batch",
        3,
        "--json",
        tmp_path / "x.json",
        "--csv",
        tmp_path / "x.csv",
        "--draw",
        tmp_path / "drawn",
    ]
    result = run_py(exporter, pictures[0].parent, *outputs)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    records = json.loads((tmp_path / "x.json").read_text())
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    names = exporter.predictor.class_names
    assert [record["image"] for record in records] == [str(path) for path in pictures]
    for path, size, record in zip(pictures, SIZES, records, strict=True):
        classes = np.array([names.index(x) for x in record["labels"]])
        boxes, scores = (np.array(record[key], np.float32) for key in ("boxes", "scores"))
        agreement = compare_detections(exporter.detect(path), run.Detections(boxes, scores, classes), LIMITS)
        assert agreement.agrees
        assert not agreement.at_limit
        assert agreement.detections >= 20
        assert (record["height"], record["width"]) == size
        of_file = [row for row in rows if row["image"] == str(path)]
        assert [float(row["score"]) for row in of_file] == pytest.approx(scores)
        assert [float(row["ymax"]) for row in of_file] == pytest.approx(boxes[:, 3])
        assert [row["label"] for row in of_file] == record["labels"]
        drawn = cv2.imread(str(tmp_path / "drawn" / f"{path.name}.png"))
        assert drawn.shape[:2] == size
        assert (drawn != cv2.imread(str(path))).any()


def test_run_py_skips_what_it_cannot_read_and_says_so(exported, tmp_path):
    exporter, pictures = exported
    for name, content in (("empty.png", b""), ("text.jpg", b"no image")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "whole.png").write_bytes(pictures[0].read_bytes())
    result = run_py(exporter, tmp_path)
    assert result.returncode == 1
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        str(tmp_path / name) for name in ("empty.png", "text.jpg")
    ]
    head, *rows = csv.reader(result.stdout.splitlines())
    assert tuple(head) == run.COLUMNS
    assert {row[0] for row in rows} == {str(tmp_path / "whole.png")}


def test_run_py_imports_numpy_opencv_and_onnxruntime_only():
    tree = ast.parse(Path(run.__file__).read_text(encoding="utf-8"))
    imported = {x.name for node in ast.walk(tree) if isinstance(node, ast.Import) for x in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {x.split(".")[0] for x in imported} - sys.stdlib_module_names == {"numpy", "cv2", "onnxruntime"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((300, 200), (225, 150)),
        ((90, 160), (225, 400)),
        ((37, 1000), (5, 133)),
        ((1, 300), (1, 133)),
        ((60, 40), (59, 39)),
        ((129, 175), (13, 17)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_resize_gives_the_integers_of_pillow_and_pytorch(old, new, channels):
    image = np.random.default_rng(0).integers(0, 256, (*old, channels), dtype=np.uint8)
    pillow = Image.fromarray(image if channels == 3 else image[..., 0])
    expected = np.asarray(pillow.resize(new[::-1], Image.Resampling.BILINEAR)).reshape(*new, channels)
    np.testing.assert_array_equal(run.resize(image, *new, bits=None), expected)
    if channels == 3 and new < old:
        np.testing.assert_array_equal(run.resize(image, *new, bits=15), opencv.resize(image, *new))
