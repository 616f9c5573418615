from __future__ import annotations

from collections import Counter

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from focal_d2 import UserError
from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.data.augmentations import (
    Crop,
    QuarterTurns,
    RandomHue,
    RandomSaturation,
    Resize,
    ResizeAndCrop,
    build_augmentations,
    turn_hues,
)
from tests.conftest import make_cfg

BACKENDS = pytest.mark.parametrize("backend", ["pil", "opencv"])


@pytest.fixture
def record(coco_dataset):
    data = coco_dataset(images=1, size=64)
    register_datasets([data.entry])
    return DatasetCatalog.get(data.name)[0]


def test_default_adds_no_augmentation():
    standard = [T.ResizeShortestEdge(0), T.RandomFlip()]
    assert build_augmentations(make_cfg(), standard) == standard


@pytest.mark.parametrize(
    "key, value, kind",
    [
        ("VERTICAL_FLIP", True, T.RandomFlip),
        ("ROTATE_90", True, QuarterTurns),
        ("BRIGHTNESS", 0.2, T.RandomBrightness),
        ("CONTRAST", 0.2, T.RandomContrast),
        ("SATURATION", 0.2, RandomSaturation),
        ("HUE", 20.0, RandomHue),
    ],
)
def test_each_key_adds_its_augmentation_in_training_only(record, key, value, kind):
    cfg = make_cfg(**{f"INPUT__FOCAL__{key}": value})
    trained = FocalDatasetMapper(cfg, is_train=True).augmentations.augs
    assert kind in {type(a) for a in trained[2:]}  # after detectron2's resize and horizontal flip
    tested = FocalDatasetMapper(cfg, is_train=False).augmentations.augs
    assert [type(a) for a in tested] == [Resize]


@BACKENDS
@pytest.mark.parametrize("key", ["VERTICAL_FLIP", "ROTATE_90"])
def test_boxes_follow_the_picture(record, key, backend):
    cfg = make_cfg(**{f"INPUT__FOCAL__{key}": True, "INPUT__FOCAL__BACKEND": backend})
    mapper = FocalDatasetMapper(cfg, is_train=True)
    pictures = set()
    for _ in range(20):
        sample = mapper(record)
        pixels = sample["image"].numpy()
        pictures.add(pixels.tobytes())
        boxes = sample["instances"].gt_boxes.tensor.round().int().tolist()
        for box, label in zip(boxes, sample["instances"].gt_classes.tolist(), strict=True):
            x0, y0, x1, y1 = box
            assert (x1 - x0, y1 - y0) == (24, 24)
            # The square of class k is 255 in channel k, unless a later one covers it.
            assert (pixels[label, y0:y1, x0:x1] == 255).mean() > 0.3
    assert len(pictures) > 2


@pytest.mark.parametrize("key", ["BRIGHTNESS", "CONTRAST", "SATURATION"])
@pytest.mark.parametrize("value", [-0.5, 1.0])
def test_ranges_beyond_0_to_1_are_refused(key, value):
    with pytest.raises(UserError, match=f"INPUT.FOCAL.{key} is {value}"):
        FocalDatasetMapper(make_cfg(**{f"INPUT__FOCAL__{key}": value}), is_train=True)


def test_contrast_stays_within_its_range(record):
    mapper = FocalDatasetMapper(make_cfg(INPUT__FOCAL__CONTRAST=0.2), is_train=True)
    plain = FocalDatasetMapper(make_cfg(), is_train=False)(record)["image"].float()
    ratios = [(mapper(record)["image"].float().std() / plain.std()).item() for _ in range(20)]
    assert 0.75 <= min(ratios) < 0.95 < max(ratios) <= 1.22


