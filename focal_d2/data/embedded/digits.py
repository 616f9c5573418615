"""Handwritten digits, small and sparse in large scenes: ten classes under extreme imbalance.

The digits are the 1,797 of scikit-learn's `load_digits` (8 × 8 pixels; UCI, "Optical Recognition of
Handwritten Digits"), the scenes pieces of its two sample photographs. Everything is drawn from a seed the
first time a dataset is used; nothing is downloaded. No digit, and no part of a photograph, is in both splits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.embedded import SETS
from focal_d2.data.embedded.folder import datasets_root, prepare_once
from focal_d2.data.pixels import write_image
from focal_d2.data.readers.coco import coco_content, read_coco
from focal_d2.errors import UserError

SPLITS, CLASSES, _ = SETS["digits"]


@dataclass(frozen=True)
class Recipe:
    """How scenes are drawn; cached scenes of another recipe are replaced."""

    version: int = 1
    seed: int = 0
    train_scenes: int = 600
    test_scenes: int = 150
    size: int = 256  # pixels, height and width of a scene
    digits: tuple[int, int] = (3, 9)  # in a scene, both included
    digit_size: tuple[int, int] = (24, 36)  # pixels, both included; the ink is somewhat smaller
    contrast: tuple[int, int] = (120, 200)  # grey levels between a digit and its surroundings
    train_until: float = 0.65  # share of a photograph's width
    test_from: float = 0.67
    train_digits: int = 1200  # the first of them


def load(split: str) -> Table:
    """Draw the scenes if they are not there, and return the annotations of a split."""
    folder = prepare(datasets_root())
    return read_coco(str(folder / f"{split}.json"), str(folder / split))


def prepare(root: Path, recipe: Recipe = Recipe()) -> Path:
    """Draw the scenes under `root`/digits, unless they are there already.

    The folder appears whole or not at all.

    Args:
        root: the dataset folder.
        recipe: how to draw.

    Returns:
        The folder, with {train,test}.json in COCO format and a folder of PNG scenes for each.

    Raises:
        UserError: if scikit-learn is not installed, or `root` can't be written.
    """

    def write(folder: Path) -> None:
        try:
            from sklearn.datasets import load_digits, load_sample_images
        except ImportError as error:
            raise UserError("the digits datasets need scikit-learn: pip install scikit-learn") from error
        digits, photographs = load_digits(), load_sample_images().images
        for split in SPLITS:
            _write_split(folder, split, digits.images, digits.target, photographs, recipe)

    return prepare_once(root / "digits", recipe, SPLITS, write)


def _write_split(
    folder: Path, split: str, digits: np.ndarray, classes: np.ndarray, photographs: Any, recipe: Recipe
) -> None:
    rng = np.random.default_rng([recipe.seed, SPLITS.index(split)])
    training = split == "train"
    own_digits = slice(None, recipe.train_digits) if training else slice(recipe.train_digits, None)
    backgrounds = []
    for photograph in photographs:
        width = photograph.shape[1]
        part = (
            slice(0, int(width * recipe.train_until))
            if training
            else slice(int(width * recipe.test_from), None)
        )
        backgrounds.append(photograph[:, part, ::-1])
    (folder / split).mkdir()
    scenes = []
    for i in range(recipe.train_scenes if training else recipe.test_scenes):
        pixels, boxes, labels = draw_scene(rng, digits[own_digits], classes[own_digits], backgrounds, recipe)
        write_image(folder / split / f"{i:04d}.png", pixels)
        scenes.append((f"{i:04d}.png", pixels.shape[:2], boxes, labels))
    description = f"scikit-learn's digits in its sample photographs ({split})"
    (folder / f"{split}.json").write_text(json.dumps(coco_content(description, scenes, CLASSES)))


def draw_scene(
    rng: np.random.Generator,
    digits: np.ndarray,
    classes: np.ndarray,
    backgrounds: list[np.ndarray],
    recipe: Recipe,
) -> tuple[np.ndarray, list[list[int]], list[int]]:
    """Paste digits that don't overlap into a piece of a photograph.

    Args:
        rng: where all choices come from.
        digits: (M, 8, 8), ink from 0 to 16.
        classes: (M,) in [0, 10).
        backgrounds: BGR pieces, each at least 128 pixels high and wide.
        recipe: sizes and numbers.

    Returns:
        The scene (size, size, 3) uint8, BGR; its boxes, XYXY around the ink in pixels; their classes.
    """
    background = backgrounds[rng.integers(len(backgrounds))]
    side = int(rng.integers(128, min(*background.shape[:2], recipe.size) + 1))
    top, left = (int(rng.integers(0, n - side + 1)) for n in background.shape[:2])
    piece = background[top : top + side, left : left + side]
    scene = cv2.resize(piece, (recipe.size, recipe.size), interpolation=cv2.INTER_CUBIC).astype(np.float32)
    boxes: list[list[int]] = []
    labels: list[int] = []
    taken = np.zeros((recipe.size, recipe.size), bool)
    for _ in range(rng.integers(recipe.digits[0], recipe.digits[1] + 1)):
        index, size = (
            int(rng.integers(len(digits))),
            int(rng.integers(recipe.digit_size[0], recipe.digit_size[1] + 1)),
        )
        x, y = rng.integers(0, recipe.size - size + 1, 2).tolist()
        window = (slice(y, y + size), slice(x, x + size))
        if taken[window].any():
            continue
        taken[window] = True
        ink = cv2.resize(digits[index] / 16.0, (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)
        grey = float(scene[window].mean())
        contrast = int(rng.integers(recipe.contrast[0], recipe.contrast[1] + 1))
        colour = grey + contrast if grey < 128 else grey - contrast
        colours = np.clip(colour + rng.normal(0, 15, 3), 0, 255)
        scene[window] += ink[..., None] * (colours - scene[window])
        rows, columns = (np.flatnonzero((ink > 0.25).any(axis)) for axis in (1, 0))
        boxes.append([int(v) for v in (x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1)])
        labels.append(int(classes[index]))
    return scene.clip(0, 255).round().astype(np.uint8), boxes, labels
