from __future__ import annotations

import itertools
import json

import pytest
import torch
from detectron2.structures import Boxes, Instances

from focal_d2 import UserError
from focal_d2.data import mixing, register_datasets
from focal_d2.data.mixing import CopyPaste, Mosaic, build_mixing
from focal_d2.data.seeding import seeded
from focal_d2.engine import FocalTrainer
from tests.conftest import make_cfg

MOSAIC = {"INPUT__FOCAL__MOSAIC__PROBABILITY": 1.0, "INPUT__FOCAL__PLAIN_SHARE": 0.0}
PASTE = {
    "INPUT__FOCAL__COPY_PASTE__PROBABILITY": 1.0,
    "INPUT__FOCAL__COPY_PASTE__MAX_COVERED": 1.0,
    "INPUT__FOCAL__PLAIN_SHARE": 0.0,
}
each_kind = pytest.mark.parametrize(
    "on", [MOSAIC, PASTE, {**MOSAIC, **PASTE}], ids=["mosaic", "paste", "both"]
)


def sample(value, boxes=(), ignored=(), *, size=(8, 8), classes=None, channels=1, dtype=torch.uint8):
    instances = Instances(size, gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4)))
    instances.gt_classes = torch.arange(len(boxes)) if classes is None else torch.tensor(classes)
    return {
        "image": torch.full((channels, *size), value, dtype=dtype),
        "instances": instances,
        "ignored_boxes": torch.tensor(ignored, dtype=torch.float32).view(-1, 4),
        "file_name": f"{value}.png",
    }


def boxes_of(x) -> list[list[float]]:
    return x["instances"].gt_boxes.tensor.tolist()


def let_draw(monkeypatch, **values):
    """Replace what functions draw, in the order in which they are called."""
    for name, drawn in values.items():
        left = iter(drawn)
        monkeypatch.setattr(mixing, name, lambda *_, left=left: next(left))


def make_mosaic(scale=(1.0, 1.0), *, fill=(7.4,), min_visible=0.25) -> Mosaic:
    return Mosaic(scale=scale, fill=fill, min_visible=min_visible)


def test_a_mosaic_by_hand(monkeypatch):
    # The four meet at row 4 and column 2 of 8 × 8 pixels, in the order 3, 0, 1, 2 of the quarters.
    let_draw(
        monkeypatch,
        uniform=[0.5, 0.25, 1, 1, 1, 1],
        _whole=[4, 0, 0, 6, 1, 2, 0, 3],  # rows and columns at which the windows start
        _order=[[3, 0, 1, 2]],
    )
    first = sample(10, [[0.0, 4, 4, 8], [5, 3, 8, 8]])  # its window is (0, 4, 6, 8), moved by (2, 0)
    others = iter(
        [
            sample(20, [[4.0, 0, 8, 2]]),  # window (6, 0, 8, 4) moved by (-6, 0): half of the box
            sample(30, [[0.0, 0, 8, 1.5]], [[2.0, 0, 6, 8]]),  # window (2, 1, 8, 5) moved by (0, -1)
            sample(40, [[4.0, 3, 8, 4]]),  # window (3, 0, 5, 4) moved by (-3, 4): a quarter of the box
        ]
    )
    mosaic = make_mosaic()(first, lambda: next(others))
    expected = torch.empty(1, 8, 8, dtype=torch.uint8)
    expected[:, :4, :2], expected[:, :4, 2:], expected[:, 4:, :2], expected[:, 4:, 2:] = 20, 30, 40, 10
    assert torch.equal(mosaic["image"], expected)
    # Of the first image's second box 1 · 4 of 15 pixels are left, 0.27, and of the third image's box, 6 · 0.5
    # of 12, 0.25: both are objects.
    assert boxes_of(mosaic) == [[2, 4, 6, 8], [7, 4, 8, 8], [0, 0, 2, 2], [2, 0, 8, 0.5], [1, 7, 2, 8]]
    assert mosaic["instances"].gt_classes.tolist() == [0, 1, 0, 0, 0]
    assert mosaic["ignored_boxes"].tolist() == [[2, 0, 6, 4]]
    assert mosaic["file_name"] == "10.png (mosaic with 20.png, 30.png, 40.png)"


