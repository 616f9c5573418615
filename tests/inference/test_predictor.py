from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from focal_d2 import Detections, Predictor, UserError
from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.data.pixels import FORMATS
from focal_d2.evaluation.operating_point import OperatingPoint
from focal_d2.model_card import card_of
from tests.conftest import make_cfg


@pytest.fixture
def cfg_and_image(coco_dataset, tmp_path):
    data = coco_dataset(images=1, size=96)
    register_datasets([data.entry])
    cfg = make_cfg(
        DATASETS__TEST=(data.name,),
        MODEL__WEIGHTS=str(tmp_path / "model.pth"),
        MODEL__RETINANET__SCORE_THRESH_TEST=0.01,
        INPUT__MIN_SIZE_TEST=128,
    )
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    return cfg, data.images / "0.png"


def assert_same(actual: Detections, expected: Detections, rtol: float = 0) -> None:
    np.testing.assert_allclose(actual.boxes, expected.boxes, rtol=rtol, atol=1e-3 if rtol else 0)
    np.testing.assert_allclose(actual.scores, expected.scores, rtol=rtol)
    np.testing.assert_array_equal(actual.classes, expected.classes)


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
def test_predictor_finds_what_detectron2s_finds(cfg_and_image, image_format):
    cfg, path = cfg_and_image
    cfg.INPUT.FORMAT = image_format
    predictor = Predictor(cfg)
    found = predictor(path)
    expected = DefaultPredictor(cfg)(read_image(str(path), "BGR"))["instances"]
    assert isinstance(found, Detections)
    assert len(found.boxes) > 5
    np.testing.assert_allclose(found.boxes, expected.pred_boxes.tensor.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found.scores, expected.scores.numpy(), rtol=1e-5)
    np.testing.assert_array_equal(found.classes, expected.pred_classes.numpy())
    assert found.boxes.max() <= 96  # in the image's own pixels


def test_predictor_takes_pixels_too(cfg_and_image):
    cfg, path = cfg_and_image
    predictor = Predictor(cfg)
    pixels = read_image(str(path), "BGR")
    for image in (str(path), pixels, Image.fromarray(pixels[:, :, ::-1])):
        assert_same(predictor(image), predictor(path))


def test_predictor_takes_lists_and_gives_each_image_what_it_gets_alone(cfg_and_image):
    cfg, path = cfg_and_image
    predictor = Predictor(cfg, batch_size=3)
    seen: list[int] = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    rng = np.random.default_rng(0)
    sizes = [(96, 96), (96, 96), (64, 96), (96, 96), (96, 96)]
    images = [path, *(rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes)]
    results = predictor(images)
    assert seen == [3, 1, 2]  # images of one size, of three that follow each other
    assert [x.source for x in results] == images
    for image, result in zip(images, results, strict=True):
        assert_same(result, predictor(image), rtol=1e-4)
    assert (results[3].height, results[3].width) == (64, 96)
    assert predictor([]) == []


def test_predictor_reads_no_further_than_it_must(cfg_and_image):
    cfg, path = cfg_and_image
    taken: list[int] = []

    def images():
        for i in range(100):
            taken.append(i)
            yield path

    next(Predictor(cfg, batch_size=2).stream(images()))
    assert len(taken) < 10


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK", "I;16"])
def test_predictor_takes_pillow_images_as_it_reads_their_files(cfg_and_image, tmp_path, mode):
    cfg, path = cfg_and_image
    if mode == "I;16":
        image = Image.fromarray(np.arange(96 * 96, dtype=np.uint16).reshape(96, 96) * 7)
    else:
        image = Image.open(path).convert(mode)
    name = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(name)
    predictor = Predictor(cfg)
    assert_same(predictor(image), predictor(name))
    numbers = Image.fromarray(np.zeros((9, 9), np.float32))
    with pytest.raises(UserError, match=r"cannot read the Pillow image: .*mode F"):
        predictor(numbers)


def with_card(cfg, *names: str, **others):
    """Give the weights a card, and return its content."""
    card = {**card_of(cfg).as_dict(), "class_names": list(names), **others}
    torch.save({**torch.load(cfg.MODEL.WEIGHTS), "card": card}, cfg.MODEL.WEIGHTS)
    return card


