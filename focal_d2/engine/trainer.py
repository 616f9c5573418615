"""Training and evaluation: detectron2's `DefaultTrainer` with a few hooks replaced."""

from __future__ import annotations

import logging
import signal
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter

from focal_d2.data.loader import TrainingLoader, build_evaluation_loader, build_training_loader
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.detectron2_compat import TrainerParts
from focal_d2.engine.checks import run_checks
from focal_d2.engine.evaluators import build_evaluator, evaluators_at
from focal_d2.engine.failures import end_hung_workers, failure_message
from focal_d2.engine.hooks.arrangement import arrange_hooks
from focal_d2.engine.hooks.evaluation import Evaluation, TrainingEnded
from focal_d2.engine.hooks.progress import on_terminal
from focal_d2.engine.hooks.random_state import RandomStates
from focal_d2.engine.launch.signals import StopRequest, announce_stop
from focal_d2.engine.nonfinite import NonfinitePolicy
from focal_d2.engine.optimizer import build_optimizer
from focal_d2.engine.output_lock import output_lock
from focal_d2.engine.resume import (
    CardOfRun,
    Owner,
    ProcessCount,
    SolverSettings,
    check_state,
    complete_state,
    follow_schedule,
    set_aside,
)
from focal_d2.engine.step import FocalLoop, MovingAverage, Stopped, stopping_between_batches
from focal_d2.engine.validation import validate, without_effect
from focal_d2.errors import UserError, user_message
from focal_d2.evaluation import log_results
from focal_d2.evaluation.operating_point import OperatingPoint
from focal_d2.inference.views import use_views
from focal_d2.model_card import card_of
from focal_d2.modeling.retinanet import precision_around
from focal_d2.storage.checkpoint import FocalCheckpointer

logger = logging.getLogger(__name__)


