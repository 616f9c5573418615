"""Checks of boxes and images against limits of the config: detections, pixels, crops."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import MOST_EXAMPLES, box_examples
from focal_d2.data.checks.findings import Example, Finding, Fix, share

# Of the boxes that are larger than every crop.
_CUT = 0.05

# Pixels by which a box may be larger than the crop: both are rounded to whole pixels.
_CROP_SLACK = 1.0

# A limit on boxes of which NMS removes most.
_BEFORE_NMS = "TOPK_CANDIDATES_TEST"


def check_limits(tables: Mapping[str, Table], limits: Mapping[str, int]) -> list[Finding]:
    """Find images that have more boxes than the model returns detections.

    Args:
        tables: datasets of whole images, by name.
        limits: the most detections of an image, or candidates of a level, by key. What is not above 0 is no
            limit.
    """
    findings = []
    for key, limit in limits.items():
        if limit < 1:
            continue
        crowded: list[tuple[int, str, str]] = []  # number of boxes, dataset, file
        for name, table in tables.items():
            counts = np.bincount(table.image[table.objects], minlength=len(table))  # (N,)
            crowded += [(int(counts[i]), name, table.file_names[i]) for i in np.flatnonzero(counts > limit)]
        if not crowded:
            continue
        crowded.sort(key=lambda image: -image[0])
        most, densest, _ = crowded[0]
        names = list(dict.fromkeys(name for _, name, _ in crowded))
        images = share(len(crowded), sum(len(tables[name]) for name in names))
        message = f"{images} images have more boxes than {key} {limit}; the most is {most}"
        examples = [Example(path, f"{boxes} boxes") for boxes, _, path in crowded[:MOST_EXAMPLES]]
        why = f"an image of {densest} has {most} boxes"
        fix = Fix(why, key, most)
        if key.endswith(_BEFORE_NMS):
            fix = Fix(
                f"{key}: several times {most}; {why}, and most of the candidates of a level "
                "repeat others, which NMS removes"
            )
        fixes = [fix]
        findings.append(
            Finding("boxes-above-limit", message, ", ".join(names), len(crowded), examples, fixes)
        )
    return findings


def check_pixels(tables: Mapping[str, Table], limit: int) -> list[Finding]:
    """Find images whose annotated size has more pixels than `INPUT.FOCAL.MAX_PIXELS`.

    Args:
        tables: datasets to train or test on, by name.
        limit: `INPUT.FOCAL.MAX_PIXELS`.
    """
    findings = []
    for name, table in tables.items():
        pixels = table.sizes.prod(axis=1)  # (N,)
        large = np.flatnonzero(pixels > limit)
        if large.size:
            first = large[np.argsort(-pixels[large], kind="stable")][:MOST_EXAMPLES].tolist()
            sizes = [f"{table.sizes[i, 1]} × {table.sizes[i, 0]}" for i in first]
            message = (
                f"{share(large.size, len(table))} images have more pixels than INPUT.FOCAL.MAX_PIXELS {limit}"
            )
            examples = [Example(table.file_names[i], size) for i, size in zip(first, sizes, strict=True)]
            fixes = [
                Fix(f"an image of {name} has {sizes[0]} pixels", "INPUT.FOCAL.MAX_PIXELS", int(pixels.max()))
            ]
            findings.append(Finding("image-too-large", message, name, large.size, examples, fixes))
    return findings


def check_crops(name: str, table: Table, windows: np.ndarray) -> list[Finding]:
    """Find boxes that are larger than the crops of training, if they are many: few samples show them whole.

    Args:
        name: the dataset's.
        table: its annotations.
        windows: (N, 2) height and width of a large crop of each image, in the image's own pixels; one in ten
            is larger.
    """
    corners = table.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, np.tile(table.sizes[table.image, ::-1], 2))
    sides = (corners[:, 2:] - corners[:, :2])[:, ::-1]  # (B, 2), height and width
    excess = (sides - windows[table.image]).max(axis=1, initial=0)
    cut = table.objects & (excess > _CROP_SLACK)
    objects = int(table.objects.sum())
    if not cut.any() or cut.sum() < _CUT * objects:
        return []

    def text(i: int) -> str:
        (height, width), (most_height, most_width) = sides[i], windows[table.image[i]]
        most = f"{most_width:.0f} × {most_height:.0f}"
        return f"{width:.0f} × {height:.0f} pixels, nine in ten crops are at most {most}"

    message = f"nine in ten crops of training are too small for {share(int(cut.sum()), objects)} boxes"
    examples = box_examples(table, cut, text, worst=excess)
    return [Finding("box-cropped", message, name, int(cut.sum()), examples)]
