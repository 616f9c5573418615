from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.engine.trainer import FocalTrainer
from focal_d2.inference.views import use_views
from tests.conftest import make_cfg


def make_model(**overrides):
    cfg = make_cfg(MODEL__RETINANET__SCORE_THRESH_TEST=0.01, TEST__AUG__ENABLED=True, **overrides)
    model = build_model(cfg).eval()
    use_views(cfg, model)
    return cfg, model


def make_sample(height=96, width=64):
    return {"image": torch.randint(256, (3, height, width), dtype=torch.uint8)}


@torch.no_grad()
def detect(model, sample):
    return model([sample])[0]["instances"]


def assert_same(a, b, atol=1e-3):
    assert len(a) == len(b) > 5
    torch.testing.assert_close(a.scores, b.scores)
    torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, atol=atol, rtol=1e-5)
    assert torch.equal(a.pred_classes, b.pred_classes)


def test_a_single_plain_view_is_what_the_model_detects():
    _, model = make_model(TEST__AUG__MIN_SIZES=(0,), TEST__AUG__FLIP=False)
    sample = make_sample() | {"height": 192, "width": 128}
    augmented = detect(model, sample)
    model.views = None
    assert_same(augmented, detect(model, sample))
    assert augmented.image_size == (192, 128)


def unturned(boxes, turns, height, width):
    """Boxes of an image that was turned counter-clockwise `turns` times, in the image (height, width)."""
    sizes = [(height, width) if k % 2 == 0 else (width, height) for k in range(turns)]
    for _, w in reversed(sizes):
        # Turning counter-clockwise moves (x, y) to (y, w - x).
        x0, y0, x1, y1 = boxes.unbind(1)
        boxes = torch.stack([w - y1, x0, w - y0, x1], dim=1)
    return boxes


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_views_are_those_made_by_hand(backend):
    _cfg, model = make_model(
        TEST__AUG__MIN_SIZES=(64, 96), TEST__FOCAL__AUG_TURNS=True, INPUT__FOCAL__BACKEND=backend
    )
    sample = make_sample()
    augmented = detect(model, sample)
    image = sample["image"].permute(1, 2, 0).numpy()
    views, parts = model.views, []
    model.views = None
    reader = views.reader
    for scale in (1.0, 1.5):
        resized = image
        if scale != 1.0 and backend == "opencv":
            resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
        elif scale != 1.0:
            resized = np.array(Image.fromarray(image).resize((96, 144), Image.Resampling.BILINEAR))
        for turns in range(4):
            for mirrored in (False, True):
                turned = np.rot90(resized, turns)
                _height, width = turned.shape[:2]
                view = turned[:, ::-1] if mirrored else turned
                images = model.preprocess_image([{"image": reader.to_tensor(np.ascontiguousarray(view))}])
                with torch.no_grad():
                    (found,) = model.candidates(images, *model.network(images))
                boxes = found.pred_boxes.tensor
                if mirrored:
                    boxes = torch.stack(
                        [width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1
                    )
                boxes = unturned(boxes, turns, *resized.shape[:2]) / scale
                parts.append(
                    Instances(
                        (96, 64),
                        pred_boxes=Boxes(boxes),
                        scores=found.scores,
                        pred_classes=found.pred_classes,
                    )
                )
    assert len(parts) == 16
    expected = model.suppress(Instances.cat(parts))
    expected.pred_boxes.clip((96, 64))
    expected = expected[expected.pred_boxes.nonempty()]
    assert_same(augmented, expected)


def test_an_image_that_was_resized_is_read_again(coco_dataset):
    data = coco_dataset(images=1, size=96)
    register_datasets([data.entry])
    cfg, model = make_model(
        DATASETS__TEST=(data.name,), TEST__AUG__MIN_SIZES=(0,), TEST__AUG__FLIP=False, INPUT__MIN_SIZE_TEST=32
    )
    record = {"file_name": str(data.images / "0.png"), "height": 96, "width": 96, "image_id": 0}
    small = FocalDatasetMapper(cfg, is_train=False)(record)
    assert small["image"].shape == (3, 32, 32)
    cfg.INPUT.MIN_SIZE_TEST = 0
    whole = FocalDatasetMapper(cfg, is_train=False)(record)
    assert_same(detect(model, small), detect(model, whole), atol=0)


def test_evaluation_uses_the_views(coco_dataset, tmp_path):
    data = coco_dataset(images=2, size=96)
    register_datasets([data.entry])
    cfg = make_cfg(
        DATASETS__TEST=(data.name,), OUTPUT_DIR=str(tmp_path), MODEL__RETINANET__SCORE_THRESH_TEST=0.01
    )
    model = build_model(cfg).eval()
    seen = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    plain = FocalTrainer.test(cfg, model)["bbox"]
    assert seen == [(96, 96)] * 2
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.FLIP = True, (64, 128), True
    seen.clear()
    FocalTrainer.test(cfg, model)
    assert seen == [(64, 64), (64, 64), (128, 128), (128, 128)] * 2
    cfg.TEST.AUG.ENABLED = False
    assert FocalTrainer.test(cfg, model)["bbox"] == pytest.approx(plain, nan_ok=True)
    assert model.views is None


def test_each_view_keeps_a_limited_number_of_candidates():
    _cfg, model = make_model(
        TEST__AUG__MIN_SIZES=(64, 96),
        MODEL__RETINANET__TOPK_CANDIDATES_TEST=7,
        TEST__DETECTIONS_PER_IMAGE=10000,
    )
    lengths = []
    suppress = model.suppress
    model.suppress = lambda candidates: (lengths.append(len(candidates)), suppress(candidates))[1]
    detect(model, make_sample())
    assert 0 < lengths[0] <= 4 * 5 * 7  # views, levels, candidates of each


def test_other_models_stay_as_they_are():
    cfg = make_cfg(MODEL__META_ARCHITECTURE="RetinaNet", TEST__AUG__ENABLED=True)
    model = build_model(cfg)
    use_views(cfg, model)
    assert not hasattr(model, "views")