class FocalTrainer(TrainerParts, DefaultTrainer):
    """detectron2's trainer with our mapper, optimizers, evaluator, checks and progress bar."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything that training needs.

        Args:
            cfg: full config.

        Raises:
            UserError: for anything the user can correct.
        """
        # Not DefaultTrainer's constructor: it wraps the model for GPUs only, and builds another loop.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        run_checks(cfg, "config", "metrics", "processes")
        self.cfg = cfg
        solver = cfg.SOLVER.FOCAL
        bare = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, bare)
        loader = self.build_train_loader(cfg)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        model = create_ddp_model(
            bare, broadcast_buffers=False, device_ids=None if on_cpu else [comm.get_local_rank()]
        )
        # DistributedDataParallel has now copied the first process's weights to all processes.
        self.average = MovingAverage(bare, decay=solver.EMA) if solver.EMA else None
        self._stop = stop = StopRequest(announce_stop)
        self.loop = FocalLoop(
            model,
            loader,
            optimizer,
            parts=solver.ACCUMULATE,
            precision=precision_around(cfg, bare),
            scale_loss=cfg.SOLVER.AMP.ENABLED,
            average=self.average,
            stopping=lambda: stop.came,
            on_not_finite=NonfinitePolicy(cfg, halve_rates=self._halve_rates),
        )
        self._settings = SolverSettings(cfg, bare, optimizer)
        self._random_states = RandomStates()
        # All owners of state besides detectron2's objects and the hooks, by their names in checkpoints.
        self.owners: dict[str, Owner] = {"random": self._random_states, "processes": ProcessCount()}
        if isinstance(loader, TrainingLoader):
            self.owners = {"data": loader, **self.owners}
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = FocalCheckpointer(
            self.offered,
            cfg.OUTPUT_DIR,
            partial=True,
            keep=solver.KEEP_CHECKPOINTS,
            trainer=weakref.proxy(self),
            card=CardOfRun(card_of(cfg)),
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.failed = False  # whether a failure ended training
        self.register_hooks(self.build_hooks())

    @property
    def offered(self) -> torch.nn.Module:
        """The model that is evaluated and saved in checkpoints: the moving average if there is one."""
        return self.loop.bare if self.average is None else self.average.module

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Build the model. Its structure is not logged: detectron2's log of it takes 200 lines."""
        model = build_model(cfg)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        logger.info(
            f"{cfg.MODEL.META_ARCHITECTURE}: {millions:.1f} million parameters, on {cfg.MODEL.DEVICE}"
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that `SOLVER.FOCAL.OPTIMIZER` names."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build our training loader; see `build_training_loader` for the errors."""
        return build_training_loader(cfg, FocalDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build detectron2's test loader with our mapper; see `build_evaluation_loader`."""
        return build_evaluation_loader(cfg, dataset_name, FocalDatasetMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Evaluate boxes as COCO does; predictions and their analysis go to OUTPUT_DIR/inference/DATASET."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate on `DATASETS.TEST` and log a table; see `DefaultTrainer.test` for the return value."""
        use_views(cfg, model)
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            log_results({cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results)
        return results

    def build_hooks(self) -> list[Any]:
        """Build detectron2's hooks and ours; see `arrange_hooks`."""
        evaluation = Evaluation(
            self.cfg,
            self.checkpointer,
            test=partial(self._measure, self._test),
            validate=partial(self._measure, self._validate),
        )
        return arrange_hooks(
            super().build_hooks(),
            self.cfg,
            model=self.loop.bare,
            evaluation=evaluation,
            random_states=self._random_states,
        )

    def build_writers(self) -> list[EventWriter]:
        """Build detectron2's writers; on a terminal the progress bar replaces the printed lines."""
        writers = super().build_writers()
        if on_terminal():
            writers = [w for w in writers if not isinstance(w, CommonMetricPrinter)]
        return writers

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from OUTPUT_DIR, or load `MODEL.WEIGHTS`; see `DefaultTrainer.resume_or_load`.

        If a new run begins, the files of an earlier run in OUTPUT_DIR are moved into a folder of it.
        """
        resumes = comm.all_gather(resume and self.checkpointer.has_checkpoint())[0]
        super().resume_or_load(resumes)
        if resumes and self.start_iter >= self.max_iter:
            logger.warning(
                f"--resume: {self.start_iter} iterations are done and SOLVER.MAX_ITER is {self.max_iter}: "
                "nothing is left to train"
            )
        if not resumes and self.average is not None:
            self.loop.bare.load_state_dict(self.average.module.state_dict())
        if comm.all_gather(not resumes and self.checkpointer.has_checkpoint())[0]:
            with output_lock(self.cfg.OUTPUT_DIR):
                if comm.is_main_process():
                    set_aside(Path(self.cfg.OUTPUT_DIR))
        comm.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a run needs to continue exactly, except for the model."""
        state = super().state_dict()
        state.update({name: owner.state_dict() for name, owner in self.owners.items()})
        state["settings"] = self._settings.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, and log why training does not continue exactly; see detectron2's `DefaultTrainer`.

        Settings of optimizer or schedule that changed have the config's values; a line of the log names them.

        Raises:
            UserError: if the checkpoint was written for another optimizer or schedule.
            ValueError: if it is damaged.
        """
        check_state(state_dict, cfg=self.cfg, optimizer=self.optimizer, schedule=vars(self.scheduler))
        state, changes = self._settings.merge(state_dict, self.scheduler)
        super().load_state_dict(state)
        follow_schedule(self.optimizer, self.scheduler, last=self.max_iter)
        state = complete_state(state, batch=self.cfg.SOLVER.IMS_PER_BATCH)
        differences = []
        if "data" not in self.owners:
            differences = ["the data, no list of records, start from the beginning"]
        for name, owner in self.owners.items():
            differences += owner.load_state_dict(state[name])
        if changes and comm.is_main_process():
            logger.warning(f"--resume: the config has changed and is followed: {'; '.join(changes)}")
        if differences and comm.is_main_process():
            logger.warning(
                f"--resume continues, but not to the bit as without a stop: {'; '.join(differences)}"
            )

    def train(self) -> Any:
        """Train; see `DefaultTrainer.train`.

        SIGTERM and Ctrl-C end it after the current step, with a checkpoint. `TEST.FOCAL.PATIENCE` ends it as
        if `SOLVER.MAX_ITER` were reached.

        Raises:
            UserError: if another training runs in OUTPUT_DIR, or for a failure of data, disk or memory.
        """
        with output_lock(self.cfg.OUTPUT_DIR), self._stop:
            try:
                return super().train()
            except TrainingEnded:
                if not (self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process()):
                    return None
                verify_results(self.cfg, self.last_results)
                return self.last_results
            except OSError as error:
                if (message := user_message(error)) is None:
                    raise
                good = self.checkpointer.get_checkpoint_file()
                rest = f"; --resume continues from {good}" if good else ""
                raise UserError(f"in OUTPUT_DIR {self.cfg.OUTPUT_DIR}: {message}{rest}") from error
            except Stopped as stopped:
                # The launcher ends all processes when the first one ends. The main process must save first.
                comm.synchronize()
                logger.info(str(stopped))
                raise SystemExit(128 + (self._stop.number or signal.SIGTERM)) from None

    def before_step(self) -> None:
        """Mark the state as complete: all hooks of the last iteration have run."""
        self.loop.stepping = False
        super().before_step()

    def after_step(self) -> None:
        """See `TrainerBase.after_step`. If a hook fails, there is no evaluation at the end."""
        failed, self.failed = self.failed, True
        super().after_step()
        self.failed = failed

    def run_step(self) -> None:
        """Make a step. If it fails, save the state after the last complete iteration.

        Raises:
            UserError: for a failure of data, disk or memory; it names the checkpoint.
        """
        try:
            super().run_step()
        except Exception as error:
            self.loop.undo()
            end_hung_workers(error)
            self._save_and_raise(error, last=self.iter - 1)

    def _save_and_raise(self, error: Exception, *, last: int) -> NoReturn:
        """Save the state after iteration `last`, if it is new and complete; raise the error in one line."""
        stopped = isinstance(error, Stopped)
        if stopped:
            self._random_states.collect()
        message, kept = failure_message(error), ""
        self.failed = True
        if last >= self.start_iter and not self.loop.stepping and comm.is_main_process():
            self.iter = last  # hooks read the last complete iteration from it
            name = f"model_{last:07d}"
            try:
                self.checkpointer.save(name, iteration=last)
                kept = f"; training so far is saved in {name}.pth: --resume continues"
            except UserError as not_saved:
                kept = f"; {not_saved}"
        if stopped:
            raise Stopped(f"stopped by a signal{kept}") from error
        if message is None:
            raise error
        raise UserError(f"{message}{kept}") from error

    def _test(self, point: OperatingPoint | None) -> dict[str, Any]:
        evaluators = evaluators_at(type(self), self.cfg, point)
        self.last_results = self.test(self.cfg, self.offered, evaluators)
        return self.last_results

    def _validate(self) -> dict[str, Any]:
        return {"validation": validate(type(self), self.cfg, self.offered)}

    def _measure(self, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Evaluate `offered`, without a change to the state of training."""
        try:
            with without_effect(self.offered), stopping_between_batches(self.offered, self._stop):
                return measure(*arguments)
        except Exception as error:
            # The iteration is complete: the schedule's hook has run.
            self.loop.stepping = False
            last = self.iter if self.iter < self.max_iter else -1  # model_final.pth is saved already
            self._save_and_raise(error, last=last)

    def _halve_rates(self) -> None:
        # The base rates of detectron2's schedule are part of the checkpoint.
        self.scheduler.base_lrs = [x / 2 for x in self.scheduler.base_lrs]
        for group in self.optimizer.param_groups:
            group["lr"] /= 2
