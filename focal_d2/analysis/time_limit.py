"""A training that ends within a time: fewer iterations where the machine is slower."""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from focal_d2.analysis.new.probe import Trial, try_training
from focal_d2.engine.alpha import resolve_alpha
from focal_d2.errors import UserError

_START = 15.0  # seconds until the first iteration, and for the last checkpoint
_TRIAL = 8.0  # seconds of iterations that are timed


def fit_schedule(
    cfg: CfgNode,
    minutes: float,
    *,
    trial: Callable[..., Trial] = try_training,
    count: Callable[[str], int] = lambda name: len(DatasetCatalog.get(name)),
) -> tuple[list[str], str]:
    """Lower the number of iterations to what fits into a time on this machine, by a short trial.

    The whole schedule is scaled: warm-up, steps of the learning rate, evaluations and checkpoints. The number
    is never raised.

    Args:
        cfg: full config.
        minutes: of training and evaluation.
        trial: times iterations.
        count: returns the number of images of a dataset.

    Returns:
        Overrides, KEY VALUE …, and a line that says what was measured and chosen.

    Raises:
        UserError: if not even one iteration fits, or the trial fails.
    """
    solver = cfg.SOLVER
    timed = trial(resolve_alpha(cfg), seconds=_TRIAL)
    periodic, last = cfg.DATASETS.VAL or cfg.DATASETS.TEST, cfg.DATASETS.TEST if cfg.DATASETS.VAL else ()
    period = cfg.TEST.EVAL_PERIOD
    evaluations = max(1, solver.MAX_ITER // period if period else 1)
    images = evaluations * sum(map(count, periodic)) + sum(map(count, last))
    beside = _START + images * timed.test_seconds
    iterations = min(int((minutes * 60 - beside) / timed.seconds), solver.MAX_ITER)
    if iterations < 1:
        raise UserError(
            f"--minutes {minutes:g} is too short: start and evaluation take {beside:.0f} s here, and an "
            f"iteration {timed.seconds:.2g} s"
        )
    line = f"{timed.seconds:.2g} s an iteration on this machine: {iterations} of {solver.MAX_ITER} iterations"
    if iterations == solver.MAX_ITER:
        return [], line

    def scaled(iteration: int) -> int:
        return max(1, round(iteration * iterations / solver.MAX_ITER)) if iteration else 0

    values = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": tuple(sorted({scaled(x) for x in solver.STEPS})),
        "SOLVER.WARMUP_ITERS": scaled(solver.WARMUP_ITERS),
        "SOLVER.CHECKPOINT_PERIOD": scaled(solver.CHECKPOINT_PERIOD),
        "TEST.EVAL_PERIOD": scaled(period),
    }
    return [str(x) for pair in values.items() for x in pair], line
