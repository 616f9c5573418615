"""Checks of the boxes of one dataset: format, area, position in the image, duplicates.

B boxes, each left, top, width, height in pixels, as in `Table`.
"""

from __future__ import annotations

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import box_examples, box_text
from focal_d2.data.checks.findings import Finding, share

# Pixels beyond an edge that rounding and 1-based corners explain.
_SLACK = 2.0

# Boxes are read in a wrong format if so many reach beyond the image as they are read …
_MISREAD = 0.05

# … and all but so many do not in the other format.
_FITS = 0.99

# Of an image's height and width.
_WHOLE = 0.99


def check_boxes(name: str, table: Table) -> list[Finding]:
    """Check one dataset's boxes, each by itself and against the others of its image.

    Args:
        name: the dataset's.
        table: its annotations.
    """
    if not table.labels.size:
        return []
    left, top, width, height = table.boxes.T
    # (B,), of each box's image.
    image_height, image_width = table.sizes[table.image].T
    broken = ~table.has_area
    findings = []
    if broken.any():
        message = f"{share(int(broken.sum()), broken.size)} boxes have no area"
        findings.append(
            Finding(
                "box-degenerate",
                message,
                name,
                int(broken.sum()),
                box_examples(table, broken, box_text(table)),
            )
        )
    wrong_format = _wrong_format(name, table, ~broken)
    if wrong_format:
        return [*findings, wrong_format]

    beyond = np.maximum.reduce(
        [-left, -top, left + width - image_width, top + height - image_height], initial=0, where=~broken
    )
    outside = ~broken & ~table.usable
    if outside.any():
        message = f"{share(int(outside.sum()), outside.size)} boxes are outside their image"
        findings.append(
            Finding(
                "box-outside",
                message,
                name,
                int(outside.sum()),
                box_examples(table, outside, box_text(table)),
            )
        )
    over = ~outside & (beyond > _SLACK)
    if over.any():
        message = (
            f"{share(int(over.sum()), over.size)} boxes reach beyond their image, by up to "
            f"{beyond[over].max():.0f} pixels"
        )
        examples = box_examples(table, over, lambda i: f"{beyond[i]:.0f} pixels beyond", worst=beyond)
        findings.append(Finding("box-beyond-edge", message, name, int(over.sum()), examples))
    findings += _duplicates(name, table)

    whole = ~table.ignored & (width >= _WHOLE * image_width) & (height >= _WHOLE * image_height)
    with_boxes, with_whole = np.unique(table.image).size, np.unique(table.image[whole]).size
    if 2 * with_whole >= with_boxes:
        message = f"{share(with_whole, with_boxes)} images with boxes have one as large as the image"
        findings.append(Finding("box-whole-image", message, name, with_whole, box_examples(table, whole)))
    return findings


def _wrong_format(name: str, table: Table, sound: np.ndarray) -> Finding | None:
    """Find that all boxes are written in another format than the one they were read as."""
    boxes = table.boxes[sound]
    sizes = table.sizes[table.image][sound][:, ::-1]  # (B, 2), width and height
    if len(boxes) and _fit(boxes, np.ones((1, 2)), slack=1e-3) >= _FITS and sizes.min() > 1:
        message = "all boxes lie within [0, 1]: coordinates relative to the image, read as pixels?"
        return Finding("box-format", message, name, len(boxes), box_examples(table, sound, box_text(table)))
    fits = _fits(boxes, sizes, _SLACK)
    misread = int((~fits).sum())
    if misread < max(1, _MISREAD * len(boxes)):
        return None
    left, top, width, height = boxes.T
    readings = {
        "left, top, right, bottom (XYXY)": np.stack([left, top, width - left, height - top], 1),
        "top, left, height, width (x and y swapped)": boxes[:, [1, 0, 3, 2]],
        "centre x, centre y, width, height": np.stack([left - width / 2, top - height / 2, width, height], 1),
    }
    reading, fit = max(
        ((text, _fit(other, sizes, _SLACK)) for text, other in readings.items()), key=lambda pair: pair[1]
    )
    if fit < _FITS:
        return None
    message = (
        f"{share(misread, len(boxes))} boxes reach beyond their image, read as left, top, width, height; "
        f"they fit as {reading}"
    )
    mask = sound.copy()
    mask[sound] = ~fits
    return Finding("box-format", message, name, misread, box_examples(table, mask, box_text(table)))


def _fits(boxes: np.ndarray, sizes: np.ndarray, slack: float) -> np.ndarray:
    """Return whether each box (B, 4) has an area and lies in its image of (width, height), (B, 2)."""
    low, extent = boxes[:, :2], boxes[:, 2:]
    inside = (low >= -slack) & (extent > 0) & (low + extent <= sizes + slack)
    return np.asarray(inside.all(1))


def _fit(boxes: np.ndarray, sizes: np.ndarray, slack: float) -> float:
    return float(_fits(boxes, sizes, slack).mean())


def _duplicates(name: str, table: Table) -> list[Finding]:
    """Find boxes of an image that are equal to the last digit."""
    findings = []
    # Ignored regions may repeat an object.
    kept = np.flatnonzero(~table.ignored)
    left, top, width, height = table.boxes[kept].T
    order = kept[np.lexsort((table.labels[kept], height, width, top, left, table.image[kept]))]
    boxes, image, labels = table.boxes[order], table.image[order], table.labels[order]
    same_box = (image[1:] == image[:-1]) & (boxes[1:] == boxes[:-1]).all(1)
    same_label = labels[1:] == labels[:-1]
    for code, same, what in (
        ("box-duplicate", same_box & same_label, "boxes repeat one of the same class"),
        ("box-two-classes", same_box & ~same_label, "boxes repeat one of another class"),
    ):
        if same.any():
            mask = np.zeros(table.labels.size, bool)
            mask[order[1:][same]] = True
            message = f"{share(int(same.sum()), kept.size)} {what}"
            findings.append(
                Finding(code, message, name, int(same.sum()), box_examples(table, mask, box_text(table)))
            )
    return findings
