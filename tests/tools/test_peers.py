"""What the scripts that train other detectors share: their data, schedule and detections."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

import pytest
import torch

from tests.conftest import REPOSITORY


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tools/peers")
    yield lambda name: importlib.import_module(name)
    for name in ("common", "ultralytics_yolo"):
        sys.modules.pop(name, None)


@pytest.fixture
def args(tmp_path):
    """An image of 40 × 20 pixels with a box, in each split."""
    image = {"id": 3, "file_name": "a.png", "width": 40, "height": 20}
    content = {"images": [image], "annotations": [{"image_id": 3, "category_id": 1, "bbox": [4, 5, 8, 10]}]}
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "out").mkdir()
    return argparse.Namespace(data=tmp_path, output=tmp_path / "out", splits=["val"], batch=None)


def test_detections_are_written_as_coco_has_them(scripts, args):
    scripts("common").write_detections(args, lambda path: [([4.0, 5.0, 12.0, 15.0], 0.5)])
    assert json.loads((args.output / "val.json").read_text()) == [
        {"image_id": 3, "category_id": 1, "bbox": [4.0, 5.0, 8.0, 10.0], "score": 0.5}
    ]


def test_ultralytics_reads_boxes_as_shares(scripts, args):
    assert scripts("ultralytics_yolo").write_data(args) == args.output / "data/data.yaml"
    label = args.output / "data/labels/train/a.txt"
    assert label.read_text() == "0 0.20000000 0.50000000 0.20000000 0.50000000"


def test_training_ends_by_the_clock(scripts, args, monkeypatch):
    common = scripts("common")
    args.minutes, args.rate, args.bfloat16 = 1, 0.1, False
    seconds = iter(range(0, 200, 10))
    monkeypatch.setattr(common.time, "monotonic", lambda: next(seconds))
    model, batches = torch.nn.Linear(1, 1), iter([torch.ones(1, 1)] * 10)
    before = model.weight.item()
    common.train(args, model, batches, lambda batch: {"loss": model(batch).square().sum()})
    assert len(list(batches)) == 10 - 5  # the start is at 0 seconds, the iterations at 10, 20, …, 50
    assert model.weight.item() != before
