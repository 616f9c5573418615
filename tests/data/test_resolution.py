from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T

from focal_d2.annotations import Table
from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.data.augmentations import ResizeAndCrop
from focal_d2.data.resolution import large_windows, network_inputs, training_boxes, training_inputs
from tests.conftest import make_cfg

PLAIN = {"factor": 1, "last_crop": None}  # neither jitter nor a crop after the resize


def make_table(boxes, *, sizes=((100, 200),), image=None, ignored=None, labels=None):
    """A table of boxes given as left, top, width, height."""
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return Table(
        classes=("a", "b", "c"),
        category_ids=(1, 2, 3),
        file_names=[f"{i}.png" for i in range(len(sizes))],
        image_ids=np.arange(len(sizes)),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        image=np.zeros(len(boxes), dtype=np.int64) if image is None else np.array(image, dtype=np.int64),
        boxes=boxes,
        labels=np.zeros(len(boxes), dtype=np.int64) if labels is None else np.array(labels),
        ignored=np.zeros(len(boxes), dtype=bool) if ignored is None else np.array(ignored),
        areas=boxes[:, 2] * boxes[:, 3],
    )


@pytest.mark.parametrize("short_edge, max_size", [(800, 1333), (640, 1000), (33, 50), (1, 10_000)])
def test_sizes_are_those_of_detectron2(short_edge, max_size):
    sizes = np.random.default_rng(0).integers(1, 3000, (2000, 2))
    sizes[:20, 1] = sizes[:20, 0]
    got = network_inputs(
        sizes, crop_type=None, crop_size=(), short_edge=short_edge, max_size=max_size, **PLAIN
    )
    expected = [T.ResizeShortestEdge.get_output_shape(h, w, short_edge, max_size) for h, w in sizes.tolist()]
    assert got.sizes.tolist() == np.maximum(1, expected).tolist()  # ours leaves a pixel of a side
    np.testing.assert_array_equal(got.whole, got.sizes)
    # Rounding to whole pixels moves a side by at most half of one.
    assert np.abs(sizes * got.scales[:, None] - got.sizes)[got.sizes > 1].max() <= 0.5 + 1e-6


@pytest.mark.parametrize("kind, size", [("absolute", (256, 300)), ("relative", (0.6, 0.83))])
def test_crops_are_those_of_detectron2(kind, size):
    sizes = np.random.default_rng(0).integers(10, 900, (500, 2))
    crops = network_inputs(sizes, crop_type=kind, crop_size=size, short_edge=0, max_size=1, **PLAIN).sizes
    assert crops.tolist() == [list(T.RandomCrop(kind, size).get_crop_size(x)) for x in sizes.tolist()]


@pytest.mark.parametrize("kind, size", [("absolute_range", (100, 300)), ("relative_range", (0.4, 0.7))])
def test_random_crops_are_the_middle_of_detectron2s(kind, size):
    drawn = [T.RandomCrop(kind, size).get_crop_size((260, 700)) for _ in range(4000)]
    crops = network_inputs(
        np.array([[260, 700]]), crop_type=kind, crop_size=size, short_edge=0, max_size=1, **PLAIN
    )
    np.testing.assert_allclose(crops.sizes[0], np.mean(drawn, axis=0), rtol=0.02)


def test_very_long_and_very_small_images_keep_a_pixel():
    sizes = np.array([[1, 40_000], [40_000, 1], [1, 1]])
    for crop_type in (None, "relative"):
        got = network_inputs(
            sizes, crop_type=crop_type, crop_size=(0.3, 0.3), short_edge=800, max_size=1333, **PLAIN
        )
        assert got.sizes.min() == got.whole.min() == 1


def test_jitter_and_the_last_crop_are_those_of_the_augmentation():
    sizes = np.random.default_rng(0).integers(10, 900, (200, 2))
    got = network_inputs(
        sizes, crop_type=None, crop_size=(), short_edge=300, max_size=500, factor=1.3, last_crop=[256, 320]
    )
    resize = T.ResizeShortestEdge(300, 500)
    for size, seen, whole in zip(sizes, got.sizes, got.whole, strict=True):
        image = np.zeros((*size, 3), np.uint8)
        for crop, expected in (((256, 320), seen), (None, whole)):
            inputs = T.AugInput(image)
            ResizeAndCrop(resize, jitter=(1.3, 1.3), size=crop, around_box=0)(inputs)
            assert inputs.image.shape[:2] == tuple(expected)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"CROP__ENABLED": True, "CROP__TYPE": "absolute", "CROP__SIZE": [100, 120]},
        {"CROP__ENABLED": True, "CROP__TYPE": "absolute_range", "CROP__SIZE": [100, 120]},
        {"CROP__ENABLED": True, "CROP__TYPE": "relative", "CROP__SIZE": [0.5, 0.8]},
        {"CROP__ENABLED": True, "CROP__TYPE": "relative_range", "CROP__SIZE": [0.5, 0.8]},
        {"FOCAL__BOX_CROP__SIZE": [90, 160]},
        {"FOCAL__BOX_CROP__SIZE": [90, 160], "FOCAL__SCALE_JITTER": [0.7, 1.5], "MIN_SIZE_TRAIN": (150, 250)},
        {
            "FOCAL__BOX_CROP__SIZE": [90, 160],
            "MIN_SIZE_TRAIN": (150, 250),
            "MIN_SIZE_TRAIN_SAMPLING": "range",
        },
        {"FOCAL__BOX_CROP__SIZE": [90, 90], "CROP__ENABLED": True, "CROP__SIZE": [0.9, 0.9]},
    ],
)
def test_one_draw_in_ten_shows_more_than_the_large_window(settings):
    """The window is that of the file's pixels that training's own augmentations leave."""
    settings = {"MIN_SIZE_TRAIN": (0,), **settings}
    cfg = make_cfg(**{f"INPUT__{key}": value for key, value in settings.items()})
    height, width = 200, 300
    (large,) = large_windows(cfg, np.array([[height, width]]))
    mapper = FocalDatasetMapper(cfg, is_train=True)
    shown = np.zeros((400, 2))
    for i in range(len(shown)):
        inputs = T.AugInput(np.zeros((height, width, 3), np.uint8))
        transforms = mapper.augmentations(inputs)
        corners = transforms.apply_box(np.array([[0.0, 0.0, width, height]]))[0]
        scales = np.array([(corners[3] - corners[1]) / height, (corners[2] - corners[0]) / width])
        shown[i] = inputs.image.shape[:2] / scales
    larger = (shown > large + 0.5 + 1e-6).all(axis=1).mean()
    assert larger <= 0.15  # 400 draws: 3 standard deviations
    assert (shown >= large * 0.97).all(axis=1).mean() >= 0.08


