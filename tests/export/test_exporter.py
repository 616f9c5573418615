from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from focal_d2 import UserError
from focal_d2.data import register_datasets
from focal_d2.evaluation.operating_point import OperatingPoint
from focal_d2.export import Exporter, choose_pictures, run, training_pictures
from tests.export.models import make_checkpoint, write_pictures

pytest.importorskip("onnxruntime")
SIZES = [(96, 128), (192, 256), (150, 203)]


def candidates(model, path, threshold: float) -> int:
    """The number of candidates for NMS in a picture, all levels together."""
    picture = torch.from_numpy(cv2.imread(str(path)).transpose(2, 0, 1).copy())
    with torch.no_grad():
        _, (logits, _) = model.network(model.preprocess_image([{"image": picture}]))
    return sum(int((model.cls_loss.probabilities(x) > threshold).sum()) for x in logits)


@pytest.mark.parametrize("number", [1, 50, 2000])
@pytest.mark.parametrize("format_name", ["onnx", "torchscript"])
def test_one_picture_with_so_many_candidates_is_detected_the_same(tmp_path, number, format_name):
    (picture,) = write_pictures(tmp_path / "pictures", SIZES[1:2])
    overrides = {"MODEL__RETINANET__TOPK_CANDIDATES_TEST": 2000}
    exporter = Exporter(make_checkpoint(tmp_path, **overrides), tmp_path)
    model = exporter.predictor.model
    low, high = 0.0, 1.0
    while candidates(model, picture, threshold := (low + high) / 2) != number:
        low, high = (threshold, high) if candidates(model, picture, threshold) > number else (low, threshold)
    exporter.cfg.MODEL.RETINANET.SCORE_THRESH_TEST = model.test_score_thresh = threshold
    agreement = exporter.compare(exporter.write(format_name), [picture])
    assert agreement.agrees
    assert not agreement.at_limit
    assert agreement.detections >= min(number, 20)


@pytest.mark.parametrize(
    "overrides",
    [
        {"INPUT__FORMAT": "RGB", "INPUT__FOCAL__BACKEND": "opencv", "INPUT__MIN_SIZE_TEST": 80},
        {
            "INPUT__FORMAT": "L",
            "MODEL__PIXEL_MEAN": [110.0],
            "MODEL__PIXEL_STD": [1.0],
            "INPUT__MIN_SIZE_TEST": 80,
        },
        {"MODEL__FOCAL__CHANNELS_LAST": True, "INPUT__MIN_SIZE_TEST": 200, "INPUT__MAX_SIZE_TEST": 240},
        {"MODEL__FOCAL__LOSS__NAME": "softmax_focal", "MODEL__RETINANET__NUM_CLASSES": 7},
        {"MODEL__RETINANET__NUM_CLASSES": 1, "MODEL__FOCAL__AMP__ENABLED": True},
        {"MODEL__RETINANET__TOPK_CANDIDATES_TEST": 3, "MODEL__RETINANET__NUM_CLASSES": 80},
    ],
    ids=str,
)
def test_files_detect_the_same_with_every_setting(tmp_path, overrides):
    pictures = write_pictures(tmp_path / "pictures", SIZES)
    exporter = Exporter(make_checkpoint(tmp_path, **overrides), tmp_path)
    agreement = exporter.compare(exporter.write("onnx"), pictures)
    assert agreement.agrees, agreement
    assert agreement.fewest >= 10


def test_detections_of_an_image_do_not_depend_on_its_batch(tmp_path):
    exporter = Exporter(make_checkpoint(tmp_path), tmp_path)
    images = [run.read_image(x) for x in write_pictures(tmp_path / "pictures", SIZES[:1] * 3 + SIZES[1:2])]
    for format_name in ("onnx", "torchscript"):
        detect = exporter.load(exporter.write(format_name))
        for single, batched in zip((detect([x])[0] for x in images), detect(images), strict=True):
            assert len(single.scores) >= 20
            for one, other in zip(single, batched, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-3)


def test_metadata_say_what_run_py_needs(tmp_path):
    cfg = make_checkpoint(tmp_path, INPUT__MIN_SIZE_TEST=80, INPUT__MAX_SIZE_TEST=100)
    exporter = Exporter(cfg, tmp_path)
    expected = {
        "format": 1,
        "classes": ["0", "1", "2"],
        "threshold": 0.3,
        "image_format": "BGR",
        "min_size": 80,
        "max_size": 100,
        "resize": "pillow",
        "least_score": 0.05,
        "most_detections": 100,
        "precision": "float32",
    }
    assert run.load(exporter.write("onnx")).metadata == expected
    assert exporter.load(exporter.write("torchscript")).metadata == expected
    assert (tmp_path / "run.py").read_bytes() == Path(run.__file__).read_bytes()


def test_threshold_is_the_option_s_or_the_operating_point_s(tmp_path):
    cfg = make_checkpoint(tmp_path)
    point = OperatingPoint(0.125, 0.8, 0.4, 0.53, "best F1", "mine_val", True)
    content = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)
    torch.save({**content, "operating_point": point._asdict()}, cfg.MODEL.WEIGHTS)
    assert Exporter(cfg, tmp_path).metadata("float32")["threshold"] == 0.125
    assert Exporter(cfg, tmp_path, threshold=0.7).metadata("float32")["threshold"] == 0.7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL__META_ARCHITECTURE": "RetinaNet"}, "MODEL.META_ARCHITECTURE is RetinaNet"),
        ({"INPUT__FORMAT": "HSV"}, "INPUT.FORMAT is HSV; focal-d2 export takes BGR, RGB, L"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        Exporter(make_checkpoint(tmp_path, **overrides), tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    exporter = Exporter(make_checkpoint(tmp_path), tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package} \(.*pip install 'focal_d2\[export\]'"):
        exporter.write("onnx")


def test_pictures_are_those_of_validation_then_training_and_never_of_test(coco_dataset, tmp_path):
    datasets = [coco_dataset(name, images=number) for name, number in (("train", 5), ("val", 3))]
    register_datasets([x.entry for x in datasets])
    train, val = (x.name for x in datasets)
    cfg = make_checkpoint(tmp_path, DATASETS__TRAIN=(), DATASETS__TEST=(val,))

    def folders(paths) -> set[str]:
        return {x.parent.parent.name for x in paths}

    with pytest.raises(UserError, match="DATASETS.VAL and DATASETS.TRAIN are empty"):
        choose_pictures(cfg, 2, None)
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        training_pictures(cfg, 2)
    cfg.DATASETS.TRAIN = (train,)
    chosen = choose_pictures(cfg, 2, None)
    assert [x.name for x in chosen] == ["0.png", "4.png"]
    assert folders(chosen) == {"train"}
    cfg.DATASETS.VAL = (val,)
    chosen = choose_pictures(cfg, 9, None)
    assert len(chosen) == 3
    assert folders(chosen) == {"val"}
    assert folders(training_pictures(cfg, 9)) == {"train"}
    assert choose_pictures(cfg, 1, tmp_path / "val" / "images") == [tmp_path / "val" / "images" / "0.png"]
