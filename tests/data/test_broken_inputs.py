"""What hand-made datasets look like: each is read right, or refused in one line that names file and item."""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image, PngImagePlugin

from focal_d2 import UserError
from focal_d2.annotations import Table
from focal_d2.data import FocalDatasetMapper, check_files, load_table, register_datasets
from focal_d2.errors import user_message
from tests.conftest import make_cfg
from tests.data import formats

HEIGHT, WIDTH = 48, 64
BOXES = [[[4.0, 5.0, 10.0, 12.0], [30.0, 20.0, 20.0, 18.0]], [[0.0, 0.0, 64.0, 48.0]], []]
LABELS = [[0, 1], [1], []]
FILES = ("a.jpg", "b.png", "c.png")


def pixels() -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([rows * 5, columns * 3, 255 - rows * 5], axis=2).astype(np.uint8)


class Broken:
    """A good dataset in a folder, for a case to break."""

    def __init__(self, folder: Path, style: str) -> None:
        self.images, self.folder = folder / "images", folder / "annotations"
        self.images.mkdir()
        for name in FILES:
            cv2.imwrite(str(self.images / name), pixels())
        flat = [box for boxes in BOXES for box in boxes]
        self.table = Table(
            classes=("cat", "dog"),
            category_ids=(1, 4),
            file_names=[str(self.images / name) for name in FILES],
            image_ids=np.arange(3),
            sizes=np.full((3, 2), (HEIGHT, WIDTH)),
            image=np.array([0, 0, 1]),
            boxes=np.array(flat),
            labels=np.array([label for labels in LABELS for label in labels]),
            ignored=np.zeros(3, dtype=bool),
            areas=np.prod(np.array(flat)[:, 2:], axis=1),
        )
        self.entry = formats.write(style, self.folder, self.table, self.images)
        self.main = Path(self.entry["ANNOTATIONS"])

    def coco(self, change: Callable[[dict], object]) -> None:
        content = json.loads(self.main.read_text())
        change(content)
        self.main.write_text(json.dumps(content))

    def replace(self, file: str, old: str, new: str) -> None:
        path = self.folder / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def save(self, name: str, image: Image.Image, **options: object) -> None:
        image.save(self.images / name, **options)


def everything(folder: Path) -> list[str]:
    return sorted(os.path.join(f, name) for f, _, names in os.walk(folder) for name in names)


def read(broken: Broken, backend: str = "pil") -> list[dict]:
    """Do what a training run does before its first step, and map every image."""
    register_datasets([broken.entry])
    name = broken.entry["NAME"]
    check_files("DATASETS.TRAIN", name)
    cfg = make_cfg(INPUT__FOCAL__BACKEND=backend, INPUT__RANDOM_FLIP="none")
    mapper = FocalDatasetMapper(cfg, is_train=True)
    return [mapper(record) for record in DatasetCatalog.get(name)]


def annotation(i: int, **changes: object) -> Callable[[Broken], None]:
    return lambda b: b.coco(lambda c: c["annotations"][i].update(changes))


def image(i: int, **changes: object) -> Callable[[Broken], None]:
    return lambda b: b.coco(lambda c: c["images"][i].update(changes))


def content(data: bytes) -> Callable[[Broken], object]:
    return lambda b: b.main.write_bytes(data)


def recode(encoding: str, old: str = "", new: str = "") -> Callable[[Broken], object]:
    return lambda b: b.main.write_bytes(b.main.read_text().replace(old, new).encode(encoding))


def line(number: int, text: str) -> Callable[[Broken], None]:
    """Write line `number` (from 1) of a.txt or of the CSV anew."""

    def change(broken: Broken) -> None:
        path = broken.main if broken.main.is_file() else broken.folder / "a.txt"
        lines = path.read_text().splitlines()
        lines[number - 1] = text
        path.write_text("\n".join(lines))

    return change


def loop(path: Callable[[Broken], Path]) -> Callable[[Broken], None]:
    def change(broken: Broken) -> None:
        target = path(broken)
        target.unlink(missing_ok=True)
        target.symlink_to(target)

    return change


def to_directory(broken: Broken) -> None:
    broken.main.unlink()
    broken.main.mkdir()


def cut(name: str, keep: float) -> Callable[[Broken], object]:
    def change(broken: Broken) -> None:
        path = broken.images / name
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return change


def rename_image(new: str, style: str) -> Callable[[Broken], None]:
    def change(broken: Broken) -> None:
        (broken.images / new).parent.mkdir(exist_ok=True)
        (broken.images / "a.jpg").rename(broken.images / new)
        if style == "coco":
            broken.coco(lambda c: c["images"][0].update(file_name=new))
        elif style == "csv":
            broken.main.write_text(broken.main.read_text().replace("a.jpg", f'"{new}"'))
        elif style == "voc":
            broken.replace("a.xml", "a.jpg", new)
        else:
            target = broken.folder / Path(new).with_suffix(".txt")
            target.parent.mkdir(exist_ok=True)
            (broken.folder / "a.txt").rename(target)

    return change


def rotated(orientation: int, upright: bool) -> Callable[[Broken], None]:
    """a.jpg turned by its EXIF tag; annotated as one sees it, or as it is stored."""

    def change(broken: Broken) -> None:
        exif = Image.Exif()
        exif[274] = orientation
        stored = Image.fromarray(pixels()[:, :, ::-1])
        if upright:
            stored = stored.rotate({6: 90, 8: 270}[orientation], expand=True)
        broken.save("a.jpg", stored, exif=exif, quality=95)

    return change


