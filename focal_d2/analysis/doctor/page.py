"""A report as one HTML file, pictures included."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from PIL import Image, ImageDraw

from focal_d2.analysis.doctor.examination import Report
from focal_d2.analysis.doctor.text import (
    as_fix_list,
    level_rows,
    memory_line,
    notes,
    share_rows,
    summary,
    use_counts,
)
from focal_d2.analysis.doctor.training import AnchorFacts
from focal_d2.data.checks.findings import Example, Finding
from focal_d2.data.checks.kinds import NOTE
from focal_d2.data.image_files import UNREADABLE, open_image
from focal_d2.data.pixels import read_with_pillow

# Colours that can be distinguished with any colour vision (Okabe and Ito).
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#9aa3ab"
_OF_USE = ((_BLUE, "o"), (_ORANGE, "D"), (_GREY, "s"))  # of the uses of datasets
# A plot of classes has at most so many rows. If there are more classes, it shows the most frequent ones above
# and the least frequent ones below.
_MOST_ROWS, _TOP_ROWS = 40, 25

_THUMBNAIL = 200  # pixels
# A thumbnail shows at least so many pixels of the image around a box.
_LEAST_VIEW = 96


class Picture(NamedTuple):
    """The content of a <figure> element."""

    source: str
    caption: str
    file_name: str = ""  # the image that it was made from


def as_page(report: Report, *, title: str, max_pixels: int | None) -> str:
    """Return the page.

    Args:
        report: what to show.
        title: of the page.
        max_pixels: `INPUT.FOCAL.MAX_PIXELS`, for the images of the thumbnails; None: no thumbnails.
    """
    template = resources.files("focal_d2.analysis.doctor").joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    anchors = report.anchors
    return environment.from_string(template).render(
        title=title,
        summary=summary(report),
        findings=[_card(finding, max_pixels) for finding in report.findings if finding.severity != NOTE],
        notes=notes(report),
        fixes=as_fix_list(report, base=title),
        datasets=[(d.name, d.use, d.images, d.without_boxes, d.boxes, d.ignored) for d in report.datasets],
        plots=_plots(report),
        sizes=share_rows(anchors.by_size) if anchors else [],
        classes=share_rows(anchors.by_class) if anchors else [],
        levels=level_rows(anchors) if anchors else [],
        memory=memory_line(report.memory) if report.memory else "",
    )


def _card(finding: Finding, max_pixels: int | None) -> dict[str, Any]:
    pictures, lines = [], []
    for example in finding.examples:
        source = _thumbnail(example, max_pixels) if max_pixels else None
        if source:
            name = Path(example.file_name).name
            pictures.append(Picture(source, str(example._replace(file_name=name)), example.file_name))
        else:
            lines.append(str(example))
    return {
        "severity": finding.severity,
        "code": finding.code,
        "dataset": finding.dataset,
        "message": finding.message,
        "remedy": finding.remedy,
        "pictures": pictures,
        "lines": lines,
    }


def _thumbnail(example: Example, max_pixels: int) -> str | None:
    """Draw the image around the box, grey outside the image; None if the image cannot be read."""
    try:
        image = Image.fromarray(read_with_pillow(example.file_name, "RGB", max_pixels=max_pixels))
    except UNREADABLE:
        return None
    left, top, right, bottom = _view(image.size, example.box)
    scale = _THUMBNAIL / max(right - left, bottom - top)
    size = max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale))
    # Reduce by a whole factor first, because the affine transform does not smooth.
    step = max(1, math.floor(1 / scale))
    remaining = 1 / (scale * step)
    thumbnail = image.reduce(step).transform(
        size,
        Image.Transform.AFFINE,
        (remaining, 0, left / step, 0, remaining, top / step),
        Image.Resampling.BILINEAR,
        fillcolor=(205, 208, 212),
    )
    if example.box and _is_drawable(example.box):
        x, y, width, height = example.box
        x0, y0 = (x - left) * scale, (y - top) * scale
        x1, y1 = x0 + width * scale, y0 + height * scale
        draw = ImageDraw.Draw(thumbnail)
        # Orange with white edges is visible on any background.
        draw.rectangle([x0 - 1, y0 - 1, x1 + 1, y1 + 1], outline="white", width=4)
        draw.rectangle([x0, y0, x1, y1], outline=_ORANGE, width=2)
    return _data_uri(thumbnail, "JPEG")


def _is_drawable(box: Sequence[float]) -> bool:
    return all(map(math.isfinite, box)) and box[2] >= 0 and box[3] >= 0


def _view(size: tuple[int, int], box: Sequence[float] | None) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of the part to show: the box, its surroundings, part of the image."""
    if not box or not _is_drawable(box):
        return 0, 0, *size
    ends = np.array([box[:2], np.add(box[:2], box[2:])])  # (2, 2): left, top; right, bottom
    whole = np.minimum(ends[0], 0), np.maximum(ends[1], size)
    if (ends[0] >= size).any() or (ends[1] <= 0).any():
        view = whole
    else:
        around = max(_LEAST_VIEW, 2 * max(box[2:])) / 2
        view = np.maximum(ends.mean(0) - around, whole[0]), np.minimum(ends.mean(0) + around, whole[1])
    (left, top), (right, bottom) = np.array(view).tolist()
    return left, top, right, bottom