def test_predictor_needs_only_a_checkpoint_with_a_card(cfg_and_image):
    cfg, path = cfg_and_image
    expected = Predictor(cfg)(path)
    card = with_card(cfg, "tree", "house", "car")
    assert cfg.MODEL.WEIGHTS not in card["config"]
    predictor = Predictor(cfg.MODEL.WEIGHTS)
    assert predictor.class_names == ["tree", "house", "car"]
    assert predictor.cfg.INPUT.MIN_SIZE_TEST == 128
    assert_same(predictor(path), expected)
    names = ("tree", "house", "car")
    assert predictor(path).names == [names[k] for k in expected.classes]
    with pytest.raises(
        UserError, match=r"takes a checkpoint \(.pth\) or a config, not config.yaml; .*load_config"
    ):
        Predictor("config.yaml")


def test_predictor_names_checkpoints_without_a_sound_card(cfg_and_image):
    cfg, _ = cfg_and_image
    with pytest.raises(UserError, match="has no config in it: .* give its config.yaml, and MODEL.WEIGHTS"):
        Predictor(cfg.MODEL.WEIGHTS)
    with_card(cfg, "tree")
    with pytest.raises(UserError, match="has names of 1 classes, but MODEL.RETINANET.NUM_CLASSES is 3"):
        Predictor(cfg)
    for damage, message in (
        ({"config": "MODEL: !!python/name:os.system"}, "the tag !!python/name:os.system is refused"),
        ({"config": "_BASE_: /etc/passwd"}, "without _BASE_"),
        ({"config": "MODEL: {NOTHING: 1}"}, "unknown key MODEL.NOTHING"),
        ({"config": None}, "is damaged: the card is"),
        ({"class_names": 3}, "is damaged: the card's class_names is 3"),
    ):
        with_card(cfg, "a", "b", "c", **damage)
        with pytest.raises(UserError, match=f"model.pth.*{message}"):
            Predictor(cfg.MODEL.WEIGHTS)


def test_predictor_says_where_the_dataset_has_other_names(cfg_and_image, caplog):
    cfg, _ = cfg_and_image
    with_card(cfg, "class0", "class1", "class2")
    assert Predictor(cfg).class_names == ["class0", "class1", "class2"]
    assert "class names" not in caplog.text
    with_card(cfg, "class1", "class0", "class2")
    assert Predictor(cfg).class_names == ["class1", "class0", "class2"]
    assert (
        'the class names of the checkpoint are in another order than those of dataset "squares_train": class '
        '0 is "class1" in the checkpoint and "class0" in the dataset; results have the checkpoint\'s names'
    ) in caplog.text


def test_predictor_resizes_as_the_test_loader_does(cfg_and_image):
    cfg, path = cfg_and_image
    cfg.INPUT.FOCAL.BACKEND = "opencv"
    cfg.INPUT.FORMAT = "RGB"
    predictor = Predictor(cfg)
    seen: list[torch.Tensor] = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["image"]))
    predictor(path)
    mapped = FocalDatasetMapper(cfg, is_train=False)({"file_name": str(path)})
    assert torch.equal(seen[0], mapped["image"])
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(UserError, match='INPUT.FORMAT is "L"'):
        Predictor(cfg)


def test_predictor_returns_what_reaches_the_operating_point_of_the_checkpoint(cfg_and_image, caplog):
    cfg, path = cfg_and_image
    caplog.set_level(logging.INFO, "focal_d2")
    predictor = Predictor(cfg)
    assert predictor.operating_point is None
    assert predictor.thresholds.tolist() == [0, 0, 0]
    scores = predictor(path).scores
    point = OperatingPoint(float(scores[3]), 0.8, 0.4, 0.53, "best F1", "mine_val", True)
    content = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)
    torch.save({**content, "operating_point": point._asdict()}, cfg.MODEL.WEIGHTS)
    assert "threshold" not in caplog.text
    predictor = Predictor(cfg)
    assert predictor.operating_point == point
    assert predictor.thresholds.tolist() == [np.float32(point.score)] * 3
    np.testing.assert_array_equal(predictor(path).scores, scores[scores >= scores[3]])
    assert f"threshold: {point}, from {cfg.MODEL.WEIGHTS}" in caplog.text
    np.testing.assert_array_equal(Predictor(cfg, threshold=0.0)(path).scores, scores)
    # Classes with a score of their own, and thresholds by name.
    own = point._replace(per_class={"class1": 0.5, "of another set": 0.1})
    torch.save({**content, "operating_point": own._asdict()}, cfg.MODEL.WEIGHTS)
    assert Predictor(cfg).thresholds.tolist() == pytest.approx([point.score, 0.5, point.score])
    predictor = Predictor(cfg, threshold={"class0": 1.0, "class2": 1.0})
    assert set(predictor(path).names) == {"class1"}
    with pytest.raises(
        UserError, match="threshold: no class is called tree; they are class0, class1, class2"
    ):
        Predictor(cfg, threshold={"tree": 0.5})
    torch.save({**content, "operating_point": "0.5"}, cfg.MODEL.WEIGHTS)
    with pytest.raises(UserError, match=r"model.pth is damaged: the operating point is 0.5"):
        Predictor(cfg)


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_predictor_takes_a_very_long_image(cfg_and_image, backend):
    cfg, _ = cfg_and_image
    cfg.INPUT.FOCAL.BACKEND = backend
    Predictor(cfg)(np.zeros((1, 40_000, 3), np.uint8))