def test_boxes_of_which_too_little_is_left_are_ignored_regions(monkeypatch):
    let_draw(monkeypatch, uniform=[0.5, 0.5, 1, 1, 1, 1], _whole=[0] * 8, _order=[[0, 1, 2, 3]])
    cut = sample(1, [[0.0, 0, 8, 8], [0, 0, 8, 4], [5, 5, 8, 8]])  # a quarter, a half and nothing are left
    mosaic = make_mosaic(min_visible=0.3)(cut, lambda: sample(2))
    assert boxes_of(mosaic) == [[0, 0, 4, 4]]
    assert mosaic["instances"].gt_classes.tolist() == [1]
    assert mosaic["ignored_boxes"].tolist() == [[0, 0, 4, 4]]


def test_images_that_are_smaller_than_their_quarter_touch_the_meeting_point(monkeypatch):
    # The first is 8 × 8 pixels and resized to 2 × 2, with its box of 4 × 8; the others have 3 × 2, 1 × 1 and
    # 8 × 12 pixels, which become 2 × 1, 1 × 1 and 2 × 3.
    let_draw(monkeypatch, uniform=[0.5, 0.5, 0.25, 0.5, 0.5, 0.25], _whole=[0] * 8, _order=[[0, 1, 2, 3]])
    others = iter([sample(20, size=(3, 2)), sample(30, size=(1, 1)), sample(40, size=(8, 12))])
    mosaic = make_mosaic(fill=(7.4,))(sample(10, [[4.0, 0, 8, 8]]), lambda: next(others))
    expected = torch.full((1, 8, 8), 7, dtype=torch.uint8)
    expected[:, 2:4, 2:4], expected[:, 2:4, 4:5], expected[:, 4:5, 3:4], expected[:, 4:6, 4:7] = (
        10,
        20,
        30,
        40,
    )
    assert torch.equal(mosaic["image"], expected)
    assert boxes_of(mosaic) == [[3, 2, 4, 4]]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 1)])
def test_a_mosaic_of_hardly_any_pixel_has_that_size(size):
    with seeded(0):
        mosaic = make_mosaic((0.1, 1.0))(sample(1, [[0.0, 0, 1, 1]], size=size), lambda: sample(2))
    assert mosaic["image"].shape[1:] == mosaic["instances"].image_size == size


def make_paste(most=5, *, max_covered=0.3, min_visible=0.25) -> CopyPaste:
    return CopyPaste(most=most, max_covered=max_covered, min_visible=min_visible)


def test_pasted_boxes_by_hand(monkeypatch):
    # Three of the other image's boxes are pasted: the last, the first, and the second, which is too high.
    # Pixels are whole: the last one's window is (3, 1, 6, 3), and the first one's is (5, 0, 8, 4).
    other = sample(20, [[5.0, 0, 8, 4], [0, 0, 2, 8], [3.5, 1, 5.5, 2.5]], [[0.0, 0, 4, 8]])
    first = sample(10, [[0.0, 0, 4, 4]], [[6.0, 6, 8, 8]], classes=[7], size=(7, 8))
    let_draw(
        monkeypatch,
        _order=[[2, 0, 1]],
        # The number less one. The first position covers 2 · 2 of 16 pixels of the box; the second box's first
        # position 4 more, 0.5 in all and too much, and its second position none.
        _whole=[2, 2, 2, 0, 1, 3, 4],
    )
    result = make_paste(min_visible=0.3)(first, lambda: other)
    expected = torch.full((1, 7, 8), 10, dtype=torch.uint8)
    expected[:, 2:4, 2:5] = expected[:, 3:7, 4:7] = 20
    assert torch.equal(result["image"], expected)
    # In each window is a part of the other box, 2 of 12 pixels and 0.75 of 3: ignored regions.
    assert boxes_of(result) == [[0, 0, 4, 4], [2.5, 2, 4.5, 3.5], [4, 3, 7, 7]]
    assert result["instances"].gt_classes.tolist() == [7, 2, 0]
    ignored = [[6, 6, 8, 8], [2, 2, 3, 4], [4, 2, 5, 4], [4, 4, 4.5, 5.5]]
    assert result["ignored_boxes"].tolist() == ignored
    assert result["file_name"] == "10.png (pasted from 20.png)"


def test_boxes_are_not_pasted_where_they_would_hide_others():
    # Any position covers more than 0.3 of the box, but for the upper left corner of the image.
    first = sample(10, [[1.0, 1, 8, 8]])
    for max_covered, pasted in ((0.3, False), (0.7, True)):
        with seeded(0):
            result = make_paste(max_covered=max_covered)(dict(first), lambda: sample(20, [[0.0, 0, 6, 6]]))
        assert (len(result["instances"]) == 2) is pasted
        assert (result["file_name"] != "10.png") is pasted
        assert bool((result["image"] == 20).any()) is pasted