def test_jitter_is_taken_at_its_middle():
    cfg = make_cfg(
        INPUT__MIN_SIZE_TRAIN=(0,),
        INPUT__FOCAL__SCALE_JITTER=[0.5, 2.5],
        INPUT__FOCAL__BOX_CROP__SIZE=[64, 64],
    )
    got = training_inputs(cfg, np.array([[100, 20]]))
    assert (got.scales.tolist(), got.sizes.tolist(), got.whole.tolist()) == ([1.5], [[64, 30]], [[150, 30]])


def test_crop_comes_before_resizing():
    # 400 × 500 is cropped to 256 × 256 and that scaled to 288: by 1.125. The whole image: 450 × 562.5.
    got = network_inputs(
        np.array([[400, 500]]),
        crop_type="absolute",
        crop_size=[256, 256],
        short_edge=288,
        max_size=1333,
        **PLAIN,
    )
    assert (got.scales.tolist(), got.sizes.tolist(), got.whole.tolist()) == (
        [1.125],
        [[288, 288]],
        [[450, 563]],
    )


@pytest.mark.parametrize(
    "edges, sampling, expected",
    [
        ((800,), "choice", 800),
        ((640, 672, 704, 736), "choice", 672),
        ((900, 500, 700), "choice", 700),
        ((600, 801), "range", 700),
        ((0,), "choice", 400),
    ],
)
def test_typical_short_edge(edges, sampling, expected):
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=edges, INPUT__MIN_SIZE_TRAIN_SAMPLING=sampling)
    assert training_inputs(cfg, np.array([[400, 500]])).sizes[0, 0] == expected
    assert training_inputs(cfg, np.array([[400, 500]])).scales.tolist() == [expected / 400]


def test_no_images_have_no_sizes():
    got = training_inputs(make_cfg(), np.zeros((0, 2), dtype=np.int64))
    assert (got.scales.shape, got.sizes.shape, got.whole.shape) == ((0,), (0, 2), (0, 2))


def test_boxes_are_those_that_the_mapper_gives(coco_dataset):
    data = coco_dataset(images=3, size=61)
    register_datasets([data.entry])
    cfg = make_cfg(INPUT__MIN_SIZE_TRAIN=(100,), INPUT__RANDOM_FLIP="none")
    records = DatasetCatalog.get(data.name)
    for annotation in (a for record in records for a in record["annotations"]):
        annotation["bbox"] = [x + 0.25 for x in annotation["bbox"]]  # whole numbers are rounded down
    found = training_boxes(cfg, Table.from_records(records, ("a", "b", "c")))
    samples = [FocalDatasetMapper(cfg, is_train=True)(record) for record in records]
    for i, sample in enumerate(samples):
        assert tuple(found.sizes[i]) == sample["image"].shape[1:]
        expected = sample["instances"].gt_boxes.tensor.numpy()
        np.testing.assert_allclose(found.boxes[found.image == i], expected, rtol=1e-6)


def test_boxes_are_clipped_and_ignored_or_empty_ones_left_out():
    boxes = [
        [-10, 20, 30, 40],
        [190, 90, 50, 50],
        [300, 0, 5, 5],
        [10, 10, 0, 5],
        [5, 5, 20, 20],
        [0, 0, 9, 9],
    ]
    table = make_table(boxes, ignored=[False, False, False, False, True, False])
    found = training_boxes(make_cfg(INPUT__MIN_SIZE_TRAIN=(50,)), table)
    assert found.sizes.tolist() == [[50, 100]]
    assert found.rows.tolist() == [0, 1, 5]
    assert found.boxes.tolist() == [[0, 10, 10, 30], [95, 45, 100, 50], [0, 0, 4.5, 4.5]]


def test_each_axis_is_scaled_by_whole_pixels():
    # 101 × 200 becomes 50 × 99.01, in pixels 50 × 99.
    table = make_table([[100, 20.2, 100, 80.8]], sizes=[(101, 200)])
    found = training_boxes(make_cfg(INPUT__MIN_SIZE_TRAIN=(50,)), table)
    np.testing.assert_allclose(found.boxes, [[49.5, 10, 99, 50]], rtol=1e-12)
