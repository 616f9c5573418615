"""Compute α from the class imbalance of the training set, or from γ."""

from __future__ import annotations

import inspect
import logging

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from focal_d2.config import loss_parameters
from focal_d2.config.architectures import known_architecture
from focal_d2.data import load_table
from focal_d2.data.resolution import training_boxes
from focal_d2.data.sampling import training_table
from focal_d2.errors import UserError
from focal_d2.modeling.anchors import build_layout
from focal_d2.modeling.assigners import build_assigner
from focal_d2.modeling.label_counts import LabelCounts, count_labels
from focal_d2.modeling.losses import LOSSES
from focal_d2.modeling.losses.elementwise import AUTO, AUTO_PER_CLASS, PAPER_GAMMAS, FocalLoss, best_alpha

# Beyond these limits a few wrong labels would dominate the gradient (paper, table 1a: α = 0.999 loses 6 AP).
ALPHA_RANGE = (0.01, 0.99)

logger = logging.getLogger(__name__)


def resolve_alpha(cfg: CfgNode) -> CfgNode:
    """Replace `MODEL.FOCAL.LOSS.ALPHA` auto or auto_per_class by one number, or one for each class.

    "auto" balances cross entropy: with m positive and n negative anchors of the training set, α / (1 - α) =
    n / m (paper, section 3.1: "inverse class frequency"), within `ALPHA_RANGE`. The focal loss balances by γ
    already, so its α is `best_alpha`, without losses. "auto_per_class" is `per_class_alphas`.

    Args:
        cfg: full config.

    Returns:
        The config itself if ALPHA is neither of the two, or if the model is no `FocalRetinaNet` and does not
        read it. Otherwise a frozen copy with the numbers.

    Raises:
        UserError: if no anchor is positive, or the loss does not take such an α.
    """
    name, wanted = cfg.MODEL.FOCAL.LOSS.NAME, cfg.MODEL.FOCAL.LOSS.ALPHA
    if wanted not in (AUTO, AUTO_PER_CLASS) or known_architecture(cfg) != "FocalRetinaNet":
        return cfg
    losses = sorted(name for name, loss in LOSSES.items() if getattr(loss, "takes_auto_alpha", False))
    if name not in losses:
        raise UserError(
            f"MODEL.FOCAL.LOSS.ALPHA is {wanted}, which {name} does not take; these do: {', '.join(losses)}"
        )
    by_gamma = None
    if issubclass(LOSSES[name], FocalLoss):
        by_gamma = _alpha_of_gamma(cfg, wanted)
    if wanted == AUTO:
        alpha: float | list[float] = _balance(cfg) if by_gamma is None else by_gamma
    else:
        alpha = _balance_classes(cfg, by_gamma)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.FOCAL.LOSS.ALPHA = alpha
    cfg.freeze()
    return cfg


def _alpha_of_gamma(cfg: CfgNode, wanted: str) -> float:
    """Return the α that is best for the γ of a focal loss, and log it."""
    name = cfg.MODEL.FOCAL.LOSS.NAME
    parameter = inspect.signature(LOSSES[name].__init__).parameters.get("gamma")
    gamma = loss_parameters(cfg).get("GAMMA", None if parameter is None else parameter.default)
    if gamma in (None, inspect.Parameter.empty):
        raise UserError(
            f"MODEL.FOCAL.LOSS.ALPHA is {wanted}, which follows from γ, but no GAMMA is known of the loss "
            f"{name}: give a number, or a list of one for each class"
        )
    try:
        alpha = best_alpha(gamma)
    except ValueError as error:
        raise UserError(f"MODEL.FOCAL.LOSS ({name}): {error}") from error
    if gamma in PAPER_GAMMAS:
        source = "table 1b"
    elif gamma < PAPER_GAMMAS[-1]:
        source = "table 1b, linear between its values of γ"
    else:
        source = f"table 1b, that of its highest γ, {PAPER_GAMMAS[-1]:g}"
    receiver = "" if wanted == AUTO else "the mean class gets "
    logger.info(
        f"MODEL.FOCAL.LOSS.ALPHA {wanted}: {receiver}{alpha:g}, the paper's best α for γ {gamma:g} ({source})"
    )
    return alpha


