from __future__ import annotations

import itertools
import json
import logging
import os
import pickle
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage
from torch.utils.data import Dataset

from focal_d2 import UserError
from focal_d2.data import FocalDatasetMapper, cache, register_datasets
from focal_d2.data.cache import SharedMemory, Slots, with_cache
from focal_d2.data.loader import build_training_loader
from focal_d2.data.pixels import FORMATS, ImageReader
from focal_d2.data.sampling import training_records
from focal_d2.engine import FocalTrainer
from focal_d2.hardware import free_memory
from tests.conftest import make_cfg
from tests.engine.runs import mounted

IMAGE = 64 * 64 * 3  # bytes of one
MIXED = {"INPUT__FOCAL__MOSAIC__PROBABILITY": 0.5, "INPUT__FOCAL__COPY_PASTE__PROBABILITY": 0.5}


@pytest.fixture
def data(coco_dataset):
    data = coco_dataset(images=6)
    register_datasets([data.entry])
    return data


@pytest.fixture
def settings(data, tmp_path):
    """Keys of make_cfg with a cache of each kind."""
    common = {"DATASETS__TRAIN": (data.name,), "INPUT__FOCAL__BRIGHTNESS": 0.5, **MIXED}
    folder = str(tmp_path / "cache")
    return {
        "": common,
        "ram": {**common, "DATALOADER__FOCAL__CACHE": "ram"},
        "disk": {
            **common,
            "DATALOADER__FOCAL__CACHE": "disk",
            "DATALOADER__FOCAL__CACHE_FOLDER": folder,
        },
    }


each_kind = pytest.mark.parametrize("kind", ["ram", "disk"])


def reader_of(cfg) -> ImageReader:
    return with_cache(cfg, FocalDatasetMapper(cfg, is_train=True), training_records(cfg)).reader