@pytest.mark.parametrize("boxes", [[], [[0.0, 0, 9, 2]]], ids=["no box", "a box wider than the image"])
def test_where_nothing_can_be_pasted_the_sample_stays(boxes):
    first = sample(10, [[0.0, 0, 4, 4]])
    with seeded(0):
        result = make_paste()(first, lambda: sample(20, boxes, size=(8, 10)))
    assert result is first


def test_boxes_are_pasted_into_an_image_without_boxes():
    with seeded(0):
        result = make_paste()(sample(10), lambda: sample(20, [[0.0, 0, 3, 2]]))
    (box,) = boxes_of(result)
    assert (box[2] - box[0], box[3] - box[1]) == (3, 2)


def test_boxes_of_random_mixtures_show_their_own_pixels():
    """Each box is of one colour on a background of another, whatever is drawn."""
    generator = torch.Generator().manual_seed(0)

    def bright():
        height, width = torch.randint(20, 60, (2,), generator=generator).tolist()
        top, left = int(height * 0.3), int(width * 0.2)
        x = sample(0, [[left, top, width - 5, height - 4]], size=(height, width))
        x["image"][:, top : height - 4, left : width - 5] = 200
        return x

    mosaic = make_mosaic(fill=(0,), min_visible=0.0)
    for seed, mix in itertools.product(range(20), (mosaic, make_paste(max_covered=1.0))):
        with seeded(seed):
            mixed = mix(bright(), bright)
        shown = torch.zeros_like(mixed["image"])
        for x0, y0, x1, y1 in boxes_of(mixed):
            shown[:, int(y0) : int(y1), int(x0) : int(x1)] = 200
        assert torch.equal(mixed["image"], shown)


@pytest.fixture
def crowded(coco_dataset):
    """Six images: one without a box, one with an ignored region."""
    data = coco_dataset(images=6, size=64)
    content = json.loads(data.annotations.read_text())
    content["annotations"] = content["annotations"][3:]
    content["annotations"][0]["iscrowd"] = 1
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    return {"DATASETS__TRAIN": (data.name,), "DATALOADER__FILTER_EMPTY_ANNOTATIONS": False}


def samples(cfg, start: int, stop: int) -> list[dict]:
    loader = FocalTrainer.build_train_loader(cfg)
    loader.start_at(start * cfg.SOLVER.IMS_PER_BATCH)
    return [x for batch in itertools.islice(loader, stop - start) for x in batch]


def are_equal(a: dict, b: dict) -> bool:
    tensors = [
        (x["image"], x["instances"].gt_boxes.tensor, x["instances"].gt_classes, x["ignored_boxes"])
        for x in (a, b)
    ]
    return a["file_name"] == b["file_name"] and all(map(torch.equal, *tensors))


@each_kind
def test_workers_ranks_and_starts_change_nothing(crowded, monkeypatch, on):
    cfg = make_cfg(**crowded, **on, INPUT__FOCAL__BRIGHTNESS=0.5, INPUT__FOCAL__VERTICAL_FLIP=True)
    whole = samples(cfg, 0, 4)
    assert sum(" (" in x["file_name"] for x in whole) >= 6
    cfg.DATALOADER.NUM_WORKERS = 2
    assert all(map(are_equal, samples(cfg, 1, 4), whole[2:]))
    cfg.DATALOADER.NUM_WORKERS = 0
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda r=rank: r)
        assert all(map(are_equal, samples(cfg, 0, 4), whole[rank::2]))


def test_a_resumed_loader_goes_on_with_the_same_samples(crowded):
    cfg = make_cfg(**{**crowded, **MOSAIC, **PASTE})
    first, resumed = (FocalTrainer.build_train_loader(cfg) for _ in range(2))
    batches = iter(first)
    next(batches)
    first.count_batch()
    assert resumed.load_state_dict(first.state_dict()) == []
    for expected, batch in itertools.islice(zip(batches, resumed, strict=False), 2):
        assert all(map(are_equal, expected, batch))


def test_nothing_is_mixed_in_the_last_share_of_iterations(crowded):
    settings = {**crowded, "SOLVER__MAX_ITER": 5}
    plain = samples(make_cfg(**settings), 0, 5)
    mosaics = samples(make_cfg(**settings, **{**MOSAIC, "INPUT__FOCAL__PLAIN_SHARE": 0.5}), 0, 5)
    # Two of five iterations, of two images each.
    assert ["mosaic" in x["file_name"] for x in mosaics] == [True] * 4 + [False] * 6
    assert all(map(are_equal, mosaics[4:], plain[4:]))