def per_class_alphas(positives: np.ndarray, negatives: int, *, mean_alpha: float | None) -> np.ndarray:
    """Balance each class by its frequency: α_k / (1 - α_k) = c · n_k / m_k, within `ALPHA_RANGE`.

    m_k is the number of positive anchors of class k, n_k that of all others that are not ignored. A class
    without positive anchors gets the α of the mean class. The mean class has as many positives as the classes
    with positives have on average.

    Args:
        positives: (K,) int, m_k; at least one is above 0.
        negatives: anchors of the background.
        mean_alpha: the α that the mean class gets, which determines c; None: c is 1.

    Returns:
        (K,) float64.
    """
    counted = positives.sum() + negatives
    mean = positives[positives > 0].mean()
    filled = np.where(positives > 0, positives, mean)
    odds = (counted - filled) / filled
    if mean_alpha is not None:
        odds *= mean_alpha / (1 - mean_alpha) / ((counted - mean) / mean)
    return (odds / (1 + odds)).clip(*ALPHA_RANGE)


def _balance(cfg: CfgNode) -> float:
    positives, negatives = count_anchors(cfg)
    balanced = negatives / (positives + negatives)
    alpha = min(max(balanced, ALPHA_RANGE[0]), ALPHA_RANGE[1])
    logger.info(
        f"MODEL.FOCAL.LOSS.ALPHA auto: {positives} positive and {negatives} negative anchors "
        f"(1 : {negatives / positives:.0f}) give {balanced:.4f}; using {alpha:.4f}"
    )
    return alpha


def _balance_classes(cfg: CfgNode, mean_alpha: float | None) -> list[float]:
    positives, negatives = count_anchors_by_class(cfg)
    alphas = per_class_alphas(positives, negatives, mean_alpha=mean_alpha)
    most, least = int(positives.argmax()), int(np.where(positives > 0, positives, positives.max()).argmin())
    names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).get("thing_classes", [])
    names = names if len(names) == len(alphas) else range(len(alphas))
    without = int((positives == 0).sum())
    logger.info(
        f"MODEL.FOCAL.LOSS.ALPHA auto_per_class: {alphas[most]:.4f} for class {names[most]} "
        f"({positives[most]} positive anchors, the most) to {alphas[least]:.4f} for class {names[least]} "
        f"({positives[least]}, the fewest); {without} {'class has' if without == 1 else 'classes have'} none"
    )
    if len(alphas) > 1 and (alphas == ALPHA_RANGE[1]).all():
        logger.warning(
            "MODEL.FOCAL.LOSS.ALPHA auto_per_class: all classes are so rare that each gets the highest, "
            f"{ALPHA_RANGE[1]}: they are not balanced among each other"
        )
    return [float(x) for x in alphas]


def count_anchors(cfg: CfgNode) -> tuple[int, int]:
    """Count positive and negative anchors over the training set, at training resolution but not cropped.

    Args:
        cfg: full config; of a large training set 1000 images are counted.

    Raises:
        UserError: if no anchor is positive.
    """
    counts = _count(cfg)
    return sum(counts.positives), sum(counts.negatives)


def count_anchors_by_class(cfg: CfgNode) -> tuple[np.ndarray, int]:
    """Count as `count_anchors` does: the positive anchors of each class (K,), and the negative anchors."""
    counts = _count(cfg)
    classes = np.zeros(cfg.MODEL.RETINANET.NUM_CLASSES, dtype=np.int64)
    classes[: len(counts.by_class)] = counts.by_class
    return classes, sum(counts.negatives)


def _count(cfg: CfgNode) -> LabelCounts:
    table = training_table(cfg, [(name, load_table(name).whole()) for name in cfg.DATASETS.TRAIN])
    seen = training_boxes(cfg, table)
    counts = count_labels(
        seen.boxes,
        seen.image,
        seen.sizes,
        layout=build_layout(cfg),
        assigner=build_assigner(cfg),
        classes=table.labels[seen.rows],
    )
    if not sum(counts.positives):
        wanted = cfg.MODEL.FOCAL.LOSS.ALPHA
        raise UserError(f"MODEL.FOCAL.LOSS.ALPHA is {wanted}, but no anchor of DATASETS.TRAIN is positive")
    return counts