def test_brightness_stays_within_its_range(record):
    mapper = FocalDatasetMapper(make_cfg(INPUT__FOCAL__BRIGHTNESS=0.2), is_train=True)
    plain = FocalDatasetMapper(make_cfg(), is_train=False)(record)["image"].float()
    ratios = [mapper(record)["image"].float().median() / plain.median() for _ in range(20)]
    assert 0.78 <= min(ratios) < 0.95 < 1.05 < max(ratios) <= 1.22
    assert np.ptp(ratios) > 0.1


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"HUE": -1.0}, "INPUT.FOCAL.HUE is -1.0; it must be within 0 and 180"),
        ({"HUE": 181.0}, "INPUT.FOCAL.HUE is 181.0"),
        (
            {"SCALE_JITTER": [0.5]},
            r"INPUT.FOCAL.SCALE_JITTER is \[0.5\]; it must be a list of 2 numbers, each above",
        ),
        ({"SCALE_JITTER": [0.0, 1.0]}, "SCALE_JITTER is"),
        ({"SCALE_JITTER": [1.0, 0.5]}, "SCALE_JITTER is"),
        ({"SCALE_JITTER": [1.0, float("inf")]}, "SCALE_JITTER is"),
        ({"SCALE_JITTER": [1.0, float("nan")]}, "SCALE_JITTER is"),
        ({"SCALE_JITTER": ["a", 1.0]}, "SCALE_JITTER is"),
        (
            {"SCALE_JITTER": [0.5, 1.5]},
            r"enlarges images: set INPUT.FOCAL.BOX_CROP.SIZE to \[height, width\]",
        ),
        (
            {"BOX_CROP__SIZE": [64]},
            r"INPUT.FOCAL.BOX_CROP.SIZE is \[64\]; it must be a list of 2 whole",
        ),
        ({"BOX_CROP__SIZE": [64, 0]}, "BOX_CROP.SIZE is"),
        ({"BOX_CROP__SIZE": [64, 64.5]}, "BOX_CROP.SIZE is"),
        ({"BOX_CROP__AROUND_BOX": 1.5}, "INPUT.FOCAL.BOX_CROP.AROUND_BOX is 1.5; it must be within 0 and 1"),
        (
            {"BOX_CROP__MIN_VISIBLE": -0.1},
            "INPUT.FOCAL.BOX_CROP.MIN_VISIBLE is -0.1; it must be within 0 and 1",
        ),
    ],
)
def test_values_out_of_range_are_refused(settings, message):
    cfg = make_cfg(**{f"INPUT__FOCAL__{key}": value for key, value in settings.items()})
    with pytest.raises(UserError, match=message):
        FocalDatasetMapper(cfg, is_train=True)


@pytest.mark.parametrize("key", ["SATURATION", "HUE"])
def test_colours_need_channels_that_are_known(key):
    cfg = make_cfg(**{f"INPUT__FOCAL__{key}": 0.5}, INPUT__FORMAT="L")
    with pytest.raises(UserError, match='SATURATION or HUE, INPUT.FORMAT is "L"; legal values: BGR, RGB'):
        build_augmentations(cfg, [])


@pytest.mark.parametrize("key", ["MASK_ON", "KEYPOINT_ON", "LOAD_PROPOSALS"])
def test_crop_knows_boxes_only(key):
    cfg = make_cfg(**{f"MODEL__{key}": True}, INPUT__FOCAL__BOX_CROP__SIZE=(50, 50))
    with pytest.raises(UserError, match=f"BOX_CROP knows boxes only: MODEL.{key} must be False"):
        build_augmentations(cfg, [])


@pytest.mark.parametrize(
    "kind, size, legal",
    [
        ("absolute", [0.5, 0.5], False),
        ("absolute", [32.5, 32.0], False),
        ("absolute", [32, 48.0], False),
        ("absolute", [32, 48], True),
        ("absolute_range", [48, 32], False),
        ("absolute_range", [32.0, 48], True),
        ("relative", [5, 5], False),
        ("relative", [0.5, 1.0], True),
        ("relative_range", [0.9, 1.1], False),
    ],
)
def test_a_crop_has_the_unit_of_its_type(kind, size, legal):
    cfg = make_cfg(INPUT__CROP={"ENABLED": True, "TYPE": kind, "SIZE": size})
    if legal:
        build_augmentations(cfg, [])
        return
    with pytest.raises(UserError, match=rf"INPUT.CROP.SIZE is .*; with INPUT.CROP.TYPE {kind} it must be"):
        build_augmentations(cfg, [])


def test_order_of_all():
    cfg = make_cfg(
        INPUT__CROP__ENABLED=True,
        INPUT__FOCAL__SCALE_JITTER=(0.5, 2.0),
        INPUT__FOCAL__BOX_CROP__SIZE=(50, 50),
        INPUT__FOCAL__VERTICAL_FLIP=True,
        INPUT__FOCAL__ROTATE_90=True,
        INPUT__FOCAL__BRIGHTNESS=0.1,
        INPUT__FOCAL__CONTRAST=0.1,
        INPUT__FOCAL__SATURATION=0.1,
        INPUT__FOCAL__HUE=10.0,
    )
    assert [type(a) for a in FocalDatasetMapper(cfg, is_train=True).augmentations.augs] == [
        Crop,
        ResizeAndCrop,
        T.RandomFlip,
        T.RandomFlip,
        QuarterTurns,
        T.RandomBrightness,
        T.RandomContrast,
        RandomSaturation,
        RandomHue,
    ]