def entity_bomb(broken: Broken) -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    (broken.folder / "a.xml").write_text(
        f'<!DOCTYPE x [<!ENTITY e0 "boom">{entities}]><annotation><filename>&e11;</filename></annotation>'
    )


def copy_xml(broken: Broken) -> None:
    (broken.folder / "z.xml").write_text((broken.folder / "a.xml").read_text())


def large_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("x", "a" * (2 << 20), zip=True)
    return info


def capitals(broken: Broken) -> None:
    (broken.images / "a.jpg").rename(broken.images / "a.JPG")
    (broken.folder / "a.txt").rename(broken.folder / "a.TXT")


def linked_folders(broken: Broken) -> None:
    for folder in (broken.images, broken.folder):
        elsewhere = folder.parent / f"{folder.name}_elsewhere"
        folder.rename(elsewhere)
        folder.mkdir()
        (folder / "below").symlink_to(elsewhere)
        (elsewhere / "round").symlink_to(folder)


def with_gaps(broken: Broken) -> None:
    lines = broken.main.read_text().splitlines()
    lines = [
        f"{lines[0]},height,width",
        *(f"{x[:-1]}False,{HEIGHT}.0,{WIDTH}.0" for x in lines[1:] if x[-1] == "0"),
    ]
    broken.main.write_text("\n".join([*lines, "c.png,,,,,,,48.0,64.0"]))


