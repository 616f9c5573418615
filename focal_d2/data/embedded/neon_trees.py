"""NEON aerial tree crowns: the embedded data.

Real 0.1 m aerial pictures of the National Ecological Observatory Network with hand-made boxes, as carried by
the `deepforest` 2.1.0 wheel (MIT licence; Weinstein et al., "Individual tree-crown detection in RGB imagery
using semi-supervised deep learning neural networks", Remote Sensing 2019). Only the wheel's files are read;
the package is neither installed nor imported.

Splits are made by place, not by tile, with a gap of 2 % between them. Of each YELL picture the right 33 % is
the test set. Of the left 65 %, the upper 73 % is the training set and the lower 25 % the validation set.
Another forest (OSBS, SOAP) is a second test set. The places of the validation and test sets are also there as
whole pictures, for detection in tiles.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from focal_d2.annotations import Table, box_areas
from focal_d2.data.embedded import SETS
from focal_d2.data.embedded.folder import datasets_root, prepare_once
from focal_d2.data.pixels import read_with_pillow, write_image
from focal_d2.data.readers.coco import coco_content, read_coco
from focal_d2.data.readers.voc import read_voc_boxes
from focal_d2.errors import UserError
from focal_d2.storage.wheels import Wheel, fetch_wheel

WHEEL = Wheel("deepforest==2.1.0", sha256="8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54")
SPLITS, CLASSES, _ = SETS["neon_trees"]

_YELL = ("2019_YELL_2_528000_4978000_image_crop2", "2019_YELL_2_541000_4977000_image_crop")
_OTHER = ("OSBS_029", "SOAP_061")
_PICTURES = {split: _OTHER if split == "other" else _YELL for split in SPLITS}


@dataclass(frozen=True)
class Recipe:
    """How the pictures are cut; cached tiles of another recipe are replaced."""

    version: int = 3
    tile: int = 400  # pixels
    train_stride: int = 200  # pixels: train tiles overlap by at least half
    train_until: float = 0.65  # share of a picture's width, of train and val
    test_from: float = 0.67
    train_above: float = 0.73  # share of a picture's height
    val_below: float = 0.75
    min_visible: float = 0.5  # a box stays in a tile that shows at least this share of its area


class Tile(NamedTuple):
    """A window of a picture, in its pixels: [left, right) × [top, bottom)."""

    left: int
    top: int
    right: int
    bottom: int


def load(split: str) -> Table:
    """Return the annotations of a split.

    Raises:
        UserError: if the tiles were not made.
    """
    folder = datasets_root() / "neon_trees"
    annotations = folder / f"{split}.json"
    if not annotations.is_file():
        raise UserError(
            f"dataset neon_trees_{split} is not prepared: {annotations} not found; "
            "run `focal-d2 data neon_trees`"
        )
    return read_coco(str(annotations), str(folder / split))


def prepare(root: Path, wheel: Path | None = None, recipe: Recipe = Recipe()) -> Path:
    """Cut the pictures into tiles under `root`/neon_trees, unless they are there already.

    The folder appears whole or not at all.

    Args:
        root: the dataset folder.
        wheel: the `deepforest` wheel; fetched with pip if not given.
        recipe: how to cut.

    Returns:
        The folder, with a JSON file in COCO format and a folder of PNG files for each split.

    Raises:
        UserError: if the wheel can be neither fetched nor read.
    """

    def write(cut: Path) -> None:
        with tempfile.TemporaryDirectory(dir=root, prefix=".neon_trees-") as work_name:
            work = Path(work_name)
            source = _unpack(
                wheel or fetch_wheel(WHEEL, work, otherwise="give its wheel with --wheel FILE"), work
            )
            for split, pictures in _PICTURES.items():
                _write_split(source, cut, split, pictures, recipe)

    return prepare_once(root / "neon_trees", recipe, SPLITS, write)


def _unpack(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [n for n in archive.namelist() if n.startswith("deepforest/data/")]
            archive.extractall(work, members)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel} is not a readable wheel: {error}") from error
    data = work / "deepforest" / "data"
    needed = [f"{name}.{suffix}" for name in (*_YELL, *_OTHER) for suffix in ("png", "xml")]
    missing = [name for name in needed if not (data / name).is_file()]
    if missing:
        raise UserError(f"{wheel} is not {WHEEL.requirement}: it lacks {', '.join(missing)}")
    return data


def tiles_of(split: str, width: int, height: int, recipe: Recipe) -> list[Tile]:
    """List the windows of a picture that belong to `split`."""
    if split == "other":
        return [Tile(0, 0, width, height)]
    left_part = int(width * recipe.train_until)
    if split == "train":
        lefts = _overlapping(0, left_part, recipe)
        tops = _overlapping(0, int(height * recipe.train_above), recipe)
        return [Tile(x, y, x + recipe.tile, y + recipe.tile) for y in tops for x in lefts]
    below, right = int(height * recipe.val_below), int(width * recipe.test_from)
    place = Tile(0, below, left_part, height) if split.startswith("val") else Tile(right, 0, width, height)
    if split.endswith("_whole"):
        return [place]
    xs = _adjoining(place.left, place.right, recipe.tile)
    ys = _adjoining(place.top, place.bottom, recipe.tile)
    return [Tile(x0, y0, x1, y1) for y0, y1 in itertools.pairwise(ys) for x0, x1 in itertools.pairwise(xs)]


def _overlapping(start: int, stop: int, recipe: Recipe) -> list[int]:
    steps = -(-(stop - start - recipe.tile) // recipe.train_stride)
    return np.linspace(start, stop - recipe.tile, steps + 1).astype(int).tolist()


def _adjoining(start: int, stop: int, tile: int) -> list[int]:
    """Borders of equal pieces whose size is as near to `tile` as a whole number of them allows."""
    pieces = max(1, round((stop - start) / tile))
    return np.linspace(start, stop, pieces + 1).astype(int).tolist()


def boxes_in(tile: Tile, boxes: np.ndarray, min_visible: float) -> np.ndarray:
    """Clip boxes to a tile and shift them to its origin.

    Args:
        tile: the window.
        boxes: (M, 4) XYXY in the picture's pixels.
        min_visible: boxes that show a smaller share of their area are left out.

    Returns:
        (M', 4) XYXY in the tile's pixels.
    """
    low, high = np.array(tile[:2] * 2), np.array(tile[2:] * 2)
    clipped = np.clip(boxes, low, high)
    visible = box_areas(clipped) / box_areas(boxes)
    return clipped[visible >= min_visible] - low


def _write_split(source: Path, cut: Path, split: str, pictures: tuple[str, ...], recipe: Recipe) -> None:
    (cut / split).mkdir()
    tiles: list[tuple[str, tuple[int, int], list[list[float]], list[int]]] = []
    for picture in pictures:
        pixels = read_with_pillow(str(source / f"{picture}.png"), "BGR", max_pixels=None)
        boxes = read_voc_boxes(source / f"{picture}.xml")
        height, width = pixels.shape[:2]
        for tile in tiles_of(split, width, height, recipe):
            name = f"{picture}_{tile.left}_{tile.top}.png"
            write_image(cut / split / name, pixels[tile.top : tile.bottom, tile.left : tile.right])
            inside = boxes_in(tile, boxes, recipe.min_visible).tolist()
            tiles.append((name, (tile.bottom - tile.top, tile.right - tile.left), inside, [0] * len(inside)))
    description = f"NEON aerial tree crowns ({split}), from {WHEEL.requirement}, MIT licence"
    (cut / f"{split}.json").write_text(json.dumps(coco_content(description, tiles, CLASSES)))
