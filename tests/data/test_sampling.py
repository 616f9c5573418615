from __future__ import annotations

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from focal_d2 import UserError
from focal_d2.annotations import Table
from focal_d2.data import register_datasets
from focal_d2.data.sampling import (
    ClassBalancedSampler,
    check_sampler,
    class_balanced_weights,
    describe_shares,
    image_classes,
    repeat_factors,
    training_records,
)
from focal_d2.ops.common import ANY_CLASS
from tests.conftest import make_cfg

# 8 images: class 0 in five, class 2 in two, class 5 in one; two have none.
CLASSES = [np.array(x, dtype=np.int64) for x in ([0], [0], [0], [0, 2], [0, 5], [2], [], [])]


def draw(classes: list[np.ndarray], count: int, seed: int = 0) -> list[int]:
    return list(itertools.islice(ClassBalancedSampler(classes, seed=seed), count))


def test_every_class_has_its_turn_equally_often():
    classes = [np.array([c]) for c in [0] * 7 + [1] * 3 + [2]]
    drawn = draw(classes, 300)
    for start in range(0, 300, 3):
        assert {classes[i][0] for i in drawn[start : start + 3]} == {0, 1, 2}
    # The 100 turns of class 0 are 14 rounds of its 7 images and 2 more.
    counts = Counter(drawn)
    assert all(counts[i] in (14, 15) for i in range(7))
    assert all(counts[i] in (33, 34) for i in range(7, 10))
    assert counts[10] == 100


def test_shares_by_hand():
    # A quarter has no box: 1/8 each. Of the other 3/4 each class has 1/4, shared by its images.
    rare, middle, common = 1 / 4, 1 / 4 / 2, 1 / 4 / 5
    expected = [common, common, common, common + middle, common + rare, middle, 1 / 8, 1 / 8]
    np.testing.assert_allclose(class_balanced_weights(CLASSES), expected, rtol=1e-12)
    counts = np.bincount(draw(CLASSES, 20_000), minlength=8)
    np.testing.assert_allclose(counts / 20_000, expected, atol=0.01)


@pytest.mark.parametrize("classes", [[[], []], [[3]], [[1], []]], ids=str)
def test_few_images_are_drawn(classes):
    classes = [np.array(x, dtype=np.int64) for x in classes]
    assert set(draw(classes, 100)) == set(range(len(classes)))
    np.testing.assert_allclose(class_balanced_weights(classes), 1 / len(classes))


def test_ranks_share_one_stream(monkeypatch):
    whole = draw(CLASSES, 60)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda r=rank: r)
        parts.append(draw(CLASSES, 30))
    assert [x for pair in zip(*parts, strict=True) for x in pair] == whole


def test_stream_is_its_seeds():
    assert draw(CLASSES, 50, seed=1) == draw(CLASSES, 50, seed=1) != draw(CLASSES, 50, seed=2)


def test_crowds_show_no_class():
    annotations = [{"category_id": 4}, {"category_id": 2, "iscrowd": 0}, {"category_id": 7, "iscrowd": 1}]
    annotations += [annotations[0], {"category_id": ANY_CLASS, "iscrowd": 1}]
    records, cfg = [{"annotations": annotations}, {}], make_cfg(DATASETS__TRAIN=("program",))
    assert [x.tolist() for x in image_classes(cfg, records)] == [[2, 4], []]
    assert [x.tolist() for x in image_classes(cfg, records, with_crowds=True)] == [[2, 4, 7], []]


@pytest.mark.parametrize("drop_empty", [True, False])
@pytest.mark.parametrize("with_crowds", [True, False])
def test_a_table_shows_the_classes_that_its_records_show(coco_dataset, drop_empty, with_crowds, monkeypatch):
    """The first image has no box, the second crowds only, the third a box without area."""
    names = []
    for folder in ("one", "two"):
        data = coco_dataset(folder, images=5)
        content = json.loads(data.annotations.read_text())
        content["annotations"] = content["annotations"][3:]
        for annotation in content["annotations"][:3]:
            annotation["iscrowd"] = 1
        content["annotations"][3]["bbox"][2] = 0
        data.annotations.write_text(json.dumps(content))
        register_datasets([{**data.entry, "KEEP": ["class2", "class0"], "OTHERS": "ignored"}])
        names.append(data.name)
    settings = {"DATALOADER__FILTER_EMPTY_ANNOTATIONS": drop_empty}
    records = training_records(make_cfg(DATASETS__TRAIN=tuple(names), **settings))
    expected = image_classes(make_cfg(DATASETS__TRAIN=("program",)), records, with_crowds=with_crowds)
    monkeypatch.setattr(Table, "records", None)
    shown = image_classes(make_cfg(DATASETS__TRAIN=tuple(names), **settings), with_crowds=with_crowds)
    assert [x.tolist() for x in shown] == [x.tolist() for x in expected]
    assert len(shown) == (6 if drop_empty else 10)


def test_weighted_samplers_make_no_records(coco_dataset, monkeypatch):
    data = coco_dataset(images=6)
    register_datasets([data.entry])
    cfg = make_cfg(DATASETS__TRAIN=(data.name,))
    records = training_records(cfg)
    monkeypatch.setattr(Table, "records", None)
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(cfg.DATASETS.TRAIN[0], 2.5)]
    for name, factor in (("WeightedTrainingSampler", 2.5), ("WeightedCategoryTrainingSampler", 1.0)):
        assert repeat_factors(cfg, records, name).tolist() == [factor] * 6


def test_describe_shares_names_the_most_changed():
    weights = class_balanced_weights(CLASSES)
    # Class 5: 1 of 8 before, 1/20 + 1/4 after. Class 2: 2 of 8, then 1/20 + 1/8 + 1/8. Class 0: 5 of 8, then
    # 5/20 + 1/8 + 1/4, the same.
    assert describe_shares(CLASSES, weights, ["ant", "bee", "cat"]) == (
        "share of images that show a class, most changed of 3: 5 12.50% to 30.00%, cat 25.00% to 30.00%"
    )


def test_describe_shares_names_five_at_most():
    classes = [np.array([c]) for c in range(10) for _ in range(c + 1)]
    line = describe_shares(classes, class_balanced_weights(classes), [])
    assert line.count(" to ") == 5
    assert "most changed of 10: 0 1.82% to 10.00%, 1 3.64% to 10.00%" in line


def test_describe_shares_without_change():
    line = "each class is shown as often as without it"
    assert describe_shares(CLASSES, np.full(8, 1 / 8), []) == line
    assert describe_shares([CLASSES[-1]], np.ones(1), []) == line


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"SAMPLER_TRAIN": "Balanced"},
            'DATALOADER.SAMPLER_TRAIN is "Balanced"; legal values: TrainingSampler, '
            "RepeatFactorTrainingSampler, ClassBalancedSampler$",
        ),
        # detectron2 knows it, and lacks the key that it reads.
        ({"SAMPLER_TRAIN": "RandomSubsetTrainingSampler"}, 'SAMPLER_TRAIN is "RandomSubsetTrainingSampler"'),
    ],
)
def test_check_sampler_refuses(settings, message):
    with pytest.raises(UserError, match=message):
        check_sampler(make_cfg(**{f"DATALOADER__{key}": value for key, value in settings.items()}))
