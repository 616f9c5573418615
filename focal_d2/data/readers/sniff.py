"""What a file that no reader could read is, by its first bytes and keys, and what to do about it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from focal_d2.data.image_files import IMAGE_SUFFIXES, LFS_POINTER
from focal_d2.data.readers.image_folder import list_files
from focal_d2.data.readers.texts import is_label_row, read_bytes
from focal_d2.errors import UserError


class Kind(NamedTuple):
    """A kind of file."""

    text: str  # what it is, and what to do
    style: str | None = None  # the FORMAT that reads it


_FORMATS = {
    "coco": Kind("is a COCO file: set FORMAT: coco", "coco"),
    "csv": Kind("is a table of text: set FORMAT: csv", "csv"),
    "voc": Kind("is a VOC file: set FORMAT: voc, and ANNOTATIONS to its folder", "voc"),
    "yolo": Kind("is a YOLO label file: set FORMAT: yolo, and ANNOTATIONS to its folder", "yolo"),
    "data": Kind("is a YOLO dataset file: set FORMAT: yolo and SPLIT: train, val or test", "yolo"),
}
_FOLDERS = {
    "coco": Kind("is a folder: name the COCO file in it"),
    "csv": Kind("is a folder: name the CSV file in it, and set FORMAT: csv"),
    "voc": Kind("is a folder of VOC files: set FORMAT: voc", "voc"),
    "yolo": Kind("is a folder of YOLO label files: set FORMAT: yolo", "yolo"),
    "data": Kind(
        "is the folder of a YOLO dataset: name its data.yaml, and set FORMAT: yolo and SPLIT", "yolo"
    ),
}

# Of formats that are read from a folder: one of its files was named.
_ONE_OF_A_FOLDER = {
    "voc": Kind("is a VOC file: set ANNOTATIONS to its folder"),
    "yolo": Kind("is a YOLO label file: set ANNOTATIONS to its folder"),
}

# By the first bytes.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (LFS_POINTER, "is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"\x00\x00\x27\x0a", "is a shapefile (GIS): convert its boxes to pixels and save them as CSV"),
    (b"SQLite format 3\0", "is an SQLite database (a GeoPackage?): export the boxes in pixels as CSV"),
    (b"PAR1", "is a Parquet table: save it as CSV"),
    (b"MATLAB 5.0", "is a MATLAB file: save its boxes as CSV"),
    (b"\x89HDF", "is an HDF5 file: save its boxes as CSV"),
    (b"\x89PNG", "is an image: ANNOTATIONS and IMAGES may be swapped"),
    (b"\xff\xd8\xff", "is an image: ANNOTATIONS and IMAGES may be swapped"),
    (b"%PDF", "is a PDF file"),
)
_NAMES: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".tfrecord", ".record"), "is a TFRecord: export the dataset as COCO or VOC"),
    ((".xls", ".xlsx", ".ods"), "is a spreadsheet: save it as CSV"),
    ((".pkl", ".pickle", ".npy", ".npz"), "holds Python objects: save the boxes as CSV"),
    ((".shp", ".dbf", ".shx"), "is part of a shapefile (GIS): convert its boxes to pixels, save them as CSV"),
)
# By the first bytes, too, but spreadsheets and NumPy's files are archives inside: names come first.
_ARCHIVES: tuple[tuple[bytes, str], ...] = (
    (b"PK\x03\x04", "is a zip archive: unpack it"),
    (b"\x1f\x8b", "is a gzip archive: unpack it"),
)
# Keys of a JSON object, or of the first object of a list, that only one tool writes.
_JSON_KEYS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("shapes", "imagePath"), "is labelme's JSON: convert it to VOC (labelme2voc.py) or COCO"),
    (("type", "features"), "is GeoJSON: convert its boxes to pixels of the images and save them as CSV"),
    (
        ("_via_img_metadata",),
        "is a project of VIA: choose Annotation, Export Annotations (COCO format) there",
    ),
    (("regions", "asset"), "is VoTT's JSON: export from VoTT as Pascal VOC or CSV"),
    (("assets", "tags"), "is a project of VoTT: export from VoTT as Pascal VOC or CSV"),
    (("objects", "size"), "is Supervisely's JSON: export as COCO or Pascal VOC there"),
    (("data", "annotations"), "is Label Studio's JSON: choose COCO, Pascal VOC XML or YOLO at its export"),
    (("data", "completions"), "is Label Studio's JSON: choose COCO, Pascal VOC XML or YOLO at its export"),
    (("image", "annotations"), "is CreateML's JSON: export the dataset as COCO, Pascal VOC or YOLO"),
    (("image_id", "bbox", "score"), "holds COCO detections, not annotations: name the annotation file"),
    (("data_row", "projects"), "is Labelbox's JSON: convert it to COCO"),
    (("External ID", "Label"), "is Labelbox's JSON: convert it to COCO"),
    (("name", "labels"), "is BDD100K's JSON (Scalabel): convert it to COCO (bdd100k.label.to_coco)"),
    (("items", "categories"), "is Datumaro's JSON: export it as COCO or Pascal VOC (datum convert)"),
    (("image", "label"), "is Label Studio's JSON-MIN: choose COCO, Pascal VOC XML or YOLO at its export"),
    (("regions", "filename"), "is VIA's JSON: choose Annotation, Export Annotations (COCO format) there"),
)
_XML_ROOTS = {
    "annotations": "is CVAT's XML: export the task as COCO 1.0, Pascal VOC 1.1 or YOLO 1.1 there",
    "dataset": "is dlib's XML (imglab): convert it to COCO or CSV",
    "kml": "is KML (GIS): convert its boxes to pixels of the images and save them as CSV",
    "svg": "is an SVG picture",
    "html": "is a web page, not the file itself: download the raw file",
}
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
# Lines of text that only one format has; the first line that is not blank must match.
_LINES: tuple[tuple[str, str], ...] = (
    (r"(imagesource|gsd):", "is a DOTA label file: convert the dataset to COCO"),
    (rf"({_NUMBER} ){{8}}[\w-]+( [012])?$", "is a DOTA label file: convert the dataset to COCO"),
    (rf"[A-Za-z_]+ ({_NUMBER} ){{13}}{_NUMBER}", "is a KITTI label file: convert the dataset to COCO or VOC"),
    (rf"\d+,-?\d+,({_NUMBER},){{4}}", "is a MOTChallenge file: convert it to COCO"),
    (rf"({_NUMBER},){{7}}{_NUMBER},?$", "is a VisDrone label file: convert the dataset to COCO"),
    (r"ImageID,.*XMin,XMax,YMin,YMax", "is a table of Open Images (shares of the image): convert it to COCO"),
    (r"label_name,bbox_x,bbox_y,", "is makesense's CSV: export as VOC XML or YOLO there"),
    (
        r"[^,]+,\d+,\d+,\d+,\d+,[^,]+\.\w+,\d+,\d+$",
        "is makesense's CSV: export as VOC XML or YOLO there",
    ),
    (r"#?filename,file_size,file_attributes,", "is VIA's CSV: export as COCO format there"),
    (
        r"image_id,width,height,bbox",
        "is a table with boxes as text: write xmin, ymin, xmax and ymax as columns",
    ),
    (r"<!DOCTYPE html", "is a web page, not the file itself: download the raw file"),
)


def describe(path: str, style: str) -> str | None:
    """Say what a file or folder is that could not be read as `style`.

    Args:
        path: of the annotations.
        style: the FORMAT that was tried.

    Returns:
        The end of a sentence that begins with the path, with what to do; None if it is what it was read as,
        a folder that has files of that format, or unknown.
    """
    try:
        if os.path.isdir(path):
            kind = _folder(path, style)
        else:
            kind = _file(path, {**_FORMATS, **{k: x for k, x in _ONE_OF_A_FOLDER.items() if k == style}})
    except UserError:
        return None  # it can't be read, which the reader has said
    return kind.text if kind and kind.style != style else None


def kind_of_file(path: str) -> Kind | None:
    """Return what a file of annotations is, with the FORMAT that reads it if there is one.

    Returns:
        None for any other file, and for one that cannot be read.
    """
    try:
        return _file(path, _FORMATS)
    except UserError:
        return None


def _folder(path: str, style: str) -> Kind | None:
    """Tell a folder by its files: the first of each ending, the most frequent endings first.

    A kind of file that is of `style` counts before all others.
    """
    kinds = []
    if any(os.path.isfile(os.path.join(path, name)) for name in ("data.yaml", "data.yml")):
        kinds.append(_FOLDERS["data"])
    by_ending: dict[str, list[str]] = {}
    for name in list_files(path, ("",)):
        by_ending.setdefault(os.path.splitext(name)[1].lower(), []).append(name)
    # Images may lie beside their annotations.
    by_ending = {k: v for k, v in by_ending.items() if k not in IMAGE_SUFFIXES} or by_ending
    for names in sorted(by_ending.values(), key=len, reverse=True):
        for name in names[:3]:  # the first may be a README
            kind = _file(os.path.join(path, name), _FOLDERS)
            if kind is None:
                continue
            if kind.style is None and kind not in _FOLDERS.values():
                kind = Kind(f"is a folder whose file {name} {kind.text}")
            kinds.append(kind)
            break
    return next((kind for kind in kinds if kind.style == style), kinds[0] if kinds else None)


def _file(path: str, kinds: Mapping[str, Kind]) -> Kind | None:
    data = read_bytes(path)
    tests = (
        *((data.startswith(start), text) for start, text in _MAGIC),
        *((path.lower().endswith(endings), text) for endings, text in _NAMES),
        *((data.startswith(start), text) for start, text in _ARCHIVES),
    )
    for fits, text in tests:
        if fits:
            return Kind(text)
    start = data.lstrip()[:1]
    if start in (b"{", b"["):
        return _json(data, kinds)
    if b"\0" in data[: 1 << 16]:
        return None
    head = data[: 1 << 16].decode("utf-8", errors="replace")
    if re.match(r"\s*<", head):
        return _xml(head, kinds)
    if path.lower().endswith((".yaml", ".yml")):
        return kinds["data"] if re.search(r"^names\s*:", head, re.MULTILINE) else None
    return _text(head, kinds)


def _json(data: bytes, kinds: Mapping[str, Kind]) -> Kind | None:
    try:
        content = msgspec.json.decode(data, type=dict[str, msgspec.Raw] | list[msgspec.Raw])
        if isinstance(content, list):
            content = msgspec.json.decode(content[0], type=dict[str, msgspec.Raw]) if content else {}
        elif "images" in content and "categories" in content:
            return kinds["coco"]
        elif content and not any(set(keys) <= set(content) for keys, _ in _JSON_KEYS):
            # VIA's export has an object for each image.
            content = {**content, **_fields(next(iter(content.values())))}
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return next((Kind(text) for keys, text in _JSON_KEYS if set(keys) <= set(content)), None)


def _fields(value: msgspec.Raw) -> dict[str, msgspec.Raw]:
    try:
        return msgspec.json.decode(value, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError:
        return {}


def _xml(head: str, kinds: Mapping[str, Kind]) -> Kind | None:
    root = re.search(r"<(?:!DOCTYPE\s+)?([A-Za-z][\w-]*)", head)
    name = root.group(1).lower() if root else ""
    if name == "annotation":
        if "<bndbox" in head or "<object>" not in head:
            return kinds["voc"]
        return Kind("is LabelMe's XML (polygons without bndbox): convert it to COCO or VOC")
    return Kind(_XML_ROOTS[name]) if name in _XML_ROOTS else None


def _text(head: str, kinds: Mapping[str, Kind]) -> Kind | None:
    line = next((x.strip() for x in head.splitlines() if x.strip()), "")
    tests: tuple[tuple[Callable[[str], object], Kind], ...] = (
        (is_label_row, kinds["yolo"]),
        *((re.compile(pattern).match, Kind(text)) for pattern, text in _LINES),
        (lambda x: len(re.split("[,;\t]", x)) > 5, kinds["csv"]),
    )
    return next((kind for test, kind in tests if test(line)), None)
