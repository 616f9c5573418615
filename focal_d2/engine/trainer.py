"""Training and evaluation: detectron2's `DefaultTrainer` with a few hooks replaced."""

from __future__ import annotations

import logging
import os
import signal
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.solver.lr_scheduler import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter
from torch import distributed

from focal_d2.data.handover import hand_over
from focal_d2.data.loader import TrainingLoader, build_training_loader
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.data.seeding import kept_random_state, random_state, set_random_state
from focal_d2.detectron2_compat import TrainerParts
from focal_d2.engine.checks import check_training
from focal_d2.engine.failures import end_hung_workers, tell
from focal_d2.engine.hooks.evaluation import Evaluation, TrainingEnded, check_best
from focal_d2.engine.hooks.pictures import TrainingPictures
from focal_d2.engine.hooks.progress import ProgressBar
from focal_d2.engine.hooks.wandb import WeightsAndBiases
from focal_d2.engine.launch.start import StopRequest, remember_torchrun
from focal_d2.engine.nonfinite import examine, save_step
from focal_d2.engine.output_lock import output_lock
from focal_d2.engine.resume import SolverSettings, check_state, set_aside
from focal_d2.engine.step import FocalLoop, MovingAverage, Stopped
from focal_d2.errors import UserError, describe_error, user_message
from focal_d2.evaluation import FocalCOCOEvaluator, FocalLVISEvaluator, format_results
from focal_d2.modeling.retinanet import precision_around
from focal_d2.storage.checkpoint import FocalCheckpointer

logger = logging.getLogger(__name__)


# Steps that were not finite and are saved, of a training that skips them: each holds the model.
_MOST_REPORTS = 5