# Style, what happened, and what the line says (with the file's name), or None: it is read right.
CASES: dict[str, tuple[str, Callable[[Broken], object], str | None]] = {
    # files
    "coco: missing": ("coco", lambda b: b.main.unlink(), r"annotation file not found: .*annotations\.json"),
    "coco: a folder": ("coco", to_directory, r"annotations\.json: a folder, where a file is needed"),
    "coco: a circle of links": ("coco", loop(lambda b: b.main), r"annotations\.json"),
    "coco: empty": ("coco", content(b""), r"annotations\.json: not readable as JSON"),
    "coco: truncated": (
        "coco",
        lambda b: b.main.write_text(b.main.read_text()[:-40]),
        "not readable as JSON",
    ),
    "coco: null": ("coco", content(b"null"), 'no list "images"'),
    "coco: a list": ("coco", content(b"[]"), 'no list "images"'),
    "coco: a list in a list in …": ("coco", content(b"[" * 100_000), "not readable as JSON"),
    "coco: compressed": (
        "coco",
        lambda b: b.main.write_bytes(gzip.compress(b.main.read_bytes())),
        r"annotations\.json is a gzip archive: unpack it",
    ),
    "coco: UTF-16": ("coco", recode("utf-16"), r"annotations\.json: not UTF-8 text \(byte 0\)"),
    "coco: Latin-1": ("coco", recode("latin-1", "cat", "châat"), "not UTF-8"),
    "coco: BOM": ("coco", recode("utf-8-sig"), None),
    "coco: a comment": (
        "coco",
        lambda b: b.main.write_text("// mine\n" + b.main.read_text()),
        "not readable",
    ),
    # sections
    "coco: no categories": ("coco", lambda b: b.coco(lambda c: c.pop("categories")), 'no list "categories"'),
    "coco: empty categories": (
        "coco",
        lambda b: b.coco(lambda c: c["categories"].clear()),
        r"json: no categories in it",
    ),
    "coco: empty images": ("coco", lambda b: b.coco(lambda c: c["images"].clear()), "no images"),
    "coco: a section is a map": ("coco", lambda b: b.coco(lambda c: c.update(images={})), 'no list "images"'),
    "coco: two names alike": (
        "coco",
        lambda b: b.coco(lambda c: c["categories"][1].update(name="cat")),
        "the name 'cat' is empty or there twice",
    ),
    "coco: other classes": (
        "coco",
        lambda b: b.entry.update(CLASSES=["bird"]),
        r"has the categories cat, dog; none is in CLASSES \(bird\)",
    ),
    "coco: a class is left out": (
        "coco",
        lambda b: b.entry.update(CLASSES=["cat"]),
        r"annotations\[1\] \(id 2\) is of 'dog', not one of cat",
    ),
    # items
    "coco: NaN": ("coco", annotation(1, bbox=[1, 2, float("nan"), 4]), r"annotations\[1\] \(id 2\).*nan"),
    "coco: Infinity": (
        "coco",
        annotation(1, bbox=[1, 2, float("inf"), 4]),
        r"annotations\[1\] \(id 2\).*inf",
    ),
    "coco: 1e999": ("coco", recode("utf-8", "10.0", "1e999"), r"annotations\[0\] \(id 1\).*inf"),
    "coco: far away": ("coco", annotation(0, bbox=[1e30, 2, 3, 4]), r"annotations\[0\].*within \d+ pixels"),
    "coco: negative width": (
        "coco",
        annotation(0, bbox=[1, 2, -3, 4]),
        r"annotations\[0\] \(id 1\).*at least 0",
    ),
    "coco: three numbers": (
        "coco",
        annotation(0, bbox=[1, 2, 3]),
        r"has the bbox \[1, 2, 3\]; it must be \[x, y",
    ),
    "coco: bbox null": ("coco", annotation(0, bbox=None), r"has the bbox None"),
    "coco: bbox of texts": (
        "coco",
        annotation(2, bbox=["1", "2", "3", "4"]),
        r"annotations\[2\] \(id 3\) has the bbox",
    ),
    "coco: no bbox": (
        "coco",
        lambda b: b.coco(lambda c: c["annotations"][1].pop("bbox")),
        r"annotations\[1\] \(id 2\) has no bbox",
    ),
    "coco: id is a text": (
        "coco",
        image(0, id="099"),
        r"images\[0\] \(id '099'\) has the id '099'; it must be a whole",
    ),
    "coco: id is a number as text": ("coco", image(0, id="99"), None),
    "coco: annotation's id is null": ("coco", annotation(1, id=None), None),
    "coco: annotation's id is any text": ("coco", annotation(1, id="box 1"), None),
    "coco: iscrowd null": ("coco", annotation(0, iscrowd=None), None),
    "coco: a mask without bbox": (
        "coco",
        lambda b: (
            b.coco(lambda c: c["annotations"][1].pop("bbox"))
            or annotation(1, segmentation=[[30, 20, 50, 20, 50, 38], [31, 21, 30, 25, 33, 33]])(b)
        ),
        None,
    ),
    "coco: a category twice": (
        "coco",
        lambda b: b.coco(lambda c: c["categories"].append(c["categories"][0])),
        None,
    ),
    "coco: id is true": ("coco", annotation(0, id=True), r"annotations\[0\].*whole number"),
    "coco: id of 70 bits": ("coco", image(0, id=2**70), r"images\[0\].*64 bits"),
    "coco: id of 62 bits": (
        "coco",
        lambda b: b.coco(lambda c: [x.update(id=x["id"] + 2**62) for x in c["annotations"]]),
        None,
    ),
    "coco: image twice": ("coco", image(1, id=99), r"images\[1\] \(id 99\) has the id of an earlier one"),
    "coco: annotation twice": (
        "coco",
        annotation(1, id=1),
        None,
    ),
    "coco: unknown image": ("coco", annotation(0, image_id=77), r"annotations\[0\] \(id 1\).*image_id: 77"),
    "coco: unknown category": ("coco", annotation(0, category_id=2), r"annotations\[0\].*category_id: 2"),
    "coco: category is a text": (
        "coco",
        annotation(0, category_id="cat"),
        r"annotations\[0\].*category_id 'cat'",
    ),
    "coco: annotation is a list": (
        "coco",
        lambda b: b.coco(lambda c: c["annotations"].append([1, 2])),
        r"annotations\[3\] is \[1, 2\]; it must be an object",
    ),
    "coco: no width": ("coco", lambda b: b.coco(lambda c: c["images"][1].pop("width")), None),
    "coco: width 0": ("coco", image(1, width=0), None),
    "coco: width null": ("coco", image(1, width=None), None),
    "coco: width -1": ("coco", image(1, width=-1), r"images\[1\].*the width -1"),
    "coco: width 64.5": ("coco", image(1, width=64.5), r"images\[1\].*64\.5; not whole"),
    "coco: width 64.0": ("coco", image(1, width=64.0), None),
    "coco: width is a text": ("coco", image(1, width="64"), r"images\[1\].*the width '64'"),
    "coco: area null": ("coco", annotation(0, area=None), None),
    "coco: area is a text": ("coco", annotation(0, area="120"), r"annotations\[0\].*the area '120'"),
    "coco: negative area": ("coco", annotation(0, area=-1), r"annotations\[0\] \(id 1\) has the area -1"),
    "coco: iscrowd false": ("coco", annotation(0, iscrowd=False), None),
    "coco: iscrowd is a text": ("coco", annotation(0, iscrowd="no"), r"annotations\[0\].*iscrowd 'no'"),
    "coco: a mask of any kind": ("coco", annotation(0, segmentation={"counts": "x", "size": "?"}), None),
    # paths
    "coco: ..": (
        "coco",
        image(0, file_name="../images/../../a.jpg"),
        r"images\[0\] \(id 99\).*not a path under",
    ),
    "coco: .. that stays": ("coco", image(0, file_name="x/../a.jpg"), None),
    "coco: /": (
        "coco",
        image(0, file_name="/etc/passwd"),
        r"images\[0\].* a file_name that is refused: '/etc/passwd' is not a path",
    ),
    "coco: no name": ("coco", image(0, file_name=""), r"images\[0\].*not a path"),
    "coco: a name with a zero": ("coco", image(0, file_name="a\0.jpg"), r"images\[0\].*not a path"),
    "coco: a name of half a letter": ("coco", image(0, file_name="a\ud800.jpg"), r"images\[0\].*not a path"),
    "coco: spaces and Unicode": ("coco", rename_image("ein Bild – é 図.jpg", "coco"), None),
    "csv: spaces, Unicode, a comma": ("csv", rename_image("ein Bild, é 図.jpg", "csv"), None),
    "voc: spaces and Unicode": ("voc", rename_image("ein Bild é 図.jpg", "voc"), None),
    "yolo: spaces and Unicode": ("yolo", rename_image("im Wald/a é 図.jpg", "yolo"), None),
    "coco: a name of Windows": (
        "coco",
        lambda b: rename_image("x/b.jpg", "coco")(b) or image(0, file_name="x\\b.jpg")(b),
        None,
    ),
    "csv: a name of Windows": (
        "csv",
        lambda b: (
            rename_image("x/b.jpg", "csv")(b)
            or b.main.write_text(b.main.read_text().replace("x/b.jpg", "x\\b.jpg"))
        ),
        None,
    ),
    "coco: a path of another machine": (
        "coco",
        image(0, file_name="/content/data/a.jpg"),
        r"'/content/data/a\.jpg' is not a path under .*NAMES: basename",
    ),
    "coco: a path of another machine, relative": (
        "coco",
        image(0, file_name="data/a.jpg"),
        r"1 of 3 images are missing; .*data/a\.jpg; NAMES: basename",
    ),
    "csv: a path of another machine, relative": (
        "csv",
        line(2, "upload/a.jpg,4,5,14,17,cat,0"),
        r"line 2: cannot read the image .*upload/a\.jpg: No such file.*; NAMES: basename",
    ),
    "coco: its last part": (
        "coco",
        lambda b: (
            image(0, file_name="/content/data/a.jpg")(b)
            or image(1, file_name="..\\..\\upload\\b.png")(b)
            or b.entry.update(NAMES="basename")
        ),
        None,
    ),
    "csv: its last part": (
        "csv",
        lambda b: (
            b.main.write_text(b.main.read_text().replace("a.jpg", "C:\\mine\\a.jpg"))
            and b.entry.update(NAMES="basename")
        ),
        None,
    ),
    "voc: its last part": (
        "voc",
        lambda b: (
            (
                b.replace("a.xml", "a.jpg", "/home/me/a.jpg")
                or (b.folder / "a.xml").replace(b.folder / "q.xml")
            )
            and b.entry.update(NAMES="basename")
        ),
        None,
    ),
    "coco: two last parts alike": (
        "coco",
        lambda b: image(1, file_name="/other/a.jpg")(b) or b.entry.update(NAMES="basename"),
        r"images\[0\] \(id 99\) .*'a\.jpg' has the same last part as '/other/a\.jpg' \(NAMES: basename\)",
    ),
    "coco: two files have the last part": (
        "coco",
        lambda b: (
            b.entry.update(NAMES="basename")
            or (b.images / "x").mkdir()
            or (b.images / "x/a.jpg").write_bytes(b"")
        ),
        r"images\[0\] .*'a\.jpg' means 2 files under .*images: a\.jpg, x/a\.jpg",
    ),
    "coco: image is missing": (
        "coco",
        lambda b: (b.images / "b.png").unlink(),
        r"1 of 3 images are missing; .*b\.png",
    ),
    "coco: image is a circle of links": ("coco", loop(lambda b: b.images / "b.png"), r"missing; .*b\.png"),
    "coco: images are missing": (
        "coco",
        lambda b: b.entry.update(IMAGES=str(b.images / "x")),
        r"3 of 3 images.*x/a\.jpg",
    ),
    # VOC
    "voc: truncated": (
        "voc",
        lambda b: b.replace("a.xml", "</annotation>", ""),
        r"a\.xml: not readable as XML",
    ),
    "voc: empty": ("voc", lambda b: (b.folder / "a.xml").write_bytes(b""), r"a\.xml: not readable as XML"),
    "voc: entities that explode": ("voc", entity_bomb, r"a\.xml: not readable as XML"),
    "voc: Latin-1, declared": (
        "voc",
        lambda b: (b.folder / "a.xml").write_bytes(
            b"<?xml version='1.0' encoding='latin-1'?><!-- \xe9 -->" + (b.folder / "a.xml").read_bytes()
        ),
        None,
    ),
    "voc: Latin-1, not declared": (
        "voc",
        lambda b: (b.folder / "a.xml").write_bytes(b"<!-- \xe9 -->" + (b.folder / "a.xml").read_bytes()),
        r"a\.xml: not readable as XML",
    ),
    "voc: UTF-16": (
        "voc",
        lambda b: (b.folder / "a.xml").write_bytes((b.folder / "a.xml").read_text().encode("utf-16")),
        None,
    ),
    "voc: an unknown encoding": (
        "voc",
        lambda b: b.replace("a.xml", "<annotation>", "<?xml version='1.0' encoding='x-y'?><annotation>"),
        r"a\.xml: not readable as XML",
    ),
    "voc: a corner is a text": (
        "voc",
        lambda b: b.replace("a.xml", "<xmin>5.0<", "<xmin>five<"),
        r'a\.xml: object 1: bndbox has "five" for xmin',
    ),
    "voc: a corner is NaN": (
        "voc",
        lambda b: b.replace("a.xml", "<xmin>5.0<", "<xmin>nan<"),
        r"a\.xml: object 1.*xmin",
    ),
    "voc: corners swapped": (
        "voc",
        lambda b: b.replace("a.xml", "<xmin>5.0<", "<xmin>60<"),
        r"a\.xml: object 1: .*negative width",
    ),
    "voc: no box": (
        "voc",
        lambda b: b.replace("a.xml", "<bndbox>", "<box>") or b.replace("a.xml", "</bndbox>", "</box>"),
        r'a\.xml: object 1: bndbox has "" for xmin',
    ),
    "voc: difficult is a text": (
        "voc",
        lambda b: b.replace("a.xml", "<difficult>0", "<difficult>no"),
        r'object 1: difficult is "no"',
    ),
    "voc: no class": (
        "voc",
        lambda b: b.replace("a.xml", "<name>cat</name>", ""),
        r"a\.xml: object 1: no class name",
    ),
    "voc: another class": (
        "voc",
        lambda b: b.replace("a.xml", "cat", "Cat"),
        r'object 1: the class "Cat" is not one of cat, dog',
    ),
    "voc: size unknown": ("voc", lambda b: b.replace("a.xml", "<width>64<", "<width>0<"), None),
    "voc: size is a text": (
        "voc",
        lambda b: b.replace("a.xml", "<width>64<", "<width>wide<"),
        r"a\.xml: size has .*'wide'",
    ),
    "voc: .. in another file's name": (
        "voc",
        lambda b: (
            b.replace("a.xml", "a.jpg", "../../a.jpg") or (b.folder / "a.xml").rename(b.folder / "q.xml")
        ),
        r"q\.xml: the image '\.\./\.\./a\.jpg' is not a path under .*NAMES: basename",
    ),
    "voc: ..": ("voc", lambda b: b.replace("a.xml", "a.jpg", "../../a.jpg"), None),
    "voc: the image was renamed": ("voc", lambda b: b.replace("a.xml", "a.jpg", "old name.jpg"), None),
    "voc: another ending": (
        "voc",
        lambda b: b.replace("a.xml", "a.jpg", "a.png") or (b.images / "a.jpg").rename(b.images / "a.jfif"),
        None,
    ),
    "voc: a name without ending": ("voc", lambda b: b.replace("a.xml", "a.jpg", "a"), None),
    "voc: two images of the file's name": (
        "voc",
        lambda b: (
            b.replace("a.xml", "a.jpg", "old.jpg")
            or (b.images / "a.JPEG").write_bytes((b.images / "a.jpg").read_bytes())
        ),
        r"a\.xml: <filename> is 'old\.jpg', and 2 images .*: a\.JPEG, a\.jpg",
    ),
    "voc: a name of Windows": (
        "voc",
        lambda b: (
            b.replace("a.xml", "a.jpg", "x\\b.jpg")
            or (b.images / "x").mkdir()
            or (b.images / "a.jpg").rename(b.images / "x/b.jpg")
        ),
        None,
    ),
    "voc: two files, one image": ("voc", copy_xml, r"z\.xml: another file has the annotations of a\.jpg"),
    "voc: no files": (
        "voc",
        lambda b: [p.unlink() for p in b.folder.glob("*.xml")],
        "annotations: no images in it",
    ),
    "voc: a listed file is missing": (
        "voc",
        lambda b: (
            b.entry.update(LIST=str(b.images.parent / "list.txt"))
            or (b.images.parent / "list.txt").write_text("a\nq\n")
        ),
        r"q\.xml: No such file",
    ),
    "voc: a circle of folders": ("voc", lambda b: (b.folder / "again").symlink_to(b.folder), None),
    # YOLO
    "yolo: five numbers": (
        "yolo",
        line(1, "0 .1 .1 .1 .1 .1"),
        r"a\.txt: line 1: .*5 numbers after the class",
    ),
    "yolo: words": ("yolo", line(2, "cat .1 .1 .1 .1"), r"a\.txt: line 2: 'cat .1 .1 .1 .1'"),
    "yolo: pixels": ("yolo", line(1, "0 30 20 10 10"), r"a\.txt: line 1: .*from 0 to 1"),
    "yolo: NaN": ("yolo", line(1, "0 nan .1 .1 .1"), r"a\.txt: line 1: .*from 0 to 1"),
    "yolo: negative width": ("yolo", line(1, "0 .1 .1 -.1 .1"), r"a\.txt: line 1: .*negative width"),
    "yolo: class beyond the names": (
        "yolo",
        line(1, "2 .1 .1 .1 .1"),
        r"line 1: the class '2'; .* 0 to 1 \(cat, dog\)",
    ),
    "yolo: negative class": ("yolo", line(1, "-1 .1 .1 .1 .1"), r"line 1: the class '-1'"),
    "yolo: no number for a class": ("yolo", line(1, "nan .1 .1 .1 .1"), r"line 1: the class 'nan'"),
    "yolo: binary": (
        "yolo",
        lambda b: (b.folder / "a.txt").write_bytes(bytes(range(256))),
        r"a\.txt: not UTF-8",
    ),
    "yolo: other texts beside the labels": (
        "yolo",
        lambda b: (
            (b.folder / "README.txt").write_bytes(b"made by m\xe9\n")
            and (b.folder / "train.txt").write_text("data/obj_train_data/a.jpg\n")
            and (b.folder / "empty.txt").write_text("")
        ),
        None,
    ),
    "yolo: a list of CVAT": (
        "yolo",
        lambda b: (
            (b.folder / "train.txt").write_text(
                "data/obj_train_data/a.jpg\ndata/obj_train_data/b.png\nc:\\x\\c.png"
            )
            and b.entry.update(LIST=str(b.folder / "train.txt"))
        ),
        None,
    ),
    "yolo: a list whose names mean one image": (
        "yolo",
        lambda b: (
            (b.folder / "train.txt").write_text("x/a.jpg\ny/a.jpg\n")
            and b.entry.update(LIST=str(b.folder / "train.txt"))
        ),
        r"LIST: 'x/a\.jpg' and 'y/a\.jpg' both mean the image .*images/a\.jpg",
    ),
    "yolo: VOC files": (
        "yolo",
        lambda b: (
            [path.unlink() for path in b.folder.glob("*.txt")]
            and (b.folder / "a.xml").write_text("<annotation><object><bndbox></bndbox></object></annotation>")
        ),
        r"annotations is a folder of VOC files: set FORMAT: voc \(FORMAT is yolo; .*has a label file",
    ),
    "yolo: no labels": (
        "yolo",
        lambda b: [path.unlink() for path in b.folder.glob("*.txt")],
        r"annotations: none of the 3 images has a label file; that of a\.jpg would be .*annotations/a\.txt$",
    ),
    "yolo: a folder without FORMAT": (
        "yolo",
        lambda b: b.entry.pop("FORMAT"),
        r"annotations is a folder of YOLO label files: set FORMAT: yolo \(FORMAT is coco\)",
    ),
    "voc: a folder without FORMAT": (
        "voc",
        lambda b: b.entry.pop("FORMAT"),
        r"annotations is a folder of VOC files: set FORMAT: voc \(FORMAT is coco\)",
    ),
    "csv: a file without FORMAT": (
        "csv",
        lambda b: b.entry.pop("FORMAT"),
        r"annotations\.csv is a table of text: set FORMAT: csv \(FORMAT is coco\)",
    ),
    "images: Git LFS pointers": (
        "yolo",
        lambda b: (b.images / "a.jpg").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        r"cannot read the image .*a\.jpg: it is a Git LFS pointer.*git lfs pull",
    ),
    "images: Git LFS pointers, sizes given": (
        "coco",
        lambda b: (b.images / "a.jpg").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
        ),
        r"a\.jpg: it is a Git LFS pointer.*git lfs pull",
    ),
    "yolo: labels without an image": (
        "yolo",
        lambda b: (b.folder / "q.txt").write_text("0 .5 .5 .1 .1"),
        r"q\.txt: no image",
    ),
    "yolo: BOM, CRLF, blank lines": (
        "yolo",
        lambda b: (b.folder / "a.txt").write_bytes(
            b"\xef\xbb\xbf" + (b.folder / "a.txt").read_bytes().replace(b"\n", b"\r\n\r\n")
        ),
        None,
    ),
    "yolo: names with a hole": (
        "yolo",
        lambda b: (
            b.entry.update(CLASSES=str(b.images.parent / "data.yaml"))
            or (b.images.parent / "data.yaml").write_text("names: {0: cat, 2: dog}")
        ),
        r"data\.yaml: names has the keys",
    ),
    "yolo: names are no YAML": (
        "yolo",
        lambda b: (
            b.entry.update(CLASSES=str(b.images.parent / "data.yaml"))
            or (b.images.parent / "data.yaml").write_text("names: [")
        ),
        r"data\.yaml, line 1: while parsing a flow node",
    ),
    "yolo: names twice": (
        "yolo",
        lambda b: b.entry.update(CLASSES=["cat", "cat"]),
        'CLASSES: the class name "cat" is there twice',
    ),
    "yolo: names that are none": (
        "yolo",
        lambda b: b.entry.update(CLASSES=[["cat"], {}]),
        "CLASSES: class names are",
    ),
    # CSV
    "csv: empty": ("csv", content(b""), r"annotations\.csv: no images in it"),
    "csv: a column is missing": (
        "csv",
        line(1, "image,xmin,ymin,xmax,label,ignored"),
        r"annotations\.csv: the header .* has no column ymax, which may be called ymax or y2",
    ),
    "csv: semicolons": (
        "csv",
        lambda b: b.main.write_text(b.main.read_text().replace(",", ";")),
        None,
    ),
    "csv: tabs": ("csv", lambda b: b.main.write_text(b.main.read_text().replace(",", "\t")), None),
    "csv: semicolons and decimal commas": (
        "csv",
        lambda b: b.main.write_text(b.main.read_text().replace(",", ";").replace(".0;", ",00;")),
        None,
    ),
    "csv: columns of another name": (
        "csv",
        lambda b: (
            b.main.write_text(b.main.read_text().replace("xmin", "Left Edge").replace("label", "species"))
            and b.entry.update(COLUMNS={"xmin": "left edge", "label": "species"})
        ),
        None,
    ),
    "csv: a column that the header has not": (
        "csv",
        lambda b: b.entry.update(COLUMNS={"xmin": "x0"}),
        r"annotations\.csv: the header image, xmin, .* has no column xmin, which may be called x0, or as COL",
    ),
    "csv: a corner is a text": (
        "csv",
        line(2, "a.jpg,1,x,3,4,cat,0"),
        r"annotations\.csv: line 2: the corners are .*'x'",
    ),
    "csv: a corner is NaN": (
        "csv",
        line(2, "a.jpg,1,nan,3,4,cat,0"),
        r"annotations\.csv: line 2: .*not a number",
    ),
    "csv: corners swapped": (
        "csv",
        line(2, "a.jpg,9,2,3,4,cat,0"),
        r"annotations\.csv: line 2: .*negative width",
    ),
    "csv: a short line": ("csv", line(3, "a.jpg,1,2"), r"annotations\.csv: line 3: 3 fields; at least 7"),
    "csv: no class": ("csv", line(2, "a.jpg,1,2,3,4,,0"), r"annotations\.csv: line 2: no class name"),
    "csv: an open quote": (
        "csv",
        line(2, '"a.jpg,1,2,3,4,cat,0'),
        r"annotations\.csv: line \d: unexpected end",
    ),
    "csv: a field of a megabyte": (
        "csv",
        line(2, "a" * 2**20 + ",1,2,3,4,cat,0"),
        r"annotations\.csv: line 2: field larger",
    ),
    "csv: UTF-16": ("csv", recode("utf-16"), r"annotations\.csv: not UTF-8"),
    "csv: BOM, CRLF": (
        "csv",
        lambda b: b.main.write_bytes(b"\xef\xbb\xbf" + b.main.read_bytes().replace(b"\n", b"\r\n")),
        None,
    ),
    "csv: ..": (
        "csv",
        line(2, "../b.png,1,2,3,4,cat,0"),
        r"line 2: the image '\.\./b\.png' is not a path under",
    ),
    "csv: an image is missing": (
        "csv",
        line(2, "q.jpg,1,2,3,4,cat,0"),
        r"line 2: cannot read the image .*q\.jpg: No such file",
    ),
    # images
    "jpeg: zero bytes": ("coco", cut("a.jpg", 0), r"cannot read image .*a\.jpg"),
    "jpeg: zero bytes, size asked": ("yolo", cut("a.jpg", 0), r"a\.txt: cannot read the image .*a\.jpg"),
    "jpeg: truncated": ("coco", cut("a.jpg", 0.6), r"cannot read image .*a\.jpg: "),
    "png: truncated": ("coco", cut("b.png", 0.6), r"cannot read image .*b\.png: "),
    "png: a text chunk of two megabytes": (
        "coco",
        lambda b: b.save("b.png", Image.fromarray(pixels()[:, :, ::-1]), pnginfo=large_text()),
        r"cannot read image .*b\.png: .*too large",
    ),
    "png: the same, size asked": (
        "csv",
        lambda b: b.save("b.png", Image.fromarray(pixels()[:, :, ::-1]), pnginfo=large_text()),
        r"b\.png: .*too large",
    ),
    "yolo: a label file is a pipe": (
        "yolo",
        lambda b: (b.folder / "a.txt").unlink() or os.mkfifo(b.folder / "a.txt"),
        r"a\.txt: a named pipe, where a file is needed",
    ),
    "yolo: an image is a pipe": (
        "yolo",
        lambda b: (b.images / "a.jpg").unlink() or os.mkfifo(b.images / "a.jpg"),
        r"cannot read the image .*a\.jpg: a named pipe, where a file is needed",
    ),
    "yolo: endless digits": (
        "yolo",
        line(1, f"0 .5 .5 .5 -1e-{'0' * 5000}"),
        "line 1: .*from 0 to 1|negative",
    ),
    "yolo: capital endings": ("yolo", capitals, None),
    "yolo: linked folders": ("yolo", linked_folders, None),
    "csv: a class of 5,000 digits": ("csv", line(2, f"a.jpg,1,2,3,4,{'9' * 5000},0"), "line 2: the class"),
    "csv: whole numbers as 48.0, flags as words": ("csv", with_gaps, None),
    "coco: a parent of the same name": (
        "coco",
        lambda b: b.coco(lambda c: c["categories"].append({"id": 77, "name": "cat"})),
        None,
    ),
    "coco: a root above everything": (
        "coco",
        lambda b: b.entry.update(IMAGES=os.path.relpath(b.images)) or image(0, file_name="../x/a.jpg")(b),
        "not a path under",
    ),
    "coco: a folder with the root's name and more": (
        "coco",
        image(0, file_name="../images_secret/a.jpg"),
        r"not a path under",
    ),
    "voc: LIST leaves the folder": (
        "voc",
        lambda b: (
            b.entry.update(LIST=str(b.images.parent / "list.txt"))
            or (b.images.parent / "list.txt").write_text("../annotations2/a\n")
        ),
        r"LIST: .* is not a path under .*annotations",
    ),
    "voc: no filename": (
        "voc",
        lambda b: b.replace("a.xml", "<filename>a.jpg</filename>", ""),
        None,
    ),
    "voc: no filename, no image of the file's name": (
        "voc",
        lambda b: (
            b.replace("a.xml", "<filename>a.jpg</filename>", "")
            or (b.folder / "a.xml").rename(b.folder / "q.xml")
        ),
        r"q\.xml: no <filename> in <annotation> and no image q\.\*",
    ),
    "jpeg: a text": (
        "coco",
        lambda b: (b.images / "a.jpg").write_text("hello"),
        r"cannot read image .*a\.jpg",
    ),
    "jpeg: turned, annotated upright": ("coco", rotated(6, upright=True), None),
    "jpeg: turned, size asked": ("yolo", rotated(8, upright=True), None),
    "jpeg: turned, annotated as stored": ("coco", rotated(6, upright=False), r"a\.jpg.*64.*48"),
    "png: of another size": ("coco", image(1, width=65), r"cannot read image .*b\.png.*65"),
    "jpeg: CMYK": (
        "coco",
        lambda b: b.save("a.jpg", Image.fromarray(pixels()[:, :, ::-1]).convert("CMYK"), quality=95),
        None,
    ),
    "png: grey": (
        "coco",
        lambda b: b.save("b.png", Image.fromarray(pixels()[:, :, ::-1]).convert("L")),
        None,
    ),
    "png: 16 bits": (
        "coco",
        lambda b: b.save("b.png", Image.fromarray(pixels()[:, :, 0].astype(np.uint16) * 256)),
        None,
    ),
    "png: palette": (
        "coco",
        lambda b: b.save("b.png", Image.fromarray(pixels()[:, :, ::-1]).quantize(256)),
        None,
    ),
    "png: transparent": (
        "coco",
        lambda b: b.save("b.png", Image.fromarray(np.dstack([pixels()[:, :, ::-1], pixels()[:, :, :1]]))),
        None,
    ),
    "gif: animated": (
        "coco",
        lambda b: b.save(
            "b.png",
            Image.fromarray(pixels()[:, :, ::-1]),
            format="GIF",
            save_all=True,
            append_images=[Image.new("RGB", (WIDTH, HEIGHT))] * 3,
        ),
        None,
    ),
    "png: a billion pixels": (
        "coco",
        lambda b: (b.images / "b.png").write_bytes(
            (b.images / "b.png").read_bytes()[:16]
            + (60000).to_bytes(4, "big") * 2
            + (b.images / "b.png").read_bytes()[24:]
        ),
        r"cannot read image .*b\.png",
    ),
}

