"""Run a job from its command line: training or evaluation."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from focal_d2.config.unread_keys import unread_keys
from focal_d2.data.checks.run import annotation_warnings
from focal_d2.data.dataset_checks import datasets_of
from focal_d2.data.datasets import announce, known_class_names
from focal_d2.engine.alpha import resolve_alpha
from focal_d2.engine.checks import PHASES, run_checks
from focal_d2.engine.evaluators import evaluators_at
from focal_d2.engine.launch.start import check_devices, start
from focal_d2.engine.launch.torchrun import check_restarts
from focal_d2.engine.output_lock import output_lock, was_trained_in
from focal_d2.engine.score import score_detections
from focal_d2.engine.setup import save_config, set_up_job
from focal_d2.engine.trainer import FocalTrainer
from focal_d2.engine.user_modules import import_modules
from focal_d2.errors import UserError
from focal_d2.evaluation.operating_point import saved_point
from focal_d2.load_config import load_config
from focal_d2.modeling.build import building
from focal_d2.storage.card import class_difference, saved_card
from focal_d2.storage.checkpoint import FocalCheckpointer
from focal_d2.storage.configs import find_config

logger = logging.getLogger(__name__)


def launch_job(args: argparse.Namespace) -> None:
    """Start this machine's processes of the job; see `run`.

    Args:
        args: of `focal_d2.commands.train`.

    Raises:
        UserError: for anything the user can correct.
    """
    start(run, args)


def run(args: argparse.Namespace) -> None:
    """Train, or evaluate with `--eval-only`, as one of the job's processes.

    Args:
        args: of `focal_d2.commands.train` or `eval`.

    Raises:
        UserError: for anything the user can correct.
    """
    import_modules(args.imports)  # a spawned process has not imported them
    args.config_file = find_config(args.config_file)  # the log has the path
    cfg = load_config(
        args.config_file, args.opts, trust_files=args.trust_files, allow_download=args.allow_download
    )
    training, unread = not args.eval_only, unread_keys(cfg)
    run_checks(cfg, "config", training=training)
    try:
        run_checks(cfg, "datasets", training=training)
    except UserError as error:
        # The cause is often a key that nothing reads, such as a misspelt one.
        raise UserError("; ".join([str(error), *unread])) from error
    run_checks(cfg, "metrics", "processes", training=training)
    if args.eval_only:
        _set_up(cfg, args, unread)
        if args.detections:
            score_detections(cfg, args)
        else:
            _evaluate(cfg, args)
        return
    check_restarts(resume=args.resume)
    # The lock is taken before any file is written to OUTPUT_DIR, log.txt included.
    with output_lock(cfg.OUTPUT_DIR):
        _set_up(cfg, args, unread)
        trainer = _trainer(cfg, args)
        save_config(cfg)
        trainer.train()


def _set_up(cfg: CfgNode, args: argparse.Namespace, unread: list[str]) -> None:
    set_up_job(cfg, args)
    if comm.is_main_process():
        for line in unread:
            logger.warning(line)
        # Also for test sets, before training starts: their records are first read when training ends.
        for name in datasets_of(cfg, training=not args.eval_only):
            announce(name)
        for line in annotation_warnings(cfg, training=not args.eval_only):
            logger.warning(line)


def _trainer(cfg: CfgNode, args: argparse.Namespace) -> FocalTrainer:
    with building("trainer"):
        trainer = FocalTrainer(resolve_alpha(cfg))
    trainer.checkpointer.trust_files = args.trust_files
    trainer.checkpointer.allow_download = args.allow_download
    trainer.resume_or_load(resume=args.resume)
    return trainer


def _evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    with building("model"):
        model = FocalTrainer.build_model(cfg)
    checkpointer = FocalCheckpointer(
        model,
        cfg.OUTPUT_DIR,
        partial=False,
        trust_files=args.trust_files,
        allow_download=args.allow_download,
    )
    if not (cfg.MODEL.WEIGHTS or (args.resume and checkpointer.has_checkpoint())):
        where = f" (--resume finds none in {cfg.OUTPUT_DIR})" if args.resume else ""
        raise UserError(f"--eval-only needs a checkpoint: add MODEL.WEIGHTS FILE{where}")
    content = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    _compare_classes(cfg, content)
    point = saved_point(content, "the checkpoint")
    if comm.is_main_process():
        without = "not in the checkpoint; each dataset is analysed at a score that is chosen on it"
        logger.info(f"operating point: {point or without}")
    # The config.yaml of a training must describe the training, not a later evaluation.
    if not was_trained_in(cfg.OUTPUT_DIR):
        save_config(cfg)
    results = FocalTrainer.test(cfg, model, evaluators_at(FocalTrainer, cfg, point))
    if comm.is_main_process():
        verify_results(cfg, results)


def _compare_classes(cfg: CfgNode, content: dict[str, Any]) -> None:
    """Compare the class names in a checkpoint with those of the test sets.

    Raises:
        UserError: if they are in another order, which makes every figure of a class wrong.
    """
    card = saved_card(content, "the checkpoint")
    ours = None if card is None else card.class_names
    for name in cfg.DATASETS.TEST:
        difference, permuted = class_difference(ours, known_class_names(name), f'dataset "{name}"')
        if permuted:
            raise UserError(difference)
        if difference and comm.is_main_process():
            logger.warning(difference)


def check_job(config_file: str, overrides: Sequence[str] = (), *, num_gpus: int = 1) -> str:
    """Run all checks of a training, and build what it needs, without reading an image.

    Args:
        config_file: path of the YAML file.
        overrides: KEY VALUE pairs; SEED and OUTPUT_DIR are not among them.
        num_gpus: processes of the job, on this machine.

    Returns:
        The whole config as YAML, except for OUTPUT_DIR and SEED: runs with the same text can be compared.

    Raises:
        UserError: for anything the user can correct.
    """
    for key in ("SEED", "OUTPUT_DIR"):
        if key in overrides[::2]:
            raise UserError(f"{key} is set for each run; it can't be an override")
    check_devices(num_gpus, 1)
    cfg = load_config(config_file, overrides)
    run_checks(cfg, *PHASES, processes=num_gpus)
    comparable = cfg.clone()
    comparable.defrost()
    comparable.OUTPUT_DIR, comparable.SEED = "", -1
    return str(comparable.dump())
