"""Search anchor sizes and aspect ratios that fit the boxes of a training set.

The search keeps the detector's structure: the same octaves on every level, the same ratios for every size.
Level l has the sizes base · growth^(l + e_k), with e_1 = 0 and the other e_k in [0, 1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from scipy.optimize import differential_evolution

from focal_d2.analysis.anchors.coverage import AnchorGrids, best_anchors, grids_of, recall
from focal_d2.annotations import Table
from focal_d2.data.resolution import TrainingBoxes, training_boxes
from focal_d2.errors import UserError, escaped
from focal_d2.modeling.anchors import AnchorLayout
from focal_d2.modeling.assigners import Assigner, assigner_name, build_assigner
from focal_d2.modeling.label_counts import count_labels

THRESHOLDS = (0.5, 0.6, 0.7)
# A fall of recall that is worth a line.
_POINT = 0.01
# The weight of recall compared with mean IoU; see `score`.
_RECALL_WEIGHT = 3.0
# Boxes in the search: the standard error of recall on so many is at most 0.7 per cent.
_SAMPLE = 5000
# The smallest anchors, in strides of the finest level; RetinaNet's: 4.
_BASES = (1.0, 16.0)
# From a level to the next; strides double.
_GROWTHS = (1.5, 2.5)
_LARGEST_RATIO = 8.0
# Differential evolution: at most so many generations of so many candidates a parameter; it stops once the
# candidates' scores differ by less than so much of their mean.
_GENERATIONS = 60
_POPULATION = 12
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class AnchorSettings:
    """`MODEL.ANCHOR_GENERATOR.SIZES` and `ASPECT_RATIOS`."""

    sizes: list[list[float]]  # L × pixels: roots of areas
    ratios: list[float]  # height / width

    def __str__(self) -> str:
        sizes, ratios = len(self.sizes[0]), len(self.ratios)
        return f"{sizes * ratios} ({sizes} sizes × {ratios} ratios)"

    def as_yaml(self) -> str:
        """Return the lines to paste into a config."""
        node = {"SIZES": self.sizes, "ASPECT_RATIOS": [self.ratios]}
        content = {"MODEL": {"ANCHOR_GENERATOR": node}}
        return yaml.safe_dump(content, sort_keys=False, default_flow_style=None)


@dataclass(frozen=True)
class Fit:
    """How well anchors fit a set of boxes."""

    boxes: int
    recall: list[float]  # share of boxes whose best anchor reaches an IoU, for each of THRESHOLDS
    mean_iou: float  # of the best anchors
    missed: int  # boxes whose best anchor is below the threshold for positives of the assigner iou
    positives_per_box: float  # anchors that the config's assigner gives a box, at most 1000 images counted
    negatives_per_positive: float | None  # None without a positive


@dataclass(frozen=True)
class Comparison:
    """A config's anchors and the proposed ones, compared."""

    current: AnchorSettings
    proposed: AnchorSettings
    better: bool  # whether the proposal's score is higher on held-out images, or on all if there are none
    threshold: float  # from which IoU on the assigner iou calls an anchor positive
    assigner: str  # the config's
    before: dict[str, Fit]  # "fitted", "held out" and names of test sets
    after: dict[str, Fit]

    @property
    def chosen(self) -> AnchorSettings:
        """The proposal if it is better, else what the config has."""
        return self.proposed if self.better else self.current

    def losses(self) -> list[str]:
        """Return a warning for each recall that falls by a point or more on boxes outside the fitted ones."""
        return [
            f"Careful: {name}: recall at IoU {at} falls from {100 * before:.1f} to {100 * after:.1f} %."
            for name in self.before
            if name != "fitted"
            for at, before, after in zip(
                THRESHOLDS, self.before[name].recall, self.after[name].recall, strict=True
            )
            if after <= before - _POINT
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return all numbers, for JSON."""
        extra = {"thresholds": list(THRESHOLDS), "chosen": asdict(self.chosen), "losses": self.losses()}
        return {**asdict(self), **extra}

    def as_text(self) -> str:
        """Write the comparison for a terminal: both kinds of anchors on each set of boxes, and the YAML."""
        head = [f"IoU >= {at}" for at in THRESHOLDS] + ["mean IoU", "missed", "positives", "negatives"]
        lines = [f"{'share of boxes with an anchor at':<32}" + "".join(f"{x:>11}" for x in head)]
        for name in self.before:
            lines.append(f"{escaped(name)}, {self.before[name].boxes} boxes")
            for when, fit in (("now", self.before[name]), ("proposed", self.after[name])):
                columns = [f"{100 * x:.1f} %" for x in fit.recall] + [f"{fit.mean_iou:.3f}", str(fit.missed)]
                ratio = fit.negatives_per_positive
                columns += [f"{fit.positives_per_box:.2f}", "-" if ratio is None else f"{ratio:.0f}"]
                lines.append(f"  {when:<30}" + "".join(f"{x:>11}" for x in columns))
        lines += [
            f"missed: boxes below IoU {self.threshold:g}. positives: a box. negatives: a positive.",
            f"anchors a cell: now {self.current}, proposed {self.proposed}",
        ]
        if self.assigner != "iou":
            lines.append(
                f"MODEL.FOCAL.ASSIGNER.NAME is {self.assigner}: positives and negatives are those of "
                f"{self.assigner}, all other columns are IoUs, which it does not require."
            )
        if not self.better:
            lines.append(
                "On images outside the search the proposal fits no better: keep the current anchors."
            )
        lines += self.losses()
        return "\n".join([*lines, "", self.chosen.as_yaml().rstrip()])


def compare_anchors(
    cfg: CfgNode,
    layout: AnchorLayout,
    train: Sequence[Table],
    tests: Mapping[str, Table],
    *,
    num_sizes: int | None,
    num_ratios: int | None,
    seed: int,
) -> Comparison:
    """Search anchors on half of the training images, and compare them with the config's on the rest.

    All images, also those of test sets, have the training resolution and are not cropped. If training turns
    images by 90 degrees, training boxes are counted both as they are and turned.

    Args:
        cfg: full config.
        layout: `build_layout(cfg)`.
        train: the training sets.
        tests: other sets to compare on, by name.
        num_sizes: on each level; None: as many as the config has.
        num_ratios: of each size; None: as many as the config has.
        seed: of the halves, the sample and the search.

    Raises:
        UserError: if the training set has no box to fit, or the anchors are not of detectron2's default kind.
    """
    grids = grids_of(layout)
    current = _settings_of(cfg, levels=len(grids.shapes))
    threshold = cfg.MODEL.RETINANET.IOU_THRESHOLDS[-1]
    rng = np.random.default_rng(seed)
    boxes, fitted = _split_images(cfg, train, rng)
    sample = _select(boxes, rng.permutation(np.flatnonzero(fitted))[:_SAMPLE])
    proposed = fit_anchors(
        sample.boxes,
        sample.image,
        sample.sizes,
        grids,
        num_sizes=num_sizes or len(current.sizes[0]),
        num_ratios=num_ratios or len(current.ratios),
        threshold=threshold,
        seed=seed,
    )
    parts = {"fitted": _select(boxes, fitted)}
    if not fitted.all():
        parts["held out"] = _select(boxes, ~fitted)
    deciding = list(parts)[-1]
    parts |= {name: training_boxes(cfg, table) for name, table in tests.items()}
    parts = {name: part for name, part in parts.items() if len(part.boxes)}
    assigner = build_assigner(cfg)
    fits, scores = [], []
    for settings in (current, proposed):
        grid = replace_anchors(settings, grids)
        best = {name: best_anchors(p.boxes, p.image, p.sizes, grid).iou for name, p in parts.items()}
        scores.append(score(best[deciding], threshold))
        fits.append(
            {name: _fit(part, best[name], threshold, grid.layout, assigner) for name, part in parts.items()}
        )
    return Comparison(current, proposed, scores[1] > scores[0], threshold, assigner_name(cfg), *fits)


def _split_images(
    cfg: CfgNode, train: Sequence[Table], rng: np.random.Generator
) -> tuple[TrainingBoxes, np.ndarray]:
    """Return the boxes of all training images, and which of them (B,) bool are in the half to fit on.

    Raises:
        UserError: if there is no box.
    """
    boxes = _joined([training_boxes(cfg, table) for table in train])
    if not len(boxes.boxes):
        raise UserError("DATASETS.TRAIN has no box that could be fitted: none, or all ignored or empty")
    images = rng.permutation(np.unique(boxes.image))
    half = images[: (len(images) + 1) // 2]
    if cfg.INPUT.FOCAL.ROTATE_90:
        half = np.concatenate([half, half + len(boxes.sizes)])
        boxes = _joined([boxes, _swap_axes(boxes)])
    return boxes, np.isin(boxes.image, half)


def fit_anchors(
    boxes: np.ndarray,
    image: np.ndarray,
    sizes: np.ndarray,
    grids: AnchorGrids,
    *,
    num_sizes: int,
    num_ratios: int,
    threshold: float,
    seed: int,
) -> AnchorSettings:
    """Search the anchors of the highest `score` by differential evolution, starting from k-means.

    Args:
        boxes: (B, 4) XYXY in the pixels of `sizes`, B ≥ 1.
        image: (B,) the image of each.
        sizes: (N, 2) height and width of the images.
        grids: of the anchors; their shapes are not used.
        num_sizes: on each level.
        num_ratios: of each size.
        threshold: from which IoU an anchor is positive.
        seed: of the search; the same seed gives the same anchors.
    """
    levels, stride = len(grids.layout.strides), grids.layout.strides[0]
    sides = boxes[:, 2:] - boxes[:, :2]
    bounds = [np.log(np.array(_BASES) * stride), np.log(_GROWTHS)]
    bounds += [(0.0, 1.0)] * (num_sizes - 1) + [np.log([1 / _LARGEST_RATIO, _LARGEST_RATIO])] * num_ratios

    def settings(x: np.ndarray) -> AnchorSettings:
        octaves = np.sort([0.0, *x[2 : 1 + num_sizes]])
        level_sizes = np.exp(x[0] + x[1] * (np.arange(levels)[:, None] + octaves))
        ratios = np.sort(np.exp(x[1 + num_sizes :]))
        return AnchorSettings(level_sizes.round(2).tolist(), ratios.round(3).tolist())

    def cost(x: np.ndarray) -> float:
        return -score(best_anchors(boxes, image, sizes, replace_anchors(settings(x), grids)).iou, threshold)

    low, high = np.array(bounds).T
    start = _start(sides, levels, num_sizes, num_ratios).clip(low, high)
    optimum = differential_evolution(
        cost,
        np.array(bounds),
        maxiter=_GENERATIONS,
        popsize=_POPULATION,
        tol=_TOLERANCE,
        seed=seed,
        x0=start,
        polish=False,  # recall has no gradient
    )
    return settings(optimum.x)


def score(iou: np.ndarray, threshold: float) -> float:
    """Return the number that the search maximises, from the IoU (B,) of each box with its best anchor.

    It is 3 · recall at the threshold + mean IoU.

    Training needs recall. But recall changes in steps and is often near 1 already. Mean IoU orders anchors of
    equal recall, moves missed boxes closer to the threshold, and makes the regression easier. With equal
    weights, the search lost boxes in exchange for a better mean.
    """
    return _RECALL_WEIGHT * recall(iou, threshold) + float(iou.mean())


def kmeans_iou(sides: np.ndarray, clusters: int) -> np.ndarray:
    """Cluster widths and heights by k-means on 1 - IoU (YOLO9000, arXiv 1612.08242, section 2).

    The IoU is that of boxes with the same centre. k-means of libraries have Euclidean distance only. The
    first centres are boxes evenly spread over the sorted areas.

    Args:
        sides: (B, 2) width and height, B ≥ 1, above 0.
        clusters: k.

    Returns:
        (k, 2) centres in ascending order of area. A centre that is nearest to no box does not move.
    """
    areas = sides.prod(axis=1)
    order = np.argsort(areas, kind="stable")
    spread = (np.arange(clusters) + 0.5) / clusters * len(sides)
    centres = sides[order[spread.astype(np.int64)]].copy()
    nearest = np.full(len(sides), -1)
    for _ in range(100):
        overlap = np.minimum(sides[:, None], centres).prod(axis=2)
        closest = (overlap / (areas[:, None] + centres.prod(axis=1) - overlap)).argmax(axis=1)
        if (closest == nearest).all():
            break
        nearest = closest
        for k in np.unique(nearest):
            centres[k] = sides[nearest == k].mean(axis=0)
    return centres[np.argsort(centres.prod(axis=1), kind="stable")]


def _start(sides: np.ndarray, levels: int, num_sizes: int, num_ratios: int) -> np.ndarray:
    """Return the first parameters of the search, from k-means with as many clusters as anchor shapes."""
    centres = kmeans_iou(sides, levels * num_sizes * num_ratios)
    logs = np.log(centres.prod(axis=1)) / 2
    growth = max((logs[-1] - logs[0]) / max(levels - 1 / num_sizes, 1), np.log(_GROWTHS[0]))
    quantiles = (np.arange(num_ratios) + 0.5) / num_ratios
    ratios = np.quantile(np.log(centres[:, 1] / centres[:, 0]), quantiles)
    return np.concatenate([[logs[0], growth], np.arange(1, num_sizes) / num_sizes, ratios])


def replace_anchors(settings: AnchorSettings, grids: AnchorGrids) -> AnchorGrids:
    """Return a model's grids with other anchors in each cell."""
    generator = DefaultAnchorGenerator(
        sizes=settings.sizes,
        aspect_ratios=[settings.ratios],
        strides=grids.layout.strides,
        offset=grids.offset,
    )
    return grids_of(grids.layout._replace(generator=generator))


def _settings_of(cfg: CfgNode, *, levels: int) -> AnchorSettings:
    """Read the anchors of the config, where one list may be for all levels.

    Raises:
        UserError: for ratios that differ from level to level.
    """
    node = cfg.MODEL.ANCHOR_GENERATOR
    sizes, ratios = (x if isinstance(x[0], (list, tuple)) else [x] for x in (node.SIZES, node.ASPECT_RATIOS))
    if any(list(x) != list(ratios[0]) for x in ratios):
        raise UserError("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS differ from level to level; one list is needed")
    sizes = sizes if len(sizes) == levels else [*sizes] * levels
    return AnchorSettings([[float(x) for x in level] for level in sizes], [float(x) for x in ratios[0]])


def _joined(parts: Sequence[TrainingBoxes]) -> TrainingBoxes:
    """Concatenate sets of images."""
    firsts = np.cumsum([0, *(len(part.sizes) for part in parts[:-1])])
    moved = [p._replace(image=p.image + first) for p, first in zip(parts, firsts, strict=True)]
    return TrainingBoxes(*(np.concatenate(column) for column in zip(*moved, strict=True)))


def _swap_axes(boxes: TrainingBoxes) -> TrainingBoxes:
    """Exchange x and y."""
    return boxes._replace(boxes=boxes.boxes[:, [1, 0, 3, 2]], sizes=boxes.sizes[:, ::-1])


def _select(boxes: TrainingBoxes, rows: np.ndarray) -> TrainingBoxes:
    """Keep the boxes with these indices, or with True in (M,) bool, and their images."""
    images, image = np.unique(boxes.image[rows], return_inverse=True)
    return TrainingBoxes(boxes.rows[rows], image, boxes.boxes[rows], boxes.sizes[images])


def _fit(
    boxes: TrainingBoxes, iou: np.ndarray, threshold: float, layout: AnchorLayout, assigner: Assigner
) -> Fit:
    counts = count_labels(boxes.boxes, boxes.image, boxes.sizes, layout=layout, assigner=assigner)
    positives, negatives = sum(counts.positives), sum(counts.negatives)
    return Fit(
        boxes=len(iou),
        recall=[recall(iou, at) for at in THRESHOLDS],
        mean_iou=float(iou.mean()),
        missed=int((iou < threshold).sum()),
        positives_per_box=positives / counts.boxes,
        negatives_per_positive=negatives / positives if positives else None,
    )