# How far each image may be from `pixels()`, in grey levels on average: none of them has its colours.
COLOURLESS = {"png: grey", "png: 16 bits"}


def test_there_are_at_least_sixty():
    assert len(CASES) >= 60


@pytest.mark.parametrize("backend", ["pil", "opencv"])
@pytest.mark.parametrize("case", CASES)
def test_is_read_right_or_refused_in_one_line(case, backend, tmp_path):
    style, change, match = CASES[case]
    broken = Broken(tmp_path, style)
    change(broken)
    before = everything(tmp_path)
    if match is None:
        samples = read(broken, backend)
        boxes = [x["instances"].gt_boxes.tensor.tolist() for x in sorted(samples, key=by_boxes)]
        xyxy = [[[x, y, x + w, y + h] for x, y, w, h in objects] for objects in BOXES]
        assert boxes == [xyxy[0], xyxy[1], xyxy[2]]
        labels = [x["instances"].gt_classes.tolist() for x in sorted(samples, key=by_boxes)]
        assert labels == LABELS
        for sample in samples:
            image = sample["image"].numpy().transpose(1, 2, 0).astype(float)
            expected = pixels().astype(float)
            if case in COLOURLESS and sample["file_name"].endswith("b.png"):
                assert (image == image[:, :, :1]).all()
                weights = [1, 0, 0] if "16" in case else [0.114, 0.587, 0.299]
                expected = (expected @ weights)[:, :, None]
            assert abs(image - expected).mean() < 5
    else:
        with pytest.raises(UserError) as error:
            read(broken, backend)
        message = user_message(error.value)
        assert "\n" not in message
        assert len(message.replace(str(tmp_path), "")) < 300
        assert re.search(match, message), message
        # Where the item alone matters, the file is named all the same.
        assert re.search(r"annotations|images/|data\.yaml|CLASSES", message), message
    assert everything(tmp_path) == before  # nothing is left behind


