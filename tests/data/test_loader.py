from __future__ import annotations

import gc
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.structures import BoxMode
from torch.utils.data import Dataset

from focal_d2 import UserError
from focal_d2.data import FocalDatasetMapper, register_datasets
from focal_d2.data.loader import Content, TrainingBatches, build_training_loader, content_of
from focal_d2.data.sampling import (
    build_sampler,
    repeat_factors,
    training_records,
)
from focal_d2.data.seeding import random_state
from focal_d2.engine import FocalTrainer
from focal_d2.ops.common import ANY_CLASS
from tests.conftest import make_cfg


@pytest.fixture
def cfg(coco_dataset):
    data = coco_dataset(images=6, size=64)
    register_datasets([data.entry])
    return make_cfg(DATASETS__TRAIN=(data.name,))


def crowded(annotations: list[dict]) -> list[dict]:
    return [{**x, "iscrowd": 1} for x in annotations]


@pytest.fixture
def mixed(coco_dataset):
    """Six images; the first has no box, the second crowds only, the last two lack class 2."""
    data = coco_dataset(images=6)
    content = json.loads(data.annotations.read_text())
    boxes = content["annotations"]  # three of each image
    content["annotations"] = [*crowded(boxes[3:6]), *boxes[6:14], *boxes[15:17]]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    return make_cfg(DATASETS__TRAIN=(data.name,))


@pytest.mark.parametrize("left_out, kept, words", [(True, 4, "left out"), (False, 6, "trained on")])
def test_images_without_boxes_are_counted_with_their_key(mixed, caplog, left_out, kept, words):
    mixed.DATALOADER.FILTER_EMPTY_ANNOTATIONS = left_out
    with caplog.at_level(logging.INFO, logger="focal_d2"):
        assert len(training_records(mixed)) == kept
    # detectron2 logs its own histogram where an earlier test has set its logger up.
    assert [x.getMessage() for x in caplog.records if x.name.startswith("focal_d2")] == [
        f"2 of 6 images have no box and are {words} (DATALOADER.FILTER_EMPTY_ANNOTATIONS {left_out})"
    ]


def test_no_image_with_boxes_is_refused(cfg, monkeypatch):
    records = training_records(cfg)
    for record in records:
        record["annotations"] = crowded(record["annotations"])
    monkeypatch.setattr("detectron2.data.DatasetCatalog.get", lambda name: records)
    with pytest.raises(
        UserError, match=r"no image of squares_train has a box: .*FILTER_EMPTY_ANNOTATIONS False"
    ):
        training_records(cfg)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(training_records(cfg)) == 6


def first_files(loader, count: int = 8) -> list[str]:
    batches = itertools.islice(loader, count)
    return [sample["file_name"] for batch in batches for sample in batch]


