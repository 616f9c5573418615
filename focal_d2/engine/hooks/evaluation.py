"""Evaluation during training: it saves the best model, and ends a training that no longer improves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm

from focal_d2.data.datasets import is_annotated, known_class_names
from focal_d2.detectron2_compat import EvaluationHooks
from focal_d2.engine.evaluators import detection_limits, goal_of
from focal_d2.errors import UserError
from focal_d2.evaluation import metric_names
from focal_d2.evaluation.operating_point import OPERATING_POINT, OperatingPoint, point_of
from focal_d2.storage.checkpoint import FocalCheckpointer

logger = logging.getLogger(__name__)

# The beginning of the names of a validation's metrics in metrics.json.
_VALIDATION = "validation/"


class TrainingEnded(BaseException):
    """Ends detectron2's loop early. It is no `Exception`, which detectron2 would log as a failure."""


class Evaluation(EvaluationHooks, EvalHook):
    """detectron2's evaluation hook. It also saves the best model, and ends a training without improvement.

    If `DATASETS.VAL` names datasets, they are evaluated during training and at its end, and the test sets at
    its end only. Without it, the test sets are evaluated every time.

    detectron2's `BestCheckpointer` is not enough: it loses the best value when training resumes, marks
    model_best.pth as the checkpoint to resume from, and does not count evaluations.

    All processes keep the same state, from the main process's results. A checkpoint that is due at the same
    iteration is written before the evaluation; if the evaluation fails, one is always written. A training
    that resumes from such a checkpoint starts with the evaluation.
    """

    def __init__(
        self,
        cfg: CfgNode,
        checkpointer: FocalCheckpointer,
        *,
        test: Callable[[OperatingPoint | None], dict[str, Any]],
        validate: Callable[[], dict[str, Any]],
    ) -> None:
        """Begin without a best value.

        Args:
            cfg: full config.
            checkpointer: saves model_best, and model_final if training ends early.
            test: evaluates the test sets at an operating point, or each at its own; see `DefaultTrainer.test`
                for what it returns.
            validate: the same for `DATASETS.VAL`, under the name "validation".
        """
        super().__init__(cfg.TEST.EVAL_PERIOD, self._measure, eval_after_train=False)
        self._every = cfg.TEST.EVAL_PERIOD
        self._validates = bool(cfg.DATASETS.VAL)
        self._test_sets = list(cfg.DATASETS.TEST)
        self._test, self._current = test, validate if self._validates else partial(test, None)
        self._sets = list(cfg.DATASETS.VAL or cfg.DATASETS.TEST)  # what is chosen is chosen on these
        self._goal = goal_of(cfg)
        self._checkpointer = checkpointer
        # Its name in metrics.json; larger is better. "": there is no best model.
        self._metric = cfg.TEST.FOCAL.BEST_METRIC
        if self._metric and self._validates:
            self._metric = f"{_VALIDATION}{self._metric}"
        # Evaluations without improvement after which training ends; 0: never.
        self._patience = cfg.TEST.FOCAL.PATIENCE
        self._results: dict[str, Any] = {}  # of the last evaluation
        self._best = -math.inf
        self._best_iteration = 0  # iterations done at the best evaluation
        self._evaluated = 0  # iterations done at the last evaluation
        self._since = 0  # evaluations without improvement
        self._point: OperatingPoint | None = None  # of the last evaluation

    def _measure(self) -> dict[str, Any]:
        self._results = self._current()
        return self._results

    def state_dict(self) -> dict[str, Any]:
        """Return the metric, its best value and the counts, as plain numbers."""
        return {
            "metric": self._metric,
            "best": self._best,
            "best_iteration": self._best_iteration,
            "evaluated": self._evaluated,
            "since": self._since,
            **({} if self._point is None else {OPERATING_POINT: self._point._asdict()}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; the best value of another metric is dropped.

        Raises:
            ValueError: if a value is of another type than in `state_dict`.
        """
        self._point = None
        for name, ours in self.state_dict().items():
            kinds = (int, float) if name == "best" else (type(ours),)
            if not isinstance(state_dict[name], kinds):
                raise ValueError(f"the evaluation's {name} is a {type(state_dict[name]).__name__}")
        self._point = OperatingPoint.from_dict(state_dict.get(OPERATING_POINT))
        self._evaluated = state_dict["evaluated"]
        if state_dict["metric"] != self._metric:
            if state_dict["metric"]:
                logger.warning(
                    f"TEST.FOCAL.BEST_METRIC was {state_dict['metric']} and is {self._metric or 'none'}: the "
                    "best so far is forgotten"
                )
            return
        self._best = state_dict["best"]
        self._best_iteration = state_dict["best_iteration"]
        self._since = state_dict["since"]

    def before_train(self) -> None:
        """Run the evaluation that was due when the checkpoint was written."""
        if self._metric and not self._validates and comm.is_main_process():
            logger.warning(
                f"DATASETS.VAL is empty: the best model is chosen by {self._metric} of the test set "
                f"({', '.join(self._test_sets)}), where its AP is then too high"
            )
        done = self.trainer.start_iter
        due = self._every > 0 and done > 0 and done % self._every == 0
        if due and self._evaluated < done < self.trainer.max_iter:
            with self._after(done):
                self.evaluate()

    def before_step(self) -> None:
        """End training if there were too many evaluations without improvement.

        Raises:
            TrainingEnded: with model_final.pth saved.
        """
        if not 0 < self._patience <= self._since:
            return
        done = self.trainer.iter
        logger.info(
            f"{self._metric} has not improved in {self._since} evaluations (TEST.FOCAL.PATIENCE): training "
            f"ends after {done} iterations; the best was {self._best:.2f} after {self._best_iteration}"
        )
        with self._after(done):
            self._save("model_final", done)
        self.trainer.max_iter = done
        raise TrainingEnded

    def after_train(self) -> None:
        """Evaluate, unless this model was evaluated already or training failed; then the test sets."""
        # detectron2 counts one iteration too many if no iteration remained.
        self.trainer.iter = self.trainer.storage.iter = min(self.trainer.iter, self.trainer.max_iter)
        if self.trainer.iter + 1 >= self.trainer.max_iter and not self.trainer.failed:
            if self._evaluated < self.trainer.iter:
                self.evaluate()
            if self._validates and self._test_sets:
                self._current = partial(self._test, self._point)
                super().evaluate()
        del self._test, self._current  # they refer to the trainer
        super().after_train()

    @contextmanager
    def _after(self, done: int) -> Iterator[None]:
        """Set the trainer to the last of `done` iterations, whose number checkpoints and metrics get."""
        self.trainer.iter = self.trainer.storage.iter = done - 1
        yield
        self.trainer.iter = self.trainer.storage.iter = done

    def evaluate(self) -> None:
        """Evaluate, and keep the best model so far."""
        super().evaluate()
        done = min(self.trainer.iter + 1, self.trainer.max_iter)
        self._point = self._chosen_point()
        if self._point is not None and self.trainer.start_iter <= done == self.trainer.max_iter:
            # The same file as before the evaluation, with the operating point: what it counts comes below.
            with self._after(done):
                self._save("model_final", done)
        self._evaluated = done
        if not self._metric:
            return
        # Only the main process has results.
        results = comm.all_gather(flatten_results_dict(self._results))[0]
        if self._metric not in results:
            raise _unknown(self._metric, [x for x in results if "/" in x.removeprefix(_VALIDATION)])
        value = results[self._metric]
        # NaN is no improvement. It means no such boxes in the dataset or, in detectron2, no detections.
        if value > self._best:
            self._best, self._best_iteration, self._since = value, done, 0
            logger.info(f"{self._metric} {value:.2f} after {done} iterations is the best: model_best.pth")
            self._save("model_best", done, tag=False)
            return
        self._since += 1
        logger.info(
            f"{self._metric} {value:.2f} after {done} iterations; the best is {self._best:.2f} after "
            f"{self._best_iteration}"
        )

    def _chosen_point(self) -> OperatingPoint | None:
        """Return the operating point that the evaluation chose on the first dataset, in all processes."""
        results = comm.all_gather(self._results)[0]  # only the main process has them
        results = results.get("validation", {}) if self._validates else results
        if len(self._sets) > 1:
            results = results.get(self._sets[0], {})
        figures = results.get("operating_point")
        if figures is None:  # another evaluator than ours, or no test set
            return None
        return point_of(figures, self._goal, chosen_on=self._sets[0], validation=self._validates)

    def _save(self, name: str, done: int, *, tag: bool = True) -> None:
        """Save the model after `done` iterations, which was just evaluated, with its operating point."""
        content = {}
        if self._point is not None:
            logger.info(f"operating point of {name}.pth: {self._point}")
            content[OPERATING_POINT] = self._point._asdict()
        self._checkpointer.save(name, tag=tag, iteration=done - 1, **content)


def check_best(cfg: CfgNode) -> None:
    """Check `TEST.FOCAL.BEST_METRIC` and `PATIENCE`, as far as that is possible before an evaluation.

    Args:
        cfg: full config, its datasets checked.

    Raises:
        UserError: for values that can't work.
    """
    test = cfg.TEST.FOCAL
    key = "DATASETS.VAL" if cfg.DATASETS.VAL else "DATASETS.TEST"
    datasets = cfg.DATASETS.VAL or cfg.DATASETS.TEST
    if not test.BEST_METRIC:
        if test.PATIENCE:
            raise UserError(
                f"TEST.FOCAL.PATIENCE is {test.PATIENCE}, but TEST.FOCAL.BEST_METRIC is empty; it must name "
                "a metric, such as bbox/AP"
            )
        return
    if cfg.TEST.EVAL_PERIOD < 1 or not datasets:
        period = cfg.TEST.EVAL_PERIOD
        why = "DATASETS.TEST is empty" if period > 0 else f"TEST.EVAL_PERIOD is {period}"
        raise UserError(f"TEST.FOCAL.BEST_METRIC is {test.BEST_METRIC}, but {why}: nothing is evaluated")
    names = []
    for dataset in datasets:
        classes = known_class_names(dataset)
        if classes is None or MetadataCatalog.get(dataset).get("evaluator_type") == "lvis":
            return  # the names of the metrics are known only after the first evaluation
        if not is_annotated(dataset):
            continue  # it has predictions but no metrics
        prefix = "" if len(datasets) == 1 else f"{dataset}/"
        known = metric_names(detection_limits(cfg), classes)
        names += [f"{prefix}bbox/{name}" for name in known]
        names += [f"{prefix}operating_point/{name}" for name in ("f1", "precision", "recall")]
    if not names:
        raise UserError(
            f"TEST.FOCAL.BEST_METRIC is {test.BEST_METRIC}, but no dataset of {key} has annotations"
        )
    if test.BEST_METRIC not in names:
        raise _unknown(test.BEST_METRIC, names)


def _unknown(metric: str, names: list[str]) -> UserError:
    metric, *names = (x.removeprefix(_VALIDATION) for x in (metric, *names))
    general = [x for x in names if "/AP-" not in x]
    of_classes = ", and AP-CLASS of each class" if len(general) < len(names) else ""
    return UserError(
        f'TEST.FOCAL.BEST_METRIC is "{metric}"; the evaluation gives {", ".join(general)}{of_classes}'
    )
