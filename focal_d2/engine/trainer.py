"""Training and evaluation: detectron2's `DefaultTrainer` with a few hooks replaced."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, launch
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter

from focal_d2.config import unread_keys
from focal_d2.data import FocalDatasetMapper, check_datasets
from focal_d2.data.loader import build_sampler, check_sampler, training_records
from focal_d2.engine.alpha import resolve_alpha
from focal_d2.engine.checkpoint import FocalCheckpointer, check_file
from focal_d2.engine.progress import ProgressBar
from focal_d2.engine.setup import building, load_config, set_up_job
from focal_d2.errors import UserError
from focal_d2.evaluation import FocalCOCOEvaluator, FocalLVISEvaluator, format_results

logger = logging.getLogger(__name__)


# What each optimizer's parameter groups have and the other's have not.
_OWN_SETTING = {"SGD": "momentum", "AdamW": "betas"}


class FocalTrainer(DefaultTrainer):
    """detectron2's trainer with our mapper, optimizers, evaluator, checks and progress bar."""

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
        """Build detectron2's training loader with our mapper, records and samplers.

        Raises:
            UserError: if no image is left to train on, or for a sampler that there is not.
        """
        mapper = FocalDatasetMapper(cfg, is_train=True)
        check_sampler(cfg)
        records = training_records(cfg)
        sampler = build_sampler(cfg, records)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records, sampler=sampler)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build detectron2's test loader with our mapper."""
        mapper = FocalDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

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
            logger.info("Average precision and recall, per cent:\n" + format_results(by_dataset))
        return results

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; see detectron2's `DefaultTrainer`.

        Raises:
            UserError: if the checkpoint was written with another optimizer. PyTorch would take its state
                and fail at the first step.
        """
        name = self.cfg.SOLVER.FOCAL.OPTIMIZER
        if _OWN_SETTING[name] not in state_dict["_trainer"]["optimizer"]["param_groups"][0]:
            raise UserError(
                f"--resume: the checkpoint in {self.cfg.OUTPUT_DIR} was written with another optimizer than "
                f"SOLVER.FOCAL.OPTIMIZER {name}"
            )
        super().load_state_dict(state_dict)

    def build_hooks(self) -> list[Any]:
        """Add the progress bar on a terminal, and check weights when they are loaded."""
        self.checkpointer = FocalCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, partial=True, trainer=weakref.proxy(self)
        )
        hooks = super().build_hooks()
        if _on_terminal():
            hooks.insert(-1, ProgressBar())
        return hooks

    def build_writers(self) -> list[EventWriter]:
        """Build detectron2's writers; on a terminal the progress bar replaces the printed lines."""
        writers = super().build_writers()
        if _on_terminal():
            writers = [w for w in writers if not isinstance(w, CommonMetricPrinter)]
        return writers


def _on_terminal() -> bool:
    return comm.is_main_process() and sys.stdout.isatty()


def launch_job(args: argparse.Namespace) -> None:
    """Run the job on this machine's share of the processes; see `run`.

    Args:
        args: of detectron2's `default_argument_parser`.

    Raises:
        UserError: for more GPUs than there are.
    """
    check_devices(args.num_gpus, args.num_machines)
    launch(
        run,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


def check_devices(num_gpus: int, num_machines: int) -> None:
    """Check that each of several processes has a GPU.

    Raises:
        UserError: for more GPUs than there are.
    """
    devices = torch.cuda.device_count()
    if num_gpus * num_machines > 1 and num_gpus > devices:
        raise UserError(
            f"--num-gpus {num_gpus} --num-machines {num_machines}: PyTorch finds {devices} CUDA "
            "devices here, and several processes need one each"
        )


def run(args: argparse.Namespace) -> None:
    """Train, or evaluate with `--eval-only`, as one of the job's processes.

    Args:
        args: of detectron2's `default_argument_parser`.

    Raises:
        UserError: for anything the user can mend.
    """
    cfg = load_config(args.config_file, args.opts)
    unread = unread_keys(cfg)
    try:
        check_datasets(cfg, training=not args.eval_only)
    except UserError as error:
        # Often it is the key that was not read that should have prevented this.
        raise UserError("; ".join([str(error), *unread])) from error
    set_up_job(cfg, args)
    if comm.is_main_process():
        for line in unread:
            logger.warning(line)
    if args.eval_only:
        with building("model"):
            model = FocalTrainer.build_model(cfg)
        checkpointer = FocalCheckpointer(model, cfg.OUTPUT_DIR, partial=False)
        if not (cfg.MODEL.WEIGHTS or (args.resume and checkpointer.has_checkpoint())):
            where = f" (--resume finds none in {cfg.OUTPUT_DIR})" if args.resume else ""
            raise UserError(f"--eval-only needs a checkpoint: add MODEL.WEIGHTS FILE{where}")
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = FocalTrainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    with building("trainer"):
        trainer = FocalTrainer(resolve_alpha(cfg))
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def check_job(config_file: str, overrides: Sequence[str] = (), *, num_gpus: int = 1) -> str:
    """Check what `launch_job` can be told before it reads images: config, datasets, model, schedule, weights.

    Args:
        config_file: path of the YAML file.
        overrides: KEY VALUE pairs; SEED and OUTPUT_DIR are not among them.
        num_gpus: on this machine.

    Returns:
        The whole config as YAML, but for OUTPUT_DIR and SEED: what makes two runs comparable.

    Raises:
        UserError: for anything the user can mend.
    """
    for key in ("SEED", "OUTPUT_DIR"):
        if key in overrides[::2]:
            raise UserError(f"{key} is set for each run; it can't be an override")
    check_devices(num_gpus, 1)
    cfg = load_config(config_file, overrides)
    check_datasets(cfg, training=True)
    comparable = cfg.clone()
    comparable.defrost()
    comparable.OUTPUT_DIR, comparable.SEED = "", -1
    cfg = resolve_alpha(cfg).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"  # where building leaves no context and no memory behind
    with building("trainer"):
        model = build_model(cfg)
        optimizer = FocalTrainer.build_optimizer(cfg, model)
        FocalTrainer.build_lr_scheduler(cfg, optimizer)
        FocalDatasetMapper(cfg, is_train=True)
        check_sampler(cfg)
    check_file(cfg.MODEL.WEIGHTS)
    return str(comparable.dump())