# Bright squares on dark ground, a few pixels apart: (M, 4) XYXY in 120 x 160 pixels.
SQUARES = [[10, 10, 40, 40], [60, 5, 75, 20], [100, 30, 150, 80], [20, 60, 52, 92], [70, 90, 95, 115]]


@pytest.fixture
def squares(tmp_path) -> dict:
    image = np.full((120, 160, 3), 40, np.uint8)
    for x0, y0, x1, y1 in SQUARES:
        image[y0:y1, x0:x1] = 200
    cv2.imwrite(str(tmp_path / "squares.png"), image)
    annotations = [
        {"bbox": x, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0} for x in np.float64(SQUARES).tolist()
    ]
    return {
        "file_name": str(tmp_path / "squares.png"),
        "height": 120,
        "width": 160,
        "annotations": annotations,
    }


@BACKENDS
@pytest.mark.parametrize(
    "settings",
    [
        {"SCALE_JITTER": (0.5, 1.0)},
        {"BOX_CROP__SIZE": (64, 72)},
        {"BOX_CROP__SIZE": (64, 72), "SCALE_JITTER": (0.3, 3.0), "BOX_CROP__MIN_VISIBLE": 0.6},
        {
            "BOX_CROP__SIZE": (100, 90),
            "SCALE_JITTER": (0.5, 2.0),
            "VERTICAL_FLIP": True,
            "ROTATE_90": True,
            "BRIGHTNESS": 0.2,
            "CONTRAST": 0.2,
            "SATURATION": 0.5,
            "HUE": 180.0,
        },
    ],
    ids=["jitter", "crop", "jitter and crop", "all"],
)
def test_boxes_frame_their_squares(squares, settings, backend):
    cfg = make_cfg(
        **{f"INPUT__FOCAL__{key}": value for key, value in settings.items()},
        INPUT__FOCAL__BACKEND=backend,
        INPUT__MIN_SIZE_TRAIN=(100, 120, 140),
    )
    mapper = FocalDatasetMapper(cfg, is_train=True)
    framed = ignored = 0
    for _ in range(40):
        sample = mapper(squares)
        bright = sample["image"].numpy().mean(0) > 110
        boxes = [*sample["instances"].gt_boxes.tensor.tolist(), *sample["ignored_boxes"].tolist()]
        y, x = (np.arange(side) + 0.5 for side in bright.shape)
        inside, outside = np.zeros_like(bright), np.ones_like(bright)
        for x0, y0, x1, y1 in boxes:
            # Edges lie within 0.6 pixels of where the boxes say.
            inside |= np.outer((y > y0 + 0.6) & (y < y1 - 0.6), (x > x0 + 0.6) & (x < x1 - 0.6))
            outside &= ~np.outer((y > y0 - 0.6) & (y < y1 + 0.6), (x > x0 - 0.6) & (x < x1 + 0.6))
        assert bright[inside].all()
        assert not bright[outside].any()
        framed += len(sample["instances"])
        ignored += len(sample["ignored_boxes"])
    assert framed > 20
    assert bool(ignored) == ("BOX_CROP__SIZE" in settings)


def make_crop(size: tuple[int, int] | None, *, jitter: tuple[float, float] = (1, 1), around_box: float = 0.0):
    return ResizeAndCrop(T.ResizeShortestEdge(0), jitter=jitter, size=size, around_box=around_box)


def cropped(transforms: T.TransformList) -> tuple[int, int, int, int]:
    """The window's y, x, height and width."""
    crop = transforms.transforms[0]
    assert isinstance(crop, T.CropTransform)
    return crop.y0, crop.x0, crop.h, crop.w


def test_crop_around_a_box_holds_all_of_it():
    image, (x0, y0, x1, y1) = np.zeros((60, 80, 3), np.uint8), (50.5, 3.2, 69.5, 20.0)
    starts = set()
    for _ in range(300):
        y, x, h, w = cropped(
            make_crop((20, 24), around_box=1.0).get_transform(image, np.array([[x0, y0, x1, y1]]))
        )
        assert (h, w) == (20, 24)
        assert y <= y0 < y1 <= y + h
        assert x <= x0 < x1 <= x + w
        starts.add((y, x))
    # y from 20 - 20 to 3; x from 69.5 - 24, rounded up, to 50.
    assert starts == {(y, x) for y in range(4) for x in range(46, 51)}


