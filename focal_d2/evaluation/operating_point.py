"""The operating point: the score from which detections count, as it is chosen and as checkpoints keep it.

D detections at IoU 0.5, all classes together.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from focal_d2.errors import UserError, first_few, one_line

# Its name in checkpoints.
OPERATING_POINT = "operating_point"
# The lowest score that programs show or return if the checkpoint has no operating point.
SCORE_WITHOUT_POINT = 0.3
# The beginning of the names of single classes' scores in an evaluator's results.
SCORE_OF = "score-"


class Goal(NamedTuple):
    """What a score is chosen for."""

    name: str  # "f1", "recall" or "precision"
    wanted: float  # the lowest recall or precision; not read for "f1"

    def in_words(self, figures: Mapping[str, float | None]) -> str:
        """Return the goal as a text that says whether the figures of the chosen score reach it."""
        if self.name == "f1":
            return "best F1"
        reached = (figures[self.name] or 0.0) >= self.wanted
        return f"{self.name} of at least {self.wanted:g}" + " (not reached)" * (not reached)


BEST_F1 = Goal("f1", 0.0)


class OperatingPoint(NamedTuple):
    """A score, and what it gives on the dataset that it was chosen on."""

    score: float
    precision: float
    recall: float
    f1: float
    goal: str  # in words
    chosen_on: str  # the dataset's name
    validation: bool  # whether that was a dataset of `DATASETS.VAL`
    # Scores of single classes that have enough boxes for one of their own, by name.
    per_class: Mapping[str, float] = {}

    def __str__(self) -> str:
        test_set = "" if self.validation else ", a test set"
        return (
            f"score {self.score:.3g}, {self.goal} on {self.chosen_on}{test_set} (precision "
            f"{self.precision:.3f}, recall {self.recall:.3f}, F1 {self.f1:.3f} there)"
            f"{self._scores_in_words()}"
        )

    def _scores_in_words(self) -> str:
        scores = [f"{name} {score:.3g}" for name, score in self.per_class.items()]
        return f"; of single classes: {first_few(scores)}" if scores else ""

    @classmethod
    def from_dict(cls, content: Any) -> OperatingPoint | None:
        """Return the point that a checkpoint holds as a dictionary; None for None.

        Raises:
            ValueError: if it is something else.
        """
        if content is None:
            return None
        # Older checkpoints have no scores of single classes.
        if not isinstance(content, dict) or {*content, "per_class"} != set(cls._fields):
            raise ValueError(f"the operating point is {one_line(content, 100)}")
        for name, x in content.items():
            if name == "validation":
                legal = isinstance(x, bool)
            elif name == "per_class":
                legal = isinstance(x, dict) and all(
                    isinstance(k, str) and isinstance(score, float) and 0 <= score <= 1
                    for k, score in x.items()
                )
            elif name in ("goal", "chosen_on"):
                legal = isinstance(x, str) and x.isprintable()
            else:
                legal = isinstance(x, float) and 0 <= x <= 1
            if not legal:
                raise ValueError(f"the operating point's {name} is {one_line(x, 100)}")
        return cls(**content)


def saved_point(content: Mapping[str, Any], checkpoint: str) -> OperatingPoint | None:
    """Return the operating point in a checkpoint's content; None if there is none, as in older checkpoints.

    Raises:
        UserError: if it is damaged; it names `checkpoint`.
    """
    try:
        return OperatingPoint.from_dict(content.get(OPERATING_POINT))
    except ValueError as error:
        raise UserError(f"{checkpoint} is damaged: {error}") from error


class Tally(NamedTuple):
    """Which detections are right.

    Attributes:
        scores: (D,) float64, falling.
        right: (D,) bool.
        boxes: number of boxes to detect.
    """

    scores: np.ndarray
    right: np.ndarray
    boxes: int


def choose(tally: Tally, goal: Goal) -> dict[str, float | None]:
    """Choose the score that meets the goal best.

    "f1": the score from which F1 is highest. "recall": the highest score from which the wanted recall is
    reached, or, if it is not reached, all detections. "precision": the score of highest recall of those from
    which the wanted precision is reached, or, if it is not reached, of highest precision. Of several scores
    the highest.

    Returns:
        "score", "precision", "recall" and "f1" from that score on; None without detections or boxes.
    """
    if not tally.boxes or not len(tally.scores):
        return dict.fromkeys(("score", "precision", "recall", "f1"))
    # Equal scores pass together.
    last = np.flatnonzero(np.append(tally.scores[1:] != tally.scores[:-1], True))
    right, number = np.cumsum(tally.right)[last], last + 1
    precision, recall = right / number, right / tally.boxes
    if goal.name == "f1":
        i = int(np.argmax(2 * right / (number + tally.boxes)))
    elif goal.name == "recall":
        reached = recall >= goal.wanted
        i = int(np.argmax(reached)) if reached.any() else len(last) - 1
    else:
        reached = precision >= goal.wanted
        i = int(np.argmax(np.where(reached, recall, -1) if reached.any() else precision))
    return figures_from(tally, float(tally.scores[last[i]]))


def figures_from(tally: Tally, score: float) -> dict[str, float | None]:
    """Return "score", and "precision", "recall" and "f1" of the detections from it on; None: not defined."""
    number = int(np.count_nonzero(tally.scores >= score))
    right = int(np.count_nonzero(tally.right[:number]))
    return {
        "score": score,
        "precision": right / number if number else None,
        "recall": right / tally.boxes if tally.boxes else None,
        "f1": 2 * right / (number + tally.boxes) if tally.boxes else None,
    }


def point_of(
    figures: Mapping[str, float], goal: Goal, *, chosen_on: str, validation: bool
) -> OperatingPoint | None:
    """Return the point that an evaluator has chosen; see `OperatingPoint`.

    Args:
        figures: "score", "precision", "recall" and "f1" of its results, NaN where not defined; and "score-"
            with the name of each class that has a score of its own.
        goal: what the score was chosen for.
        chosen_on: the dataset's name.
        validation: whether that is a dataset of `DATASETS.VAL`.
    """
    if not all(map(math.isfinite, figures.values())):
        return None
    score, precision, recall, f1 = (float(figures[x]) for x in ("score", "precision", "recall", "f1"))
    per_class = {x.removeprefix(SCORE_OF): float(figures[x]) for x in figures if x.startswith(SCORE_OF)}
    words = goal.in_words(figures)
    return OperatingPoint(score, precision, recall, f1, words, chosen_on, validation, per_class)