def test_a_probability_is_a_share_of_the_samples(crowded):
    half = samples(make_cfg(**crowded, **{**MOSAIC, "INPUT__FOCAL__MOSAIC__PROBABILITY": 0.5}), 0, 8)
    assert 4 < sum("mosaic" in x["file_name"] for x in half) < 12


@pytest.mark.parametrize(
    "settings",
    [
        {"INPUT__FORMAT": "L"},
        {"INPUT__FORMAT": "L", "MODEL__PIXEL_MEAN": [100.0], "MODEL__PIXEL_STD": [1.0]},
        {"INPUT__FORMAT": "HSV"},
        {"INPUT__FORMAT": "YUV-BT.601"},
        {"INPUT__FOCAL__BACKEND": "opencv"},
        {"INPUT__FOCAL__BOX_CROP__SIZE": [40, 50]},
        {"INPUT__CROP__ENABLED": True, "INPUT__CROP__TYPE": "absolute", "INPUT__CROP__SIZE": [33, 20]},
    ],
)
@each_kind
def test_samples_have_the_size_and_type_of_the_first_image(crowded, settings, on):
    cfg = make_cfg(**crowded, **settings)
    mixed_cfg = make_cfg(**crowded, **settings, **on)
    pairs = list(zip(samples(cfg, 0, 3), samples(mixed_cfg, 0, 3), strict=True))
    for plain, mixed in pairs:
        assert mixed["image"].shape == plain["image"].shape
        assert mixed["image"].dtype == plain["image"].dtype
        assert plain.keys() == mixed.keys()
        height, width = mixed["instances"].image_size
        boxes = torch.cat([mixed["instances"].gt_boxes.tensor, mixed["ignored_boxes"]])
        assert ((boxes >= 0) & (boxes <= torch.tensor([width, height]).repeat(2))).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert not all(torch.equal(a["image"], b["image"]) for a, b in pairs)


@pytest.mark.parametrize("on, name", [(MOSAIC, "MOSAIC"), (PASTE, "COPY_PASTE")], ids=["mosaic", "paste"])
def test_what_has_more_than_boxes_is_refused(on, name):
    with pytest.raises(UserError, match=f"INPUT.FOCAL.{name} knows boxes only: MODEL.MASK_ON must be False"):
        build_mixing(make_cfg(**on, MODEL__MASK_ON=True), [{}])
    with pytest.raises(UserError, match=f"INPUT.FOCAL.{name} .* DATASETS.TRAIN has semantic segmentation"):
        build_mixing(make_cfg(**on), [{"sem_seg_file_name": "x.png"}])
    with pytest.raises(UserError, match=r"INPUT.FOCAL.MOSAIC.SCALE is \[0.5, 2.0\]; it must be a list of 2"):
        FocalTrainer.build_train_loader(make_cfg(**on, INPUT__FOCAL__MOSAIC__SCALE=[0.5, 2.0]))


def test_images_without_annotations_are_refused(crowded):
    cfg = make_cfg(**crowded, **MOSAIC)
    mix = build_mixing(cfg, [{}])
    with pytest.raises(UserError, match="mosaic.png has no annotations, which INPUT.FOCAL.MOSAIC and C"):
        mix({"image": torch.zeros(1, 2, 2), "file_name": "mosaic.png"}, lambda _: sample(1))


def test_boxes_are_pasted_from_images_that_have_one(crowded):
    cfg = make_cfg(**crowded, **PASTE)
    names = {x["file_name"].partition(" (pasted from ")[2][-6:-1] for x in samples(cfg, 0, 20)}
    # The first image has no box. Each of the others is drawn sooner or later.
    assert names - {""} == {f"{i}.png" for i in range(1, 6)}


def test_what_is_pasted_is_at_most_so_many_boxes(crowded):
    cfg = make_cfg(**crowded, **PASTE, INPUT__FOCAL__COPY_PASTE__BOXES=1)
    plain = samples(make_cfg(**crowded), 0, 4)
    more = [len(a["instances"]) - len(b["instances"]) for a, b in zip(samples(cfg, 0, 4), plain, strict=True)]
    # One, and what else its window shows.
    assert 1 <= max(more) <= 3
    assert min(more) >= 0


def test_nothing_is_mixed_by_default():
    assert build_mixing(make_cfg(), [{}]) is None