class FocalTrainer(TrainerParts, DefaultTrainer):
    """detectron2's trainer with our mapper, optimizers, evaluator, checks and progress bar."""

    def __init__(self, cfg: CfgNode) -> None:
        """Build everything that training needs.

        Args:
            cfg: full config.

        Raises:
            UserError: for anything the user can mend.
        """
        # Not DefaultTrainer's: that wraps the model for GPUs only, and has its own loop.
        super(DefaultTrainer, self).__init__()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        check_training(cfg)
        check_best(cfg)
        self.cfg = cfg
        solver = cfg.SOLVER.FOCAL
        bare = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, bare)
        loader = self.build_train_loader(cfg)
        on_cpu = torch.device(cfg.MODEL.DEVICE).type == "cpu"
        model = create_ddp_model(
            bare, broadcast_buffers=False, device_ids=None if on_cpu else [comm.get_local_rank()]
        )
        # After that, which gives all processes the first one's weights.
        self.average = MovingAverage(bare, decay=solver.EMA) if solver.EMA else None
        self.loop = FocalLoop(
            model,
            loader,
            optimizer,
            parts=solver.ACCUMULATE,
            precision=precision_around(cfg, bare),
            scale_loss=cfg.SOLVER.AMP.ENABLED,
            average=self.average,
            stopping=self._stopping,
            on_not_finite=self._not_finite,
        )
        self._settings = SolverSettings(cfg, bare, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = FocalCheckpointer(
            self.offered,
            cfg.OUTPUT_DIR,
            partial=True,
            keep=solver.KEEP_CHECKPOINTS,
            trainer=weakref.proxy(self),
        )
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.failed = False  # whether training ended before its end
        self._images_before = 0  # drawn before start_iter
        self.random_states: tuple[int, list[Any]] = (-1, [])  # of all processes, after an iteration
        self._stop: StopRequest | None = None
        self._reports = 0  # on steps that were not finite
        self.register_hooks(self.build_hooks())

    @property
    def offered(self) -> torch.nn.Module:
        """The model that is evaluated and that checkpoints hold: the average, if there is one."""
        return self.loop.bare if self.average is None else self.average.module

    @classmethod
    def build_model(cls, cfg: CfgNode) -> torch.nn.Module:
        """Build the model; its printed structure goes to no log (detectron2's takes 200 lines)."""
        model = build_model(cfg)
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        logger.info(
            f"{cfg.MODEL.META_ARCHITECTURE}: {millions:.1f} million parameters, on {cfg.MODEL.DEVICE}"
        )
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: torch.nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that `SOLVER.FOCAL.OPTIMIZER` names, with detectron2's parameter groups."""
        if cfg.SOLVER.FOCAL.OPTIMIZER == "SGD":
            return build_optimizer(cfg, model)
        groups = get_default_optimizer_params(
            model,
            base_lr=cfg.SOLVER.BASE_LR,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        )
        optimizer = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
        return optimizer(groups, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY, fused=True)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build our training loader; see `build_training_loader` for the errors."""
        return build_training_loader(cfg, FocalDatasetMapper(cfg, is_train=True))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build detectron2's test loader with our mapper."""
        mapper = FocalDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper, collate_fn=hand_over)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Evaluate boxes as COCO does; predictions and their analysis go to OUTPUT_DIR/inference/DATASET.

        Datasets that are evaluated as LVIS get detectron2's evaluator for that.

        Raises:
            UserError: for keys under TEST.FOCAL that can't be used.
        """
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        if MetadataCatalog.get(dataset_name).get("evaluator_type") == "lvis":
            return FocalLVISEvaluator(dataset_name, tasks=("bbox",), output_dir=folder)
        test = cfg.TEST.FOCAL
        return FocalCOCOEvaluator(
            dataset_name,
            output_dir=folder,
            backend=test.EVAL_BACKEND,
            max_dets_per_image=list(test.MAX_DETS) or max(100, cfg.TEST.DETECTIONS_PER_IMAGE),
        )

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate on `DATASETS.TEST` and log a table; see `DefaultTrainer.test` for the return value."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process():
            by_dataset = {cfg.DATASETS.TEST[0]: results} if len(cfg.DATASETS.TEST) == 1 else results
            table = format_results(by_dataset)
            if table:  # a test set without annotations has no results
                logger.info(f"Average precision and recall, per cent:\n{table}")
        return results

    def build_hooks(self) -> list[Any]:
        """Take detectron2's hooks; evaluate what checkpoints offer, and draw a bar on a terminal."""
        found = super().build_hooks()
        test = self.cfg.TEST
        evaluation = next(i for i, hook in enumerate(found) if isinstance(hook, hooks.EvalHook))
        found[evaluation] = Evaluation(
            test.EVAL_PERIOD,
            self._evaluate,
            self.checkpointer,
            metric=test.FOCAL.BEST_METRIC,
            patience=test.FOCAL.PATIENCE,
        )
        # Before the main process writes a checkpoint.
        saving = next(
            (i for i, x in enumerate(found) if isinstance(x, hooks.PeriodicCheckpointer)), evaluation
        )
        found.insert(saving, RandomStates(self.cfg.SOLVER.CHECKPOINT_PERIOD))
        if comm.is_main_process():
            # Before the writers. detectron2's own models draw pictures themselves.
            period, model = self.cfg.VIS_PERIOD, self.loop.bare
            if period > 0 and not hasattr(model, "vis_period"):
                found.insert(-1, TrainingPictures(model, period=period, input_format=self.cfg.INPUT.FORMAT))
            if self.cfg.SOLVER.FOCAL.WANDB_PROJECT:
                found.insert(-1, WeightsAndBiases(self.cfg, project=self.cfg.SOLVER.FOCAL.WANDB_PROJECT))
        if _on_terminal():
            found.insert(-1, ProgressBar())
        return found

    def build_writers(self) -> list[EventWriter]:
        """Build detectron2's writers; on a terminal the progress bar replaces the printed lines."""
        writers = super().build_writers()
        if _on_terminal():
            writers = [w for w in writers if not isinstance(w, CommonMetricPrinter)]
        return writers

    def resume_or_load(self, resume: bool = True) -> None:
        """Resume from OUTPUT_DIR, or load `MODEL.WEIGHTS`; see `DefaultTrainer.resume_or_load`.

        What an earlier run left in OUTPUT_DIR is moved into a folder there when a new run begins.
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
        remember_torchrun(self.cfg.OUTPUT_DIR)
        comm.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """Return what a run needs to go on as if it had not stopped, but for the model."""
        state = super().state_dict()
        loader = self.data_loader
        if isinstance(loader, TrainingLoader):
            drawn = (self.iter + 1 - self.start_iter) * loader.images
            state["data"] = loader.place(self._images_before + drawn)
        iteration, states = self.random_states
        state["random"] = states if iteration == self.iter else [random_state()]
        state["processes"] = comm.get_world_size()
        state["settings"] = self._settings.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume, and say what is not exact; see detectron2's `DefaultTrainer`.

        Where settings of optimizer or schedule differ, the config's are taken, and a line says which.

        Raises:
            UserError: if the checkpoint was written for another optimizer or schedule.
            ValueError: if it is damaged.
        """
        check_state(state_dict, cfg=self.cfg, optimizer=self.optimizer, schedule=vars(self.scheduler))
        state_dict, changes = self._settings.merge(state_dict, self.scheduler)
        super().load_state_dict(state_dict)
        if isinstance(self.scheduler, LRMultiplier) and self.scheduler.last_epoch <= self.max_iter:
            # The checkpoint has the next iteration's rates as its own schedule gave them.
            for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_lr(), strict=True):
                group["lr"] = rate
        if changes and comm.is_main_process():
            logger.warning(f"--resume: the config has changed and is followed: {'; '.join(changes)}")
        differences = self._go_on_with_data(state_dict.get("data"))
        before, now = state_dict.get("processes", 1), comm.get_world_size()
        states = state_dict.get("random", [])
        if before != now:
            differences.append(
                f"{now} processes instead of {before}: sums are rounded in another order, and batch norm "
                "that is neither frozen nor synchronised sees batches of another size"
            )
        elif len(states) == now:
            set_random_state(states[comm.get_rank()])
        else:
            differences.append("random generators start anew")
        if differences and comm.is_main_process():
            logger.warning(
                f"--resume goes on, but not to the bit as without a stop: {'; '.join(differences)}"
            )

    def _go_on_with_data(self, place: dict[str, int] | None) -> list[str]:
        """Let the data go on where they were; return what differs."""
        loader = self.data_loader
        if not isinstance(loader, TrainingLoader):
            return ["the data, no list of records, start anew"]
        if place is None:
            self._images_before = (self.iter + 1) * loader.images
            loader.start_at(self._images_before)
            return ["the checkpoint does not say which images were drawn"]
        self._images_before = place["images"]
        return loader.go_on(place, take_seed=self.cfg.SEED < 0)

    def train(self) -> Any:
        """Train; see `DefaultTrainer.train`.

        SIGTERM and Ctrl-C end it after a step and a checkpoint, `TEST.FOCAL.PATIENCE` as if it had been over.

        Raises:
            UserError: if another training runs in OUTPUT_DIR, or for what stops this one from outside.
        """
        with (
            output_lock(self.cfg.OUTPUT_DIR),
            StopRequest(_say_that_it_stops) as self._stop,
        ):
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
                rest = f"; --resume goes on from {good}" if good else ""
                raise UserError(f"in OUTPUT_DIR {self.cfg.OUTPUT_DIR}: {message}{rest}") from error
            except Stopped as stopped:
                # The launcher ends those that are left when the first one ends: let the main one save.
                comm.synchronize()
                logger.info(str(stopped))
                raise SystemExit(128 + (self._stop.number or signal.SIGTERM)) from None

    def before_step(self) -> None:
        """Mark the state as complete: all of the last iteration is done."""
        self.loop.stepping = False
        super().before_step()

    def after_step(self) -> None:
        """See `TrainerBase.after_step`; if it fails, nothing is evaluated any more."""
        failed, self.failed = self.failed, True
        super().after_step()
        self.failed = failed

    def run_step(self) -> None:
        """Make a step, or keep what is done.

        Raises:
            UserError: naming what went wrong outside, and the checkpoint.
        """
        try:
            super().run_step()
        except Exception as error:
            self.loop.undo()
            end_hung_workers(error)
            self._keep(error, last=self.iter - 1)

    def _keep(self, error: Exception, last: int) -> None:
        """Save the state after iteration `last`, if that is new, and raise the error, told plainly."""
        stopped = isinstance(error, Stopped)
        if stopped:
            self.random_states = last, comm.gather(random_state())
        message, kept = tell(error), ""
        self.failed = True
        if last >= self.start_iter and not self.loop.stepping and comm.is_main_process():
            self.iter = last  # hooks take it for the last complete one
            name = f"model_{last:07d}"
            try:
                self.checkpointer.save(name, iteration=last)
                kept = f"; training up to here is kept in {name}.pth: --resume goes on"
            except UserError as not_saved:
                kept = f"; {not_saved}"
        if stopped:
            raise Stopped(f"stopped by a signal{kept}") from error
        if message is None:
            raise error
        raise UserError(f"{message}{kept}") from error

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate without a trace in training."""
        if comm.get_world_size() > 1:
            for buffer in self.offered.buffers():  # batch norm's differ
                distributed.broadcast(buffer, 0)
        try:
            with kept_random_state(), self._stopping_between_batches():
                self.last_results = self.test(self.cfg, self.offered)
        except Exception as error:
            # The iteration is complete: the schedule's hook has run.
            self.loop.stepping = False
            last = self.iter if self.iter < self.max_iter else -1  # at the end all is saved
            self._keep(error, last)
        return self.last_results

    @contextmanager
    def _stopping_between_batches(self) -> Iterator[None]:
        """Let a signal end an evaluation, which --resume makes up for; several processes finish it."""

        def look(*_: object) -> None:
            if comm.get_world_size() == 1 and self._stopping():
                raise Stopped("stopped")

        handle = self.offered.register_forward_pre_hook(look)
        try:
            yield
        finally:
            handle.remove()

    def _stopping(self) -> bool:
        return self._stop is not None and self._stop.number is not None

    def _not_finite(
        self,
        own: bool,
        parts: list[list[dict[str, Any]]],
        losses: dict[str, float],
        divisor: float | None,
    ) -> None:
        policy = self.cfg.SOLVER.FOCAL.ON_NONFINITE
        # All processes, since a model may exchange figures in the middle.
        found, line = self._examine(parts, losses, divisor, save=own)
        # After gradients were exchanged all are bad; the cause is where the step repeats.
        _, line = max(comm.all_gather((own and found, line if own else "")))
        what = f"the loss or gradient became infinite or NaN at iteration {self.iter}: {line}"
        if policy == "stop":
            raise UserError(what)
        logger.warning(f"{what}; the step is skipped (SOLVER.FOCAL.ON_NONFINITE {policy})")
        if policy == "halve_lr":
            # What detectron2's schedule multiplies is part of the checkpoint.
            self.scheduler.base_lrs = [x / 2 for x in self.scheduler.base_lrs]
            for group in self.optimizer.param_groups:
                group["lr"] /= 2

    def _examine(
        self,
        parts: list[list[dict[str, Any]]],
        losses: dict[str, float],
        divisor: float | None,
        *,
        save: bool,
    ) -> tuple[bool, str]:
        """Report on this process's batch: whether the step failed again, and a line about it."""
        model, steps = self.loop.bare, list(self.loop.steps)
        try:
            with self.loop.precision():
                reports = [examine(model, part, steps=steps, normalizer=divisor) for part in parts]
            bad = [bool(report.bad_terms or report.gradient) for report in reports]
            which = bad.index(True) if any(bad) else 0
        except (RuntimeError, MemoryError) as error:  # no room for it
            return False, f"its cause could not be examined ({describe_error(error)})"
        report = reports[which]
        if not save or self._reports >= _MOST_REPORTS:
            return any(bad), report.verdict
        self._reports += 1
        try:
            written = save_step(
                self.cfg.OUTPUT_DIR,
                cfg=self.cfg,
                model=model,
                batch=parts[which],
                losses=losses if len(parts) == 1 else report.losses,
                steps=steps,
                normalizer=divisor,
                iteration=self.iter,
                rank=comm.get_rank(),
                report=report,
            )
        except OSError as error:
            return any(bad), f"{report.verdict} (the report could not be written: {error})"
        repeat = f"{written}/report.txt; focal-d2 replay {written} repeats the step"
        return any(bad), f"{report.verdict} ({repeat})"


class RandomStates(HookBase):
    """Collects all processes' generators for a checkpoint that is due."""

    def __init__(self, period: int) -> None:
        """Take `SOLVER.CHECKPOINT_PERIOD`."""
        self._period = period

    def after_step(self) -> None:
        """Collect, on all processes."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done >= self.trainer.max_iter:
            self.trainer.random_states = self.trainer.iter, comm.gather(random_state())


def _say_that_it_stops(number: int) -> None:
    if comm.is_main_process():
        name = signal.Signals(number).name
        # Not print: the signal may come while that very stream is written to.
        os.write(2, f"{name}: this iteration ends, then a checkpoint; once more stops at once\n".encode())


def _on_terminal() -> bool:
    return comm.is_main_process() and sys.stdout.isatty()