def test_crop_around_a_larger_box_shows_nothing_else():
    image = np.zeros((60, 80, 3), np.uint8)
    for _ in range(100):
        y, x, h, w = cropped(
            make_crop((20, 24), around_box=1.0).get_transform(image, np.array([[5.0, 7, 60, 50]]))
        )
        assert 7 <= y <= y + h <= 50
        assert 5 <= x <= x + w <= 60


@pytest.mark.parametrize("boxes", [None, np.zeros((0, 4)), np.array([[-9.0, -9, -1, -1]])])
def test_crop_without_a_box_is_anywhere(boxes):
    image, counts = np.zeros((12, 13, 3), np.uint8), Counter()
    for _ in range(1200):
        y, x, _, _ = cropped(make_crop((10, 10), around_box=1.0).get_transform(image, boxes))
        counts[y, x] += 1
    # 3 x 4 windows, 100 of each expected, standard deviation 9.6.
    assert set(counts) == {(y, x) for y in range(3) for x in range(4)}
    assert max(counts.values()) < 150
    assert min(counts.values()) > 50


def test_crop_is_around_a_box_as_often_as_asked():
    image, box = np.zeros((1000, 1000, 3), np.uint8), np.array([[500.0, 500, 510, 510]])
    augmentation = make_crop((10, 10), around_box=0.3)
    held = sum(cropped(augmentation.get_transform(image, box))[:2] == (500, 500) for _ in range(1000))
    assert 240 < held < 360  # 300 ± 4 standard deviations of 14.5; one of 982081 windows else


def test_each_box_is_as_likely():
    image = np.zeros((100, 100, 3), np.uint8)
    boxes = np.array([[0.0, 0, 10, 10], [50, 50, 60, 60], [90, 90, 100, 100]])
    augmentation = make_crop((10, 10), around_box=1.0)
    counts = Counter(cropped(augmentation.get_transform(image, boxes))[0] for _ in range(600))
    assert set(counts) == {0, 50, 90}
    assert min(counts.values()) > 150


@BACKENDS
def test_crop_is_around_objects_not_crowds(squares, backend):
    for annotation in squares["annotations"][1:]:
        annotation["iscrowd"] = 1
    cfg = make_cfg(INPUT__FOCAL__BACKEND=backend, INPUT__FOCAL__BOX_CROP__SIZE=(40, 40))
    cfg.INPUT.FOCAL.BOX_CROP.AROUND_BOX = 1.0
    mapper = FocalDatasetMapper(cfg, is_train=True)
    for _ in range(20):
        (area,) = mapper(squares)["instances"].gt_boxes.area().tolist()
        assert area == 900  # all of the first square


def test_whole_boxes_are_objects_whatever_the_share(squares):
    cfg = make_cfg(
        INPUT__FOCAL__ROTATE_90=True,
        INPUT__FOCAL__SCALE_JITTER=(0.3, 0.7),
        INPUT__FOCAL__BOX_CROP__SIZE=(200, 200),
        INPUT__FOCAL__BOX_CROP__MIN_VISIBLE=1.0,
    )
    squares["annotations"][0]["bbox"] = [0.0, 0.0, 160.0, 120.0]
    mapper = FocalDatasetMapper(cfg, is_train=True)
    for _ in range(100):
        assert len(mapper(squares)["instances"]) == len(SQUARES)


@pytest.mark.parametrize("size", [(60, 80), (100, 100)])
def test_image_within_the_crop_stays(size):
    assert (
        make_crop(size, around_box=1.0).get_transform(np.zeros((60, 80, 3), np.uint8), None).transforms == []
    )


@pytest.mark.parametrize("factor, size", [(0.5, (30, 40)), (0.001, (1, 1)), (1.0, (60, 80))])
def test_jitter_multiplies_the_size(factor, size):
    inputs = T.AugInput(np.zeros((60, 80, 3), np.uint8))
    make_crop(None, jitter=(factor, factor))(inputs)
    assert inputs.image.shape == (*size, 3)


