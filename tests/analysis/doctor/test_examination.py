from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from focal_d2.analysis.doctor import as_text, examination, examine
from focal_d2.data import pixels
from focal_d2.data.checks.kinds import KINDS, NOTE
from focal_d2.errors import UserError
from tests.analysis.doctor.world import HEIGHT, WIDTH, World


class Fault(NamedTuple):
    plant: Callable[[World], Any]
    code: str
    count: int
    text: str  # in the message or an example
    also: tuple[str, ...] = ()  # what else follows from it


def missing(world):
    Path(world.records["train"][0]["file_name"]).unlink()


def zero_bytes(world):
    Path(world.records["train"][1]["file_name"]).write_bytes(b"")


def truncated(world):
    path = Path(world.records["train"][2]["file_name"]).with_suffix(".jpg")
    Image.open(world.records["train"][2]["file_name"]).save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    world.records["train"][2]["file_name"] = str(path)


def other_size(world):
    path = world.records["train"][3]["file_name"]
    Image.open(path).resize((WIDTH // 2, HEIGHT // 2)).save(path)


def too_large(world):
    record = world.records["test"][5]
    image = Image.open(record["file_name"])
    # The old pixels and a margin: the boxes keep their sizes at training resolution.
    image.crop((0, 0, WIDTH, HEIGHT + 1)).save(record["file_name"])
    record["height"] += 1
    world.settings["INPUT__FOCAL__MAX_PIXELS"] = WIDTH * HEIGHT


def turned(world):
    path = Path(world.records["test"][0]["file_name"]).with_suffix(".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    Image.open(world.records["test"][0]["file_name"]).save(path, exif=exif)
    world.records["test"][0]["file_name"] = str(path)


def duplicate_image(world):
    world.add_box(world.add_image("train", like=world.records["train"][4]), [3, 20, 38, 40])


def leak(world):
    source = Path(world.records["train"][5]["file_name"])
    copy = Path(world.records["test"][1]["file_name"]).with_suffix(".bmp")
    Image.open(source).save(copy)
    world.records["test"][1]["file_name"] = str(copy)


def same_path_in_both(world):
    world.records["test"][4]["file_name"] = world.records["train"][5]["file_name"]


def listed_twice(world):
    world.records["train"].append({**world.records["train"][6], "image_id": 99})


def repeated_id(world):
    world.records["test"][3]["image_id"] = world.records["test"][2]["image_id"]


def box(record: int, *boxes: list[float], label: int = 0) -> Callable[[World], None]:
    def plant(world):
        for x in boxes:
            world.add_box(world.records["train"][record], x, label)

    return plant


outside = box(7, [WIDTH, 5, 30, 30])
not_a_number = box(7, [float("nan"), 5, 30, 30])


def label_out_of_range(world):
    world.add_box(world.records["train"][7], [40, 50, 33, 36], 90)


def duplicate_box(world):
    world.add_box(world.records["train"][8], [3, 20, 38, 40], 0)


def two_classes(world):
    world.add_box(world.records["train"][9], [3, 20, 38, 40], 1)


def whole_image(world):
    for record in [*world.records["train"], *world.records["test"]]:
        world.add_box(record, [0, 0, WIDTH, HEIGHT])


def unused(world):
    world.add_class("unicorn")


def not_in_test(world):
    label = world.add_class("eel")
    for record in world.records["train"][:10]:
        world.add_box(record, [4, 55, 36, 36], label)


def not_in_train(world):
    world.add_box(world.records["test"][0], [4, 55, 36, 36], world.add_class("newt"))


def rare(world):
    label = world.add_class("yak")
    world.add_box(world.records["train"][10], [50, 55, 36, 36], label)
    world.add_box(world.records["test"][2], [50, 55, 36, 36], label)


def alike(world):
    label = world.add_class("Cat ")
    for record in [*world.records["train"], world.records["test"][0]]:
        world.add_box(record, [70, 50, 40, 40], label)


def class_order(world):
    world.classes["test"] = [*reversed(world.classes["test"])]


def wrong_num_classes(world):
    world.settings["MODEL__RETINANET__NUM_CLASSES"] = 80


def negatives_dropped(world):
    for _ in range(10):
        world.add_image("train")


def tiny(world):
    for i in range(10):
        world.add_box(world.records["train"][11], [10 * i, 90, 3, 3])


def long(world):
    for record in world.records["train"]:
        world.add_box(record, [1, 85, 126, 8], 0)


def poor_class(world):
    label = world.add_class("pole")
    for record in [*world.records["train"], world.records["test"][0]]:
        world.add_box(record, [60, 2, 17, 80], label)


def low_recall(world):
    for record in world.records["train"]:
        for i in range(3):
            world.add_box(record, [2 + 20 * i, 70, 13, 13], i)


def crowded(world):
    world.settings["TEST__DETECTIONS_PER_IMAGE"] = 3
    for i in range(4):
        world.add_box(world.records["train"][3], [5 + 25 * i, 62, 24, 30])


def small_crops(world):
    world.settings["INPUT__FOCAL__BOX_CROP__SIZE"] = [36, 64]


def learning_rate(world):
    world.settings["SOLVER__BASE_LR"] = 0.0125


def other_detectors_key(world):
    world.settings["MODEL__ROI_HEADS__NUM_CLASSES"] = 3


def rewrite(name: str, convert: Callable[..., list[float]]) -> Callable[[World], None]:
    def plant(world):
        for record in world.add_dataset(name):
            for annotation in record["annotations"]:
                annotation["bbox"] = convert(*annotation["bbox"])

    return plant


def in_both(world):
    world.settings["DATASETS__TEST"] = ("test", "train")


def validated_and_tested(world):
    world.settings["DATASETS__VAL"] = ("test",)


def no_boxes(world):
    for record in world.records["test"]:
        record["annotations"] = []


FAULTS = {
    "missing image": Fault(missing, "image-missing", 1, "1 of 12 (8.3 %) image files"),
    "zero-byte image": Fault(zero_bytes, "image-unreadable", 1, "train_1.png: empty file"),
    "truncated JPEG": Fault(truncated, "image-unreadable", 1, "truncated"),
    "another size": Fault(other_size, "image-size", 1, "annotated as 128 × 96, is 64 × 48"),
    "above MAX_PIXELS": Fault(
        too_large, "image-too-large", 1, "more pixels than INPUT.FOCAL.MAX_PIXELS 12288",
        also=("image-unreadable",),
    ),
    "turned by EXIF": Fault(turned, "image-size", 1, "is 96 × 128: height and width swapped"),
    "image twice, as two files": Fault(duplicate_image, "image-duplicate", 1, "train_4.png"),
    "image on both sides, re-encoded": Fault(leak, "image-leak", 1, "train_5.png of train"),
    "file on both sides": Fault(same_path_in_both, "image-leak", 1, "the same file is in train"),
    "file listed twice": Fault(listed_twice, "image-repeated", 1, "2 times"),
    "image id twice": Fault(repeated_id, "image-id-repeated", 1, "id 2"),
    "dataset on both sides": Fault(in_both, "dataset-in-both", 12, "learnt by heart"),
    "dataset to validate and to test on": Fault(
        validated_and_tested, "image-in-val-and-test", 6, "6 of 6 images to validate on"
    ),
    "no box to test on": Fault(
        no_boxes, "dataset-empty", 1, "none of 6 images", also=("class-not-in-test",)
    ),
    "zero width": Fault(box(7, [5, 5, 0, 30]), "box-degenerate", 1, "box 5 5 0 30"),
    "negative height": Fault(box(7, [5, 50, 30, -9]), "box-degenerate", 1, "box 5 50 30 -9"),
    "not a number": Fault(not_a_number, "box-degenerate", 1, "box nan 5 30 30"),
    "outside": Fault(outside, "box-outside", 1, "box 128 5 30 30"),
    "beyond the edge": Fault(
        box(7, [WIDTH - 30, 50, 38, 38]), "box-beyond-edge", 1, "1 of 37 (2.7 %) boxes reach beyond"
    ),
    "same box twice": Fault(duplicate_box, "box-duplicate", 1, "box 3 20 38 40"),
    "same box, other class": Fault(two_classes, "box-two-classes", 1, "box 3 20 38 40"),
    "boxes as large as images": Fault(whole_image, "box-whole-image", 12, "12 of 12 images"),
    "label not below K": Fault(label_out_of_range, "class-index", 1, "label 90"),
    "class without a box": Fault(unused, "class-unused", 1, "unicorn"),
    "class not in test": Fault(not_in_test, "class-not-in-test", 1, "eel"),
    "class not in train": Fault(not_in_train, "class-not-in-train", 1, "newt"),
    "class of one box": Fault(rare, "class-rare", 1, "yak (1)"),
    "class written in two ways": Fault(alike, "class-alike", 1, '"Cat ", "cat"'),
    "classes in another order": Fault(class_order, "class-names", 1, 'in train it is "cat"'),
    "wrong NUM_CLASSES": Fault(wrong_num_classes, "class-count", 3, " classes, but"),
    "tiny boxes": Fault(tiny, "box-tiny", 10, "10 of 46 (21.7 %)", also=("anchor-recall",)),
    "long boxes": Fault(long, "box-long", 12, "126.0 × 8.0 pixels", also=("anchor-recall",)),
    "class without anchors": Fault(
        poor_class, "anchor-recall-class", 1, "pole (12 of 12)", also=("anchor-recall",)
    ),
    "boxes without anchors": Fault(low_recall, "anchor-recall", 36, "36 of 72 (50.0 %)"),
    "images without boxes dropped": Fault(negatives_dropped, "negatives-dropped", 10, "10 of 22 (45.5 %)"),
    "more boxes than detections": Fault(
        crowded, "boxes-above-limit", 1, "more boxes than TEST.DETECTIONS_PER_IMAGE 3"
    ),
    "crops smaller than boxes": Fault(small_crops, "box-cropped", 36, "too small for 36 of 36 boxes"),
    "learning rate 10 times off": Fault(learning_rate, "learning-rate", 1, "0.0125 is 10 times the 0.00125"),
    "key of another detector": Fault(other_detectors_key, "key-unread", 1, "ROI_HEADS.NUM_CLASSES is 3"),
    "corners as sizes": Fault(
        rewrite("xyxy", lambda x, y, w, h: [x, y, x + w, y + h]), "box-format", 12, "(XYXY)"
    ),
    "x and y swapped": Fault(
        rewrite("yx", lambda x, y, w, h: [y, x, h, w]), "box-format", 12, "x and y swapped"
    ),
    "centres as corners": Fault(
        rewrite("centre", lambda x, y, w, h: [x + w / 2, y + h / 2, w, h]), "box-format", 12, "centre x"
    ),
    "relative as pixels": Fault(
        rewrite("share", lambda x, y, w, h: [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]), "box-format", 36,
        "within [0, 1]",
    ),
}  # fmt: skip


def serious(report):
    return {finding.code for finding in report.findings if finding.severity != NOTE}


def found(report, fault):
    return [
        finding
        for finding in report.findings
        if finding.code == fault.code
        and finding.count == fault.count
        and any(fault.text in text for text in (finding.message, *map(str, finding.examples)))
    ]


def test_a_good_dataset_gives_no_alarm(tmp_path):
    report = World(tmp_path).examine()
    assert not serious(report)
    assert report.healthy


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_and_nothing_else(name, tmp_path):
    fault, world = FAULTS[name], World(tmp_path)
    fault.plant(world)
    report = world.examine()
    assert found(report, fault), [(f.code, f.count, f.message, f.examples) for f in report.findings]
    assert serious(report) == {fault.code, *fault.also}
    assert report.healthy is ("error" not in {KINDS[code].severity for code in serious(report)})


def test_faults_do_not_hide_each_other(tmp_path):
    world = World(tmp_path)
    # The others leave nothing to find on one side.
    planted = [fault for fault in FAULTS.values() if fault.plant not in (no_boxes, in_both)]
    for fault in planted:
        fault.plant(world)
    report = world.examine()
    assert {fault.code for fault in planted} <= serious(report)
    text = as_text(report)
    # The other ones' texts have totals, which differ here.
    named = [fault.text for fault in planted if "of" not in fault.text.split()]
    assert len(named) > 20
    assert not [x for x in named if x not in text]


def test_an_item_that_cannot_be_read_hides_no_other_fault(tmp_path, monkeypatch):
    world = World(tmp_path)
    cfg, load = world.config(), examination.load_table
    outside(world)

    def load_with_problem(name):
        return replace(load(name), problems=["annotations[3] (id 4) has the bbox [1, 2, -3, 4]"])

    monkeypatch.setattr(examination, "load_table", load_with_problem)
    report = examine(cfg, world.model(), decode=False)
    assert serious(report) == {"item-unreadable", "box-outside"}
    assert "annotations[3] (id 4)" in as_text(report)


def test_a_dataset_that_cannot_be_read_hides_no_other(tmp_path):
    world = World(tmp_path)
    world.settings["DATASETS__TEST"] = ("test", "broken", "nowhere")
    outside(world)

    def load():
        raise UserError("broken.json: not readable as JSON")

    DatasetCatalog.register("broken", load)
    report = world.examine()
    assert serious(report) == {"dataset-unreadable", "box-outside"}
    messages = [f.message for f in report.findings if f.code == "dataset-unreadable"]
    assert messages[0] == "broken.json: not readable as JSON"
    assert messages[1].startswith('DATASETS.TEST: dataset "nowhere" is not registered; registered: ')


def test_nothing_to_examine_is_said(tmp_path):
    world = World(tmp_path)
    world.records["train"] = []
    report = world.examine()
    assert "dataset-empty" in serious(report)
    assert report.anchors is None
    assert report.memory is None
    assert "no images in it" in as_text(report)


def test_notes_are_no_alarm(tmp_path):
    world = World(tmp_path)
    world.add_box(world.records["train"][0], [60, 70, 30, 20], crowd=1)
    world.add_image("train")
    report = world.examine(decode=False)
    assert not serious(report)
    notes = {finding.code: finding.message for finding in report.findings}
    assert notes["boxes-ignored"] == "1 of 37 (2.7 %) boxes are crowds or difficult objects"
    assert notes["images-without-boxes"] == "1 of 13 (7.7 %) images have no box and are left out of training"
    assert "images-unchecked" in notes


@pytest.mark.parametrize(("backend", "reader"), [("pil", "read_with_pillow"), ("opencv", "read_pixels")])
def test_images_are_read_as_training_reads_them(backend, reader, tmp_path, monkeypatch):
    world = World(tmp_path)
    world.settings["INPUT__FOCAL__BACKEND"] = backend

    def read(file_name, image_format, *, max_pixels):
        raise OSError(f"read by {reader}")

    monkeypatch.setattr(pixels, reader, read)
    assert f"read by {reader}" in as_text(world.examine())


def test_report_is_json_without_special_numbers(tmp_path):
    world = World(tmp_path)
    not_a_number(world)
    result = json.loads(json.dumps(world.examine().as_dict(), allow_nan=False))
    assert result["errors"] == 1
    assert result["datasets"][0] == {
        "name": "train", "use": "train", "images": 12, "without_boxes": 0, "boxes": 37, "ignored": 0,
        "classes": {"cat": 12, "dog": 12, "owl": 12},  # one more cat has no area
    }  # fmt: skip
    assert result["findings"][0]["examples"][0]["box"] == [None, 5, 30, 30]