def _plots(report: Report) -> list[Picture]:
    facts = report.anchors
    if facts is None:
        return []
    with (
        matplotlib.rc_context(
            {
                "font.size": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "font.family": "DejaVu Sans",
            }
        ),
        warnings.catch_warnings(),
    ):
        # The font lacks the letters of some scripts. The report's table shows these names as well.
        warnings.filterwarnings("ignore", message="Glyph ")
        return [
            Picture(_plot_sizes(facts), "Width and height of the boxes to train on, at training resolution"),
            Picture(_plot_iou(facts), "IoU of each box with its best anchor"),
            Picture(_plot_levels(facts), "Positive and negative anchors of each level"),
            Picture(_plot_classes(report), "Boxes of each class"),
        ]


def _plot_sizes(facts: AnchorFacts) -> str:
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axes = figure.subplots()
    anchors = np.array([pair for level in facts.levels for pair in level.anchors])  # (R, 2)
    low = min(facts.extents.min(), anchors.min()) / 1.2
    high = max(facts.extents.max(), anchors.max()) * 1.2
    edges = np.geomspace(max(low, 0.5), high, 80)
    width, height = facts.extents.clip(edges[0]).T
    counts, _, _ = np.histogram2d(width, height, bins=[edges, edges])
    drawn = axes.pcolormesh(
        edges, edges, np.ma.masked_equal(counts.T, 0), cmap="Blues", norm=matplotlib.colors.LogNorm(vmin=0.3)
    )
    drawn.set_rasterized(True)
    axes.plot(*anchors.T, "+", color=_ORANGE, markersize=9, markeredgewidth=1.6, label="anchors")
    axes.set(xscale="log", yscale="log", xlabel="width, pixels", ylabel="height, pixels")
    ticks = [2**k for k in range(12) if edges[0] <= 2**k <= edges[-1]]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="upper left", frameon=False)
    return _figure_uri(figure)


def _plot_iou(facts: AnchorFacts) -> str:
    figure = Figure(figsize=(5.6, 4.4), layout="constrained")
    axes = figure.subplots()
    bins = len(facts.best_iou)
    left = np.arange(bins) / bins
    colors = [_BLUE if x + 1e-9 >= facts.threshold else _ORANGE for x in left]
    axes.bar(left, facts.best_iou, 1 / bins, align="edge", color=colors, edgecolor="white", linewidth=0.5)
    axes.axvline(facts.threshold, color="black", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), xlabel=f"IoU; positive from {facts.threshold:g}", ylabel="boxes")
    return _figure_uri(figure)


def _plot_levels(facts: AnchorFacts) -> str:
    figure = Figure(figsize=(5.6, 3.2), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(facts.levels))
    for name, color, marker in (("positives", _ORANGE, "o"), ("negatives", _BLUE, "s")):
        values = np.array([getattr(level, name) for level in facts.levels])
        shown = values > 0
        axes.plot(values[shown], rows[shown], marker, color=color, label=name, markersize=7)
    axes.set(xscale="log", xlabel="anchors", ylabel="stride, pixels")
    axes.set_yticks(rows, [str(level.stride) for level in facts.levels])
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6e8eb")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return _figure_uri(figure)


def _plot_classes(report: Report) -> str:
    """Plot a row for each class and a dot for each use. The axis is linear below 1, so that it has a zero."""
    columns = use_counts(report.datasets)
    names = sorted(
        {name for counts in columns.values() for name in counts},
        key=lambda name: (-max(counts.get(name, 0) for counts in columns.values()), name),
    )
    gap = len(names) > _MOST_ROWS
    if gap:
        names = [*names[:_TOP_ROWS], "…", *names[_TOP_ROWS - _MOST_ROWS :]]
    figure = Figure(figsize=(5.6, 1.1 + 0.24 * max(len(names), 3)), layout="constrained")
    axes = figure.subplots()
    for (use, counts), (color, marker) in zip(columns.items(), _OF_USE, strict=False):
        rows = [i for i, name in enumerate(names) if not (gap and i == _TOP_ROWS)]
        values = [counts.get(names[i], 0) for i in rows]
        axes.plot(values, rows, marker, color=color, label=f"to {use}", markersize=6)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.15, 1.6 * max(1, *(n for counts in columns.values() for n in counts.values())))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    shown = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    axes.set_yticks(range(len(names)), shown, parse_math=False)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(color="#e6e8eb")
    axes.set_xlabel("boxes")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(columns), frameon=False)
    return _figure_uri(figure)


def _figure_uri(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130)
    return _data_uri(open_image(stream, max_pixels=None).convert("RGB").quantize(256), "PNG")


def _data_uri(image: Image.Image, style: str) -> str:
    stream = io.BytesIO()
    image.save(stream, style, quality=80, optimize=True)
    return f"data:image/{style.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