def test_jitter_is_drawn_from_its_range():
    image = np.zeros((100, 100, 3), np.uint8)
    augmentation = make_crop(None, jitter=(0.5, 0.9))
    sides = [augmentation.get_transform(image, None).transforms[0].new_h for _ in range(300)]
    assert 50 <= min(sides) < 54
    assert 86 < max(sides) <= 90
    assert 68 < np.mean(sides) < 72


def test_jitter_multiplies_what_detectron2_resizes_to():
    resize = T.ResizeShortestEdge(50)
    augmentation = ResizeAndCrop(resize, jitter=(0.5, 0.5), size=None, around_box=0.0)
    (transform,) = augmentation.get_transform(np.zeros((100, 200, 3), np.uint8), None).transforms
    assert (transform.new_h, transform.new_w) == (25, 50)  # 100 x 200 to 50 x 100, halved


def test_enlarged_crops_never_exceed_their_size():
    image = np.broadcast_to(np.uint8(0), (4000, 3000, 3))
    crop, resize = make_crop((128, 256), jitter=(2.0, 2.0)).get_transform(image, None).transforms
    assert (crop.h, crop.w) == (64, 128)
    assert (resize.h, resize.w, resize.new_h, resize.new_w) == (64, 128, 128, 256)
    # Where one side fits, it is whole: 100 rows are 50.
    crop, resize = make_crop((128, 256), jitter=(0.5, 0.5)).get_transform(image[:100], None).transforms
    assert (crop.h, crop.w) == (100, 512)
    assert (resize.new_h, resize.new_w) == (50, 256)


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_saturation_is_a_blend_with_grey(image_format):
    pixel = np.array([[[200, 100, 50]]], np.uint8)
    order = slice(None) if image_format == "RGB" else slice(None, None, -1)

    def blend(factor: float) -> list[int]:
        augmentation = RandomSaturation(factor, factor, image_format)
        return augmentation(inputs := T.AugInput(pixel[..., order])) and inputs.image[0, 0, order].tolist()

    assert blend(1.0) == [200, 100, 50]
    # Grey: 0.299 * 200 + 0.587 * 100 + 0.114 * 50 = 124.2.
    assert blend(0.0) == [124, 124, 124]
    # Halfway: 162.1, 112.1, 87.1. By 1.5 times: 237.9, 87.9, 12.9.
    assert blend(0.5) == [162, 112, 87]
    assert blend(1.5) == [238, 88, 13]


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
def test_hues_turn_from_red_to_green_to_blue(image_format):
    order = slice(None) if image_format == "RGB" else slice(None, None, -1)
    pixels = np.array([[[250, 20, 20], [90, 90, 90], [0, 0, 0], [255, 255, 255]]], np.uint8)

    def turn(degrees: float) -> list[int]:
        turned = turn_hues(pixels[..., order], degrees=degrees, image_format=image_format)
        np.testing.assert_array_equal(turned[0, 1:], pixels[0, 1:])  # greys have no hue
        return turned[0, 0, order].tolist()

    assert turn(0) == [250, 20, 20]
    assert turn(120) == [20, 250, 20]
    assert turn(-120) == turn(240) == [20, 20, 250]
    assert turn(180) == turn(-180) == [20, 250, 250]
    assert turn(30) == [250, 135, 20]  # halfway to yellow


def test_hues_turn_there_and_back():
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    np.testing.assert_array_equal(turn_hues(image, degrees=0, image_format="BGR"), image)
    for degrees in (60, 120, 180, -60):  # where a turn swaps channels or reflects them within their range
        there = turn_hues(image, degrees=degrees, image_format="BGR")
        np.testing.assert_array_equal(there.max(2), image.max(2))
        np.testing.assert_array_equal(there.min(2), image.min(2))
        back = turn_hues(there, degrees=-degrees, image_format="BGR")
        assert np.abs(back.astype(int) - image).max() <= 1


def test_hue_is_drawn_from_its_range():
    augmentation, image = RandomHue(45.0, "RGB"), np.zeros((1, 1, 3), np.uint8)
    angles = [augmentation.get_transform(image).op.keywords["degrees"] for _ in range(300)]
    assert -45 <= min(angles) < -42
    assert 42 < max(angles) <= 45


@pytest.mark.parametrize("times", [1, 2, 3])
def test_quarter_turns_move_pixels_exactly(times):
    image = np.random.default_rng(0).integers(0, 256, (31, 46, 3), np.uint8)
    turned = T.RotationTransform(31, 46, 90 * times).apply_image(image)
    np.testing.assert_array_equal(turned, np.rot90(image, times))
