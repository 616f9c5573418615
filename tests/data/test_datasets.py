from __future__ import annotations

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from focal_d2 import UserError
from focal_d2.data import check_datasets, register_coco_datasets
from tests.conftest import make_cfg


def test_register_makes_coco_data_usable_by_name(coco_dataset):
    data = coco_dataset(images=3, classes=2)
    register_coco_datasets([data.entry])
    records = DatasetCatalog.get(data.name)
    assert [len(r["annotations"]) for r in records] == [2, 2, 2]
    assert MetadataCatalog.get(data.name).thing_classes == ["class0", "class1"]


def test_register_again_replaces(coco_dataset):
    first, second = coco_dataset("a", images=1), coco_dataset("b", images=2)
    register_coco_datasets([first.entry])
    register_coco_datasets([{**second.entry, "NAME": first.name}])
    assert len(DatasetCatalog.get(first.name)) == 2


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"NAME": "coco_2017_val"}, "another dataset"),
        ({"FOLDER": "x"}, r"DATASETS.FOCAL\[0\].*ANNOTATIONS, IMAGES, NAME"),
        ({"IMAGES": 3}, "each a text"),
    ],
)
def test_register_refuses(coco_dataset, changes, match):
    with pytest.raises(UserError, match=match):
        register_coco_datasets([{**coco_dataset().entry, **changes}])


def test_check_accepts_what_fits(coco_dataset):
    data = coco_dataset(classes=3)
    register_coco_datasets([data.entry])
    cfg = make_cfg(DATASETS__TRAIN=(data.name,), DATASETS__TEST=(data.name,))
    check_datasets(cfg, training=True)


def test_check_counts_categories_where_nobody_named_classes():
    DatasetCatalog.register("nameless", lambda: [{"annotations": [{"category_id": 4}]}])
    cfg = make_cfg(DATASETS__TEST=("nameless",), MODEL__RETINANET__NUM_CLASSES=3)
    with pytest.raises(UserError, match="has 5 classes.*NUM_CLASSES is 3"):
        check_datasets(cfg, training=False)


def test_check_evaluation_ignores_the_training_set():
    cfg = make_cfg(DATASETS__TRAIN=("no such",), DATASETS__TEST=())
    check_datasets(cfg, training=False)
    with pytest.raises(UserError, match="DATASETS.TRAIN"):
        check_datasets(cfg, training=True)


def test_check_training_needs_data():
    with pytest.raises(UserError, match="DATASETS.TRAIN is empty"):
        check_datasets(make_cfg(DATASETS__TRAIN=()), training=True)