def by_boxes(sample: dict) -> int:
    """The image with two boxes, the one with one, the one without."""
    return -len(sample["instances"])


@pytest.mark.parametrize("style", ["coco", "voc", "csv"])
@pytest.mark.parametrize("absolute", [False, True])
def test_images_outside_their_folder_need_leave(tmp_path, style, absolute):
    broken = Broken(tmp_path, style)
    name = str(tmp_path / "elsewhere.jpg") if absolute else "../elsewhere.jpg"
    (broken.images / "a.jpg").rename(tmp_path / "elsewhere.jpg")
    file = {"coco": broken.main, "voc": broken.folder / "a.xml", "csv": broken.main}[style]
    file.write_text(file.read_text().replace("a.jpg", name))
    with pytest.raises(UserError, match=r"elsewhere\.jpg' is not a path"):
        read(broken)
    broken.entry["OUTSIDE"] = True
    assert sorted(len(sample["instances"]) for sample in read(broken)) == [0, 1, 2]
    broken.entry["OUTSIDE"] = False
    with pytest.raises(UserError, match=r"\(coco, voc, csv: OUTSIDE: true lets names leave IMAGES; NAMES"):
        read(broken)


def test_links_in_the_images_folder_are_followed_but_no_name_goes_through_one(tmp_path):
    broken = Broken(tmp_path, "coco")
    (tmp_path / "far").mkdir()
    (broken.images / "a.jpg").rename(tmp_path / "far" / "a.jpg")
    (broken.images / "a.jpg").symlink_to(tmp_path / "far" / "a.jpg")
    (broken.images / "far").symlink_to(tmp_path / "far")
    (tmp_path / "b.png").write_bytes(b"")
    image(1, file_name="far/../b.png")(broken)  # the system would go by far's target to tmp_path
    assert sorted(len(sample["instances"]) for sample in read(broken)) == [0, 1, 2]


def test_class_names_that_explode_are_refused(tmp_path):
    broken = Broken(tmp_path, "yolo")
    rows = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    names = tmp_path / "names.yaml"
    names.write_text("\n".join([*rows, "names: [*a11]"]))
    broken.entry["CLASSES"] = str(names)
    with pytest.raises(UserError, match=r"names\.yaml, line 6: more than 100000 values"):
        read(broken)


def test_one_bad_item_does_not_hide_another(tmp_path):
    broken = Broken(tmp_path, "coco")
    annotation(0, bbox=[1, 2, -3, 4])(broken)
    annotation(2, category_id="x")(broken)
    register_datasets([broken.entry])
    table = load_table(broken.entry["NAME"])
    assert len(table.problems) == 2
    assert table.boxes.tolist() == [BOXES[0][1]]
    with pytest.raises(UserError, match=r"; and 1 more$"):
        DatasetCatalog.get(broken.entry["NAME"])