@pytest.mark.parametrize(
    "section, settings",
    [
        ("DATALOADER", {"SAMPLER_TRAIN": "TrainingSampler"}),
        ("DATALOADER", {"SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "REPEAT_THRESHOLD": 0.9}),
        ("DATALOADER", {"SAMPLER_TRAIN": "RandomSubsetTrainingSampler", "RANDOM_SUBSET_RATIO": 0.5}),
        ("DATASETS", {"SAMPLER_TRAIN": "WeightedTrainingSampler"}),
        ("DATASETS", {"SAMPLER_TRAIN": "WeightedCategoryTrainingSampler"}),
    ],
    ids=lambda x: x if isinstance(x, str) else x["SAMPLER_TRAIN"],
)
@pytest.mark.parametrize("left_out", [True, False])
def test_detectron2s_samplers_draw_as_ever(mixed, section, settings, left_out, monkeypatch):
    mixed.DATALOADER.FILTER_EMPTY_ANNOTATIONS = left_out
    for key, value in settings.items():
        mixed.DATALOADER[key] = value
    if section == "DATASETS":
        mixed.DATASETS.TRAIN_REPEAT_FACTOR = [(mixed.DATASETS.TRAIN[0], 2.5)]
    monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda: mixed.SEED)
    expected = first_files(build_detection_train_loader(mixed, mapper=FocalDatasetMapper(mixed, True)))
    assert first_files(FocalTrainer.build_train_loader(mixed)) == expected


def test_weights_of_unknown_datasets_are_refused(mixed):
    mixed.DATASETS.TRAIN_REPEAT_FACTOR = [("elsewhere", 2.0)]
    mixed.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    with pytest.raises(UserError, match="DATASETS.TRAIN_REPEAT_FACTOR names elsewhere, which"):
        FocalTrainer.build_train_loader(mixed)


def test_class_balanced_training_is_logged_and_seeded(mixed, caplog):
    mixed.DATALOADER.SAMPLER_TRAIN = "ClassBalancedSampler"
    with caplog.at_level(logging.INFO, logger="focal_d2"):
        runs = []
        for mixed.SEED in (3, 3, 4):
            runs.append(first_files(FocalTrainer.build_train_loader(mixed)))
    assert runs[0] == runs[1] != runs[2]
    # Of 4 images all show classes 0 and 1, two show class 2: 1/3 * (2/4 + 2/4 + 1) = 2/3 of what is drawn.
    assert (
        "ClassBalancedSampler: share of images that show a class, most changed of 3: class2 50.00% to 66.67%"
        in caplog.messages
    )


def pixels(loader, start: int, count: int) -> list[torch.Tensor]:
    return [x["image"] for batch in itertools.islice(loader, start, start + count) for x in batch]


@pytest.mark.parametrize("sampler", ["TrainingSampler", "ClassBalancedSampler"])
def test_workers_and_starts_change_nothing(mixed, sampler):
    """Grouping by aspect ratio, which was in the order in which workers end, is on."""
    mixed.DATALOADER.SAMPLER_TRAIN = sampler
    mixed.INPUT.FOCAL.BRIGHTNESS = 0.5
    whole = pixels(FocalTrainer.build_train_loader(mixed), 0, 6)
    assert not torch.equal(whole[0], whole[8])
    for workers, start in ((0, 0), (2, 0), (0, 3), (2, 4)):
        mixed.DATALOADER.NUM_WORKERS = workers
        loader = FocalTrainer.build_train_loader(mixed)
        loader.start_at(start * mixed.SOLVER.IMS_PER_BATCH)
        again = pixels(loader, 0, 6 - start)
        assert len(again) == len(whole[2 * start :])
        assert all(map(torch.equal, again, whole[2 * start :]))


def test_loading_leaves_the_generators_alone(mixed):
    mixed.INPUT.FOCAL.BRIGHTNESS = 0.5
    for mixed.DATALOADER.NUM_WORKERS in (0, 1):
        loader = FocalTrainer.build_train_loader(mixed)
        before = random_state()
        pixels(loader, 0, 2)
        after = random_state()
        assert torch.equal(before["torch"], after["torch"])
        assert torch.equal(before["numpy"][1], after["numpy"][1])
        assert before["numpy"][2:] == after["numpy"][2:]
        assert before["python"] == after["python"]


@pytest.mark.parametrize("wide", [None, np.array([True, False] * 4)], ids=["mixed", "grouped"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_part_the_batches_of_one(monkeypatch, wide, ranks):
    def batches(count: int) -> list[list[tuple[int, int]]]:
        return list(itertools.islice(TrainingBatches(TrainingSampler(8, seed=1), images=4, wide=wide), count))

    whole = batches(20)
    assert all(len(batch) == 4 for batch in whole)
    if wide is None:
        assert [draw for batch in whole for draw, _ in batch] == list(range(80))
    else:
        assert all(len({bool(wide[image]) for _, image in batch}) == 1 for batch in whole)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda r=rank: r)
        assert batches(20) == [batch[rank::ranks] for batch in whole]


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_have_seeds_for_their_losses_of_the_draw_alone(mixed, monkeypatch, workers):
    mixed.DATALOADER.NUM_WORKERS = workers
    mixed.SOLVER.IMS_PER_BATCH = 4

    def seeds(batches, start=0):
        loader = FocalTrainer.build_train_loader(mixed)
        loader.start_at(start)
        return [[x["sampling_seed"] for x in batch] for batch in itertools.islice(loader, batches)]

    whole = seeds(4)
    assert len({x for batch in whole for x in batch}) == 16
    assert seeds(2, start=8) == whole[2:]
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda r=rank: r)
        assert seeds(4) == [batch[rank::2] for batch in whole]
    mixed.SEED += 1
    assert seeds(4) != [batch[rank::2] for batch in whole]


def test_grouping_needs_sizes(mixed, monkeypatch):
    record = {"file_name": "a.png", "image_id": 0, "annotations": []}
    monkeypatch.setattr("detectron2.data.DatasetCatalog.get", lambda name: [record])
    mixed.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    with pytest.raises(UserError, match="ASPECT_RATIO_GROUPING is True, but some records .* have no width"):
        FocalTrainer.build_train_loader(mixed)


def test_repeat_factors_are_logged(mixed, caplog):
    mixed.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    records = training_records(mixed)
    with caplog.at_level(logging.INFO, logger="focal_d2"):
        assert isinstance(build_sampler(mixed, records, seed=1), RepeatFactorTrainingSampler)
        mixed.DATALOADER.REPEAT_THRESHOLD = 1.0
        build_sampler(mixed, records, seed=1)
    first, second = (x.partition(": ")[2] for x in caplog.messages if "RepeatFactor" in x)
    assert first == "each class is shown as often as without it"
    # Class 2 is in half of the images, which are repeated sqrt(1 / 0.5) times: 1.414 / 2.414.
    assert second == "share of images that show a class, most changed of 3: class2 50.00% to 58.58%"


def content(folder, images, **changes) -> Content:
    boxes = [{"bbox": [1.0, 2.0, 3.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}]
    record = {"height": 30, "width": 40, "annotations": boxes, **changes}
    return content_of([{**record, "file_name": str(folder / name)} for name in images], [str(folder)])


def test_content_is_the_same_where_data_were_moved(tmp_path):
    before = content(tmp_path / "a", ["x/1.png", "2.png"])
    assert content(tmp_path / "b/c", ["x/1.png", "2.png"]) == before
    other_images = [
        content(tmp_path / "a", ["x/1.png", "3.png"]),
        content(tmp_path / "a", ["2.png", "x/1.png"]),  # in another order other ones are drawn
        content(tmp_path / "a", ["x/1.png"]),
        content(tmp_path / "a", ["x/1.png", "2.png"], width=41),
    ]
    assert all(found.image_content != before.image_content for found in other_images)
    box = {"bbox": [1.0, 2.0, 3.0, 4.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    for changed in ([], [{**box, "bbox": [1.0, 2.0, 3.0, 5.0]}], [{**box, "category_id": 1}], [box, box]):
        found = content(tmp_path / "a", ["x/1.png", "2.png"], annotations=changed)
        assert found.image_content == before.image_content
        assert found.annotation_content != before.annotation_content


def test_content_takes_arrays_and_images_outside_of_all_folders(tmp_path):
    boxes = [{"bbox": np.float32([1, 2, 3, 4]), "mask": b"rle", "category_id": np.int64(2), "any": object}]
    found = content(tmp_path / "a", ["1.png"], annotations=boxes)
    assert (
        content(tmp_path / "a", ["1.png"], annotations=[{**boxes[0], "bbox": np.float32([1, 2, 3, 5])}])
        != found
    )
    records = [{"file_name": f"{{}}/{name}"} for name in ("1.png", "x/2.png")]
    here, there = (
        [{"file_name": r["file_name"].format(root)} for r in records] for root in ("/one", "/t/wo")
    )
    assert content_of(here, ["/elsewhere"]) == content_of(there, ["/elsewhere"])


def test_loader_knows_the_folder_of_its_images(coco_dataset):
    contents = []
    for name in ("one", "two"):
        data = coco_dataset(name, images=3)
        register_datasets([data.entry])
        cfg = make_cfg(DATASETS__TRAIN=(data.name,), SEED=1)
        contents.append(build_training_loader(cfg, mapper=None).content)
    assert contents[0] == contents[1]
    coco = json.loads(data.annotations.read_text())
    coco["annotations"][0]["bbox"][2] += 1
    data.annotations.write_text(json.dumps(coco))
    register_datasets([data.entry])
    edited = build_training_loader(cfg, mapper=None).content
    assert edited.image_content == contents[1].image_content
    assert edited.annotation_content != contents[1].annotation_content


def test_a_region_of_any_class_is_no_class_to_repeat():
    """One region in 100 images would repeat its image 10 times, at a threshold of 1."""
    records = [{"annotations": [{"category_id": 0, "iscrowd": 0}]} for _ in range(100)]
    records[7]["annotations"].append({"category_id": ANY_CLASS, "iscrowd": 1})
    cfg = make_cfg(DATASETS__TRAIN=("program",), DATALOADER__REPEAT_THRESHOLD=1.0)
    assert repeat_factors(cfg, records, "RepeatFactorTrainingSampler").tolist() == [1.0] * 100


@pytest.mark.parametrize("grouped", [False, True])
def test_samples_of_data_that_are_no_list_are_handed_over(mixed, monkeypatch, grouped):
    class Numbers(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return {"number": i, "width": 2, "height": 1}

    def mapper(record):
        # None makes detectron2 draw another one.
        return None if record["number"] == 3 else {**record, "image": torch.full((2,), record["number"])}

    monkeypatch.setattr("detectron2.data.DatasetCatalog.get", lambda name: Numbers())
    mixed.DATALOADER.NUM_WORKERS, mixed.DATALOADER.ASPECT_RATIO_GROUPING = 1, grouped
    batches = list(itertools.islice(build_training_loader(mixed, mapper), 8))
    numbers = {x["number"] for batch in batches for x in batch}
    assert 3 not in numbers
    assert len(numbers) > 4
    assert all((x["image"] == x["number"]).all() for batch in batches for x in batch)


@pytest.fixture
def pinning(monkeypatch):
    """Let PyTorch believe in a GPU; returns the threads that pinned a tensor, and the pinned tensors."""
    pinned = []

    def pin_memory(x):
        copy = x.clone()
        pinned.append((threading.current_thread(), copy))
        return copy

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    return pinned


def images_of(cfg, batches: int) -> list[list[torch.Tensor]]:
    loader = FocalTrainer.build_train_loader(cfg)
    return [[x["image"] for x in batch] for batch in itertools.islice(loader, batches)]


@pytest.mark.parametrize("workers", [0, 1])
def test_images_for_a_gpu_come_from_pinned_memory(cfg, pinning, workers):
    cfg.DATALOADER.NUM_WORKERS = workers
    expected = images_of(cfg, 3)
    assert not pinning
    cfg.MODEL.DEVICE = "cuda"
    images = images_of(cfg, 3)
    copies = {id(copy) for _, copy in pinning}
    for batch, other in zip(images, expected, strict=True):
        assert all(id(x) in copies for x in batch)
        assert all(map(torch.equal, batch, other))
    # With workers another thread does it, while training goes on.
    assert {thread is threading.main_thread() for thread, _ in pinning} == {workers == 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_on_a_gpu_reads_images_from_pinned_memory(cfg, pinning, workers, monkeypatch):
    cfg.DATALOADER.NUM_WORKERS = workers
    expected = [x["image"] for (x,) in FocalTrainer.build_test_loader(cfg, cfg.DATASETS.TRAIN[0])]
    assert not pinning
    cfg.MODEL.DEVICE = "cuda"
    loader = FocalTrainer.build_test_loader(cfg, cfg.DATASETS.TRAIN[0])
    images = [x["image"] for (x,) in loader]
    copies = {id(copy) for _, copy in pinning}
    assert all(id(x) in copies for x in images)
    assert all(map(torch.equal, images, expected))
    if workers:  # a worker that is killed ends the evaluation, as without pinned memory
        batches = iter(loader)
        monkeypatch.setattr(type(batches)._try_get_data, "__defaults__", (0.2,))  # seconds, instead of 5
        os.kill(batches._workers[0].pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="DataLoader worker .* (exited unexpectedly|is killed)"):
            list(batches)


@pytest.mark.parametrize(
    "how, error", [(signal.SIGKILL, "images was killed"), (signal.SIGSTOP, "no batch came in 1 seconds")]
)
def test_workers_that_end_or_hang_are_named_where_memory_is_pinned(cfg, pinning, capfd, how, error):
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FOCAL.TIMEOUT = 2, 1.0
    cfg.MODEL.DEVICE = "cuda"
    batches = iter(FocalTrainer.build_train_loader(cfg))
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, how)
    try:
        list(itertools.islice(batches, 20))
    except UserError as failure:
        message = str(failure)
    assert error in message
    del batches
    gc.collect()  # the error kept the loader's iterator, whose end ends the thread
    for worker in workers:  # after a hang, too, so that PyTorch's thread does not wait for them
        worker.join(timeout=10)
    assert not set(workers) & set(multiprocessing.active_children())
    threads = [x for x in threading.enumerate() if "pin_memory" in x.name]
    for thread in threads:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in threads)
    assert "Traceback" not in capfd.readouterr().err