def names_of(cfg) -> list[str]:
    return [x["file_name"] for x in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The names of the images that are decoded, as often as they are."""
    names: list[str] = []
    read = ImageReader.read
    monkeypatch.setattr(ImageReader, "read", lambda self, name: (names.append(name), read(self, name))[1])
    return names


@pytest.fixture(params=["ram", "disk"])
def cfg(request, settings):
    return make_cfg(**settings[request.param])


def test_weights_are_the_same_with_and_without(settings, tmp_path):
    weights = []
    for kind, workers in (("", 0), ("ram", 0), ("ram", 2), ("disk", 2), ("disk", 0)):
        cfg = make_cfg(
            **settings[kind],
            DATALOADER__NUM_WORKERS=workers,
            SOLVER__MAX_ITER=6,
            OUTPUT_DIR=str(tmp_path / "out"),
        )
        torch.manual_seed(0)
        trainer = FocalTrainer(cfg)
        with EventStorage():
            for _ in range(6):
                trainer.run_step()
        weights.append(trainer.loop.bare.state_dict())
    assert len(list((tmp_path / "cache").glob("??/*"))) == 6
    for others in weights[1:]:
        assert all(torch.equal(x, others[name]) for name, x in weights[0].items())


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("backend", ["pil", "opencv"])
@each_kind
def test_pixels_and_their_order_in_memory_are_those_of_the_decoder(
    settings, decoded, kind, backend, image_format
):
    if backend == "opencv" and image_format not in ("BGR", "RGB"):
        return
    settings = {**settings[kind], "INPUT__FORMAT": image_format, "INPUT__FOCAL__BACKEND": backend}
    reader = reader_of(make_cfg(**{**settings, "INPUT__FOCAL__BRIGHTNESS": 0.0}))
    plain = ImageReader(image_format, backend, reader.max_pixels)
    names = [x["file_name"] for x in DatasetCatalog.get(settings["DATASETS__TRAIN"][0])]
    for name in names:
        expected = plain.read(name)
        for _ in range(2):
            image = reader.read(name)
            assert image.dtype == expected.dtype
            assert image.strides == expected.strides
            assert np.array_equal(image, expected)
            if image.flags.writeable:
                image[:] = 0  # what a caller does to it changes nothing
    assert len(decoded) == 6 + 6


def test_each_image_is_decoded_once_also_for_mosaics(cfg, decoded):
    loader = FocalTrainer.build_train_loader(cfg)
    list(itertools.islice(loader, 12))
    assert sorted(decoded) == sorted(names_of(cfg))


def test_all_processes_of_a_machine_share_a_copy(cfg, decoded, monkeypatch):
    """The ranks get the path of the file in memory; workers inherit the reader or unpickle it."""
    first = reader_of(cfg)
    names = names_of(cfg)
    for name in names[:3]:
        first.read(name)
    path = first.cache.memory.path
    monkeypatch.setattr("detectron2.utils.comm.get_local_rank", lambda: 1)
    monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda: 5)
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda x: [None, None, None, None, path, x])
    other_rank = reader_of(cfg)
    worker = pickle.loads(pickle.dumps(other_rank))
    for name in names:
        assert np.array_equal(other_rank.read(name), worker.read(name))
    assert sorted(decoded) == sorted(names)
    assert np.array_equal(first.read(names[5]), worker.read(names[5]))
    assert len(decoded) == 6


def test_memory_is_freed_with_the_reader(settings):
    reader = reader_of(make_cfg(**settings["ram"]))
    path = reader.cache.memory.path
    assert os.path.exists(path)
    del reader
    assert not os.path.exists(path)


def test_a_later_training_decodes_nothing(settings, decoded):
    cfg = make_cfg(**settings["disk"])
    for count in (6, 6):
        reader = reader_of(cfg)
        for name in names_of(cfg):
            reader.read(name)
        assert len(decoded) == count


@pytest.mark.parametrize(
    "change", [{"INPUT__FORMAT": "RGB"}, {"INPUT__FOCAL__BACKEND": "opencv"}], ids=["format", "backend"]
)
def test_another_way_to_decode_takes_other_files(settings, decoded, change):
    name = names_of(make_cfg(**settings["disk"]))[0]
    for more in ({}, change):
        reader_of(make_cfg(**settings["disk"], **more)).read(name)
    assert len(decoded) == 2


def test_a_changed_image_is_decoded_and_a_moved_one_is_not(settings, decoded, data):
    cfg = make_cfg(**settings["disk"])
    (name, other, *_) = names_of(cfg)
    before = reader_of(cfg).read(name).copy()
    times = os.stat(name)
    changed = cv2.imread(name)
    changed[0, 0] += 1
    os.replace(name, other)
    cv2.imwrite(name, changed)
    os.utime(name, ns=(times.st_atime_ns, times.st_mtime_ns))  # the time does not decide
    reader = reader_of(cfg)
    assert np.array_equal(reader.read(other), before)
    assert len(decoded) == 1
    assert np.array_equal(reader.read(name), changed)
    assert len(decoded) == 2


def test_pixels_of_another_annotated_size_are_not_used(settings, data, coco_dataset):
    """Else an image would be read as one of another shape, where training without a cache refuses it."""
    for image in data.images.iterdir():
        cv2.imwrite(str(image), np.zeros((32, 128, 3), np.uint8))
    content = json.loads(data.annotations.read_text())
    for entry, name, size in (("right", "right", (32, 128)), ("wrong", "wrong", (128, 32))):
        for image in content["images"]:
            image["height"], image["width"] = size
        path = data.annotations.with_name(f"{entry}.json")
        path.write_text(json.dumps(content))
        register_datasets([{**data.entry, "NAME": name, "ANNOTATIONS": str(path)}])
        cfg = make_cfg(**{**settings["disk"], "DATASETS__TRAIN": (name,)})
        loader = FocalTrainer.build_train_loader(cfg)
        if name == "right":
            list(itertools.islice(loader, 4))
    with pytest.raises(UserError, match="Mismatched image shape"):
        next(iter(loader))


@pytest.mark.parametrize(
    "damage", [lambda x: x[:-1], lambda x: x + b"0", lambda x: b"0" + x[1:], lambda x: b""]
)
def test_a_damaged_file_is_named_and_written_again(settings, decoded, caplog, damage):
    cfg = make_cfg(**settings["disk"])
    name = names_of(cfg)[0]
    reader = reader_of(cfg)
    expected = reader.read(name).copy()
    (path,) = Path(reader.cache.folder).glob("??/*")
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    for _ in range(2):
        assert np.array_equal(reader_of(cfg).read(name), expected)
    assert len(decoded) == 2
    (line,) = (x for x in caplog.messages if "is damaged (" in x)
    assert line.startswith(f"DATALOADER.FOCAL.CACHE: {path} is damaged (")
    assert path.read_bytes() == whole


def test_files_that_are_removed_during_training_are_written_again(settings, decoded):
    cfg = make_cfg(**settings["disk"])
    name = names_of(cfg)[0]
    reader = reader_of(cfg)
    for count in (1, 1, 2):
        if count == 2:
            next(Path(reader.cache.folder).glob("??/*")).unlink()
        reader.read(name)
        assert len(decoded) == count


def test_two_trainings_write_the_same_file_at_once(settings, monkeypatch):
    cfg = make_cfg(**settings["disk"])
    name = names_of(cfg)[0]
    first, second = reader_of(cfg), reader_of(cfg)
    write_aside, images = cache.write_aside, []

    def write_in_between(path, write, *, shared):
        """While the first one writes, the second one does."""
        monkeypatch.setattr(cache, "write_aside", write_aside)
        write_aside(path, lambda file: (images.append(second.read(name)), write(file)), shared=shared)

    monkeypatch.setattr(cache, "write_aside", write_in_between)
    images += [first.read(name), reader_of(cfg).read(name)]
    assert len(images) == 3
    assert all(np.array_equal(x, images[0]) for x in images)
    assert len(list(Path(first.cache.folder).glob("??/*"))) == 1


def test_a_full_disk_is_one_line_and_training_continues(settings, tmp_path, decoded, caplog):
    with mounted(tmp_path / "small", "64k") as folder:
        cfg = make_cfg(**{**settings["disk"], "DATALOADER__FOCAL__CACHE_FOLDER": str(folder)})
        reader = reader_of(cfg)
        plain = ImageReader("BGR", "pil", 10**6)
        for name in names_of(cfg) * 2:
            assert np.array_equal(reader.read(name), plain.read(name))
        kept = len(list(folder.glob("??/*")))
    assert 0 < kept < 6
    assert len(decoded) == 6 + (6 - kept) + 12
    (line,) = (x for x in caplog.messages if "cannot be kept" in x)
    assert line.endswith("No space left on device); training continues, and no more images are added")


def test_memory_that_is_full_is_one_line(settings, monkeypatch, caplog):
    cfg = make_cfg(**settings["ram"])
    reader = reader_of(cfg)
    write = SharedMemory.write

    def fail(self, buffer, start):
        if memoryview(buffer).nbytes == IMAGE:
            raise OSError(12, "Cannot allocate memory")
        write(self, buffer, start)

    monkeypatch.setattr(SharedMemory, "write", fail)
    for name in names_of(cfg):
        reader.read(name)
    assert [x for x in caplog.messages if "cannot be kept" in x] == [
        "DATALOADER.FOCAL.CACHE: an image cannot be kept (memory: Cannot allocate memory); training "
        "continues, and no more images are added"
    ]


@each_kind
def test_the_size_is_logged_before_training(settings, kind, caplog, tmp_path):
    with caplog.at_level(logging.INFO, logger="focal_d2"):
        reader_of(make_cfg(**settings[kind]))
    where = f" in {tmp_path / 'cache'}" if kind == "disk" else ""
    size = f"6 images, 7.37e-05 GB{where} (DATALOADER.FOCAL.CACHE_GB: at most 8)"
    assert f"DATALOADER.FOCAL.CACHE {kind} keeps {size}" in caplog.messages


@pytest.mark.parametrize("images", [0, 4])
def test_what_exceeds_the_budget_is_decoded_each_time(cfg, decoded, caplog, images):
    cfg.DATALOADER.FOCAL.CACHE_GB = (images + 0.5) * IMAGE / 1e9
    reader = reader_of(cfg)
    (line,) = (x for x in caplog.messages if "keeps" in x)
    assert f"keeps the first {images} of 6 images, {images * IMAGE / 1e9:.3g} GB" in line
    assert line.endswith(
        f"all need 7.37e-05 GB, and DATALOADER.FOCAL.CACHE_GB is {(images + 0.5) * IMAGE / 1e9:g}"
    )
    records = [x["file_name"] for x in training_records(cfg)]
    for name in records * 3:
        reader.read(name)
    assert [decoded.count(name) for name in records] == [1] * images + [3] * (6 - images)


def test_more_than_the_machine_has_is_refused(settings, monkeypatch):
    monkeypatch.setattr(cache, "free_memory", lambda: 70_000)
    with pytest.raises(UserError, match=r"keeps 6 images, 7.37e-05 GB .*, but 7e-05 GB of memory are"):
        reader_of(make_cfg(**settings["ram"]))
    reader_of(make_cfg(**settings["disk"]))


def test_sizes_that_records_lack_are_read_from_headers(cfg, decoded):
    records = [{"file_name": x["file_name"]} for x in training_records(cfg)]
    reader = with_cache(cfg, FocalDatasetMapper(cfg, is_train=True), [*records, *records]).reader
    assert len(reader.cache.slots) == 6
    assert reader.cache.slots.shapes.tolist() == [[64, 64, 3]] * 6
    for record in records * 2:
        reader.read(record["file_name"])
    assert len(decoded) == 6


def test_slots_find_images_by_their_names():
    sizes = {f"{i}.jpg": (i + 1, 2 * i + 1) for i in range(50)}
    slots = Slots.of(sizes, "YUV-BT.601")
    for name, size in sizes.items():
        slot = slots.find(name)
        assert slots.shapes[slot].tolist() == [*size, 3]
        assert slots.byte_counts[slot] == 12 * size[0] * size[1]
    assert slots.find("50.jpg") is None
    assert Slots.of({}, "L").find("a") is None


def test_what_killed_processes_left_is_removed(settings, tmp_path):
    folder = tmp_path / "cache" / "0a"
    folder.mkdir(parents=True)
    names = [f"{'b' * 30}.{'c' * 16}.tmp", f"{'d' * 30}.{'e' * 16}.tmp", f"{'f' * 30}", "notes.tmp"]
    for name in names:
        (folder / name).write_bytes(b"")
        os.utime(folder / name, (0, 0))
    os.utime(folder / names[1], (time.time(), time.time()))
    reader_of(make_cfg(**settings["disk"]))
    assert sorted(x.name for x in folder.iterdir()) == sorted(names[1:])


def test_a_folder_that_cannot_be_used_is_refused(settings, tmp_path):
    disk = settings["disk"]
    (tmp_path / "file").write_text("")
    for folder, line in (
        ("", "CACHE is disk: DATALOADER.FOCAL.CACHE_FOLDER must name a folder"),
        (tmp_path / "file", r"CACHE_FOLDER is .*file, which cannot be used: File exists"),
    ):
        with pytest.raises(UserError, match=line):
            reader_of(make_cfg(**{**disk, "DATALOADER__FOCAL__CACHE_FOLDER": str(folder)}))


def test_what_cannot_be_cached_is_refused(cfg):
    records = training_records(cfg)
    with pytest.raises(UserError, match="CACHE works with FocalDatasetMapper, not with function"):
        build_training_loader(cfg, lambda record: record)
    for other in (None, [{**records[0], "sem_seg_file_name": "a.png"}]):
        with pytest.raises(UserError, match="CACHE needs lists of images with boxes in DATASETS.TRAIN"):
            with_cache(cfg, FocalDatasetMapper(cfg, is_train=True), other)
    masks = cfg.clone()
    masks.MODEL.MASK_ON = True
    with pytest.raises(UserError, match="CACHE knows boxes only: MODEL.MASK_ON must be False"):
        with_cache(masks, FocalDatasetMapper(cfg, is_train=True), records)


def test_data_that_are_no_list_are_refused(cfg):
    class Records(Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, i):
            return {}

    DatasetCatalog.register("no_list", Records)
    cfg.DATASETS.TRAIN = ("no_list",)
    cfg.INPUT.FOCAL.MOSAIC.PROBABILITY = cfg.INPUT.FOCAL.COPY_PASTE.PROBABILITY = 0.0
    with pytest.raises(UserError, match="CACHE needs lists of images"):
        FocalTrainer.build_train_loader(cfg)


def test_a_mapper_that_is_given_stays_as_it_is(cfg):
    mapper = FocalDatasetMapper(cfg, is_train=True)
    cached = with_cache(cfg, mapper, training_records(cfg))
    assert type(mapper.reader) is ImageReader
    again = with_cache(cfg, cached, training_records(cfg))
    assert again.reader.cache is not cached.reader.cache
    cfg.DATALOADER.FOCAL.CACHE = ""
    assert with_cache(cfg, mapper, None) is mapper


def test_free_memory_is_the_least_of_the_machine_and_its_groups(tmp_path):
    assert free_memory(tmp_path) is None
    files = {
        "proc/meminfo": "MemTotal: 100 kB\nMemAvailable:      50 kB\n",
        "proc/self/cgroup": "0::/job/part\n",
        "sys/fs/cgroup/job/memory.max": "40000\n",
        "sys/fs/cgroup/job/memory.current": "30000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 1000\ninactive_file 5000\n",
        "sys/fs/cgroup/job/part/memory.max": "max\n",
    }
    expected = [51_200, 51_200, 51_200, 51_200, 15_000, 15_000]
    for (name, text), free in zip(files.items(), expected, strict=True):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        assert free_memory(tmp_path) == free
