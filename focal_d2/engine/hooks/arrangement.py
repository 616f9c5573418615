"""Which hooks a training has, and in which order they run."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from torch import nn

from focal_d2.engine.hooks.pictures import TrainingPictures
from focal_d2.engine.hooks.progress import ProgressBar, on_terminal
from focal_d2.engine.hooks.random_state import CollectRandomStates, RandomStates
from focal_d2.engine.hooks.wandb import WeightsAndBiases


def arrange_hooks(
    built: list[HookBase],
    cfg: CfgNode,
    *,
    model: nn.Module,
    evaluation: hooks.EvalHook,
    random_states: RandomStates,
) -> list[HookBase]:
    """Insert our hooks into the list of detectron2's, each at the position where it must run.

    Args:
        built: detectron2's hooks of this process. Its writers, which the main process has, come last.
        cfg: full config.
        model: the model that is trained, without DistributedDataParallel.
        evaluation: replaces detectron2's evaluation hook.
        random_states: collected before each checkpoint.
    """
    arranged = [evaluation if isinstance(hook, hooks.EvalHook) else hook for hook in built]
    # Random states are collected before the checkpointer, which only the main process has. In the other
    # processes the evaluation hook is at this position.
    saving = next(
        i for i, x in enumerate(arranged) if isinstance(x, (hooks.PeriodicCheckpointer, hooks.EvalHook))
    )
    arranged.insert(saving, CollectRandomStates(random_states, period=cfg.SOLVER.CHECKPOINT_PERIOD))
    if comm.is_main_process():
        # Before the writers. detectron2's models draw pictures in their forward pass.
        if cfg.VIS_PERIOD > 0 and not hasattr(model, "vis_period"):
            pictures = TrainingPictures(model, period=cfg.VIS_PERIOD, input_format=cfg.INPUT.FORMAT)
            arranged.insert(-1, pictures)
        if cfg.SOLVER.FOCAL.WANDB_PROJECT:
            arranged.insert(-1, WeightsAndBiases(cfg, project=cfg.SOLVER.FOCAL.WANDB_PROJECT))
    if on_terminal():
        arranged.insert(-1, ProgressBar())
    return arranged