def test_predictor_refuses_weights_that_only_a_training_may_start_from(cfg_and_image):
    cfg, _ = cfg_and_image
    content = torch.load(cfg.MODEL.WEIGHTS)
    for name in list(content["model"]):
        if name.startswith("head."):
            del content["model"][name]
    torch.save(content, cfg.MODEL.WEIGHTS)
    with pytest.raises(UserError, match="they lack head"):
        Predictor(cfg)


def weights_for(cfg) -> None:
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)


@pytest.mark.parametrize(
    "image_format, means", [("L", 1), ("L", 3), ("HSV", 3), ("YCbCr", 3), ("YUV-BT.601", 3), ("RGB", 3)]
)
def test_predictor_feeds_what_evaluation_feeds_in_every_format(cfg_and_image, image_format, means):
    cfg, path = cfg_and_image
    cfg.INPUT.FORMAT = image_format
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [50.0] * means
    weights_for(cfg)
    predictor = Predictor(cfg)
    seen: list[torch.Tensor] = []
    predictor.model.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]["image"]))
    predictor(path)
    predictor(read_image(str(path), "BGR"))
    expected = FocalDatasetMapper(cfg, is_train=False)({"file_name": str(path)})["image"]
    assert expected.shape[0] == FORMATS[image_format]
    assert all(torch.equal(x, expected) for x in seen)


def test_predictor_takes_grey_pixels(cfg_and_image):
    cfg, _ = cfg_and_image
    grey = np.random.default_rng(0).integers(0, 256, (60, 80), dtype=np.uint8)
    predictor = Predictor(cfg)
    expected = predictor(np.repeat(grey[:, :, None], 3, axis=2))  # what a grey file is read as
    for pixels in (grey, grey[:, :, None]):
        assert_same(predictor(pixels), expected)


def test_predictor_names_the_unreadable_image(cfg_and_image, tmp_path):
    predictor = Predictor(cfg_and_image[0])
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*bad\.png"):
        predictor(bad)


@pytest.mark.parametrize("image", [None, [None]])
def test_predictor_names_what_is_no_image(cfg_and_image, image):
    with pytest.raises(UserError, match=r"a file, an array of pixels or a Pillow image, not NoneType$"):
        Predictor(cfg_and_image[0])(image)


def test_predictor_refuses_an_empty_batch(cfg_and_image):
    with pytest.raises(UserError, match="batch_size is 0; it must be at least 1"):
        Predictor(cfg_and_image[0], batch_size=0)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 40, 2), np.uint8),
        np.zeros((40, 40, 4), np.uint8),
        np.zeros((40, 40, 3)),
        np.zeros((0, 9)),
    ],
)
def test_predictor_refuses_other_arrays(cfg_and_image, image):
    with pytest.raises(UserError, match=r"\(H, W, 3\) uint8"):
        Predictor(cfg_and_image[0])(image)


def test_predictor_has_a_name_for_each_class(cfg_and_image):
    cfg, _ = cfg_and_image
    assert Predictor(cfg).class_names == ["class0", "class1", "class2"]
    cfg.DATASETS.TEST = ("neon_trees_test",)  # one class, the model has three
    assert Predictor(cfg).class_names == ["0", "1", "2"]


def test_predictor_resolves_the_device(cfg_and_image):
    cfg, path = cfg_and_image
    cfg.MODEL.DEVICE = "auto"
    assert len(Predictor(cfg)(path).boxes) > 5
    assert cfg.MODEL.DEVICE == "auto"  # the caller's config stays as it is


def test_predictor_needs_weights():
    with pytest.raises(UserError, match="MODEL.WEIGHTS is empty"):
        Predictor(make_cfg())
