"""All checks of a job before it starts, in one list: training, evaluation, the doctor and a study call it.

Loading a config has checked each value by itself already (`focal_d2.engine.load_config`). The warnings on
annotations, which stop no job, are in `focal_d2.data.checks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm

from focal_d2.config.architectures import is_retinanet
from focal_d2.config.legal_values import check_values
from focal_d2.data.dataset_checks import check_datasets, check_has_training_data, datasets_of, held_out
from focal_d2.data.datasets import load_table
from focal_d2.data.mapper import FocalDatasetMapper
from focal_d2.data.sampling import check_sampler
from focal_d2.data.workers import check_handles
from focal_d2.engine.alpha import resolve_alpha
from focal_d2.engine.hooks.evaluation import check_best
from focal_d2.engine.launch.collectives import check_backend
from focal_d2.engine.optimizer import build_optimizer
from focal_d2.errors import UserError
from focal_d2.modeling.build import building
from focal_d2.storage.checkpoint import check_file
from focal_d2.storage.files import check_output


class Job(NamedTuple):
    """The job that is checked."""

    training: bool  # False: evaluation only
    processes: int


def run_checks(cfg: CfgNode, *phases: str, training: bool = True, processes: int | None = None) -> None:
    """Run the checks of some phases, in the order of `CHECKS`.

    Args:
        cfg: full config.
        phases: names of `PHASES`.
        training: whether the job trains; if not, it only evaluates.
        processes: of the job; None: as many as there are now.

    Raises:
        UserError: for the first mistake that would stop the job.
    """
    job = Job(training, comm.get_world_size() if processes is None else processes)
    for phase, check in CHECKS:
        if phase in phases:
            check(cfg, job)


def _device(cfg: CfgNode, job: Job) -> None:
    """Check that each of several processes gets a GPU of its own, which the launcher gives it."""
    if job.processes > 1 and torch.device(cfg.MODEL.DEVICE).index is not None:
        raise UserError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, one GPU for {job.processes} processes: set it to cuda, and "
            "choose the GPUs with CUDA_VISIBLE_DEVICES"
        )


def _output_dir(cfg: CfgNode, _: Job) -> None:
    if not cfg.OUTPUT_DIR:
        raise UserError("OUTPUT_DIR is empty; it must be the path of a folder")
    try:
        cfg.OUTPUT_DIR.encode()  # TensorBoard takes no other names
    except UnicodeEncodeError as error:
        raise UserError(
            f"OUTPUT_DIR is {cfg.OUTPUT_DIR}, which is not UTF-8: choose another folder, or set PYTHONUTF8=1"
        ) from error
    for name in ("", *held_out(cfg)):  # else it would be found out when training is done
        os.fsencode(os.path.join(cfg.OUTPUT_DIR, name))  # `user_message` has the line for what this raises
    check_output(cfg.OUTPUT_DIR)


def _expected_results(cfg: CfgNode, _: Job) -> None:
    """Check that there will be results to compare. detectron2 looks for them when all the work is done."""
    expected, tests = cfg.TEST.EXPECTED_RESULTS, cfg.DATASETS.TEST
    if expected and len(tests) != 1:
        raise UserError(f"TEST.EXPECTED_RESULTS needs one dataset in DATASETS.TEST, not {len(tests)}")
    for task, *_ in expected:
        if is_retinanet(cfg) and task != "bbox":
            raise UserError(f'TEST.EXPECTED_RESULTS names the task "{task}"; legal values: bbox')


def _training_values(cfg: CfgNode, job: Job) -> None:
    """Check the keys that training reads, also for architectures of other packages."""
    if job.training:
        check_values(
            cfg, "MODEL.FOCAL.AMP.", "INPUT.", "SOLVER.", "DATALOADER.", "TEST.", "VIS_PERIOD", "SEED"
        )
        if cfg.SOLVER.RESCALE_INTERVAL and cfg.SOLVER.WARMUP_ITERS >= cfg.SOLVER.MAX_ITER:
            raise UserError(
                f"SOLVER.WARMUP_ITERS is {cfg.SOLVER.WARMUP_ITERS}; with SOLVER.RESCALE_INTERVAL it must be "
                f"below SOLVER.MAX_ITER, {cfg.SOLVER.MAX_ITER}"
            )


def _batch(cfg: CfgNode, job: Job) -> None:
    """Check that the processes can share a batch, and that each has an image for every part."""
    if not job.training:
        return
    images, rest = divmod(cfg.SOLVER.IMS_PER_BATCH, job.processes)
    if images < 1 or rest:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {cfg.SOLVER.IMS_PER_BATCH}; it must be a multiple of the number of "
            f"processes, {job.processes}"
        )
    if (parts := cfg.SOLVER.FOCAL.ACCUMULATE) > images:
        raise UserError(
            f"SOLVER.FOCAL.ACCUMULATE is {parts}; it must be within 1 and the {images} images that a process "
            "has in a batch"
        )


def _sampler(cfg: CfgNode, job: Job) -> None:
    if job.training:
        check_sampler(cfg)


def _training_data(cfg: CfgNode, job: Job) -> None:
    if job.training:
        check_has_training_data(cfg)


def _proposals(cfg: CfgNode, job: Job) -> None:
    if job.training and cfg.DATASETS.VAL and cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS is True, but no key names the proposals of DATASETS.VAL: leave it empty"
        )


def _datasets(cfg: CfgNode, job: Job) -> None:
    check_datasets(cfg, training=job.training)


def _keypoints(cfg: CfgNode, job: Job) -> None:
    """Check that the training sets have the keypoints that detectron2's mapper asks for."""
    names = cfg.DATASETS.TRAIN if job.training and cfg.MODEL.KEYPOINT_ON else []
    for name in set(names).intersection(DatasetCatalog.list()):
        if "keypoint_names" not in MetadataCatalog.get(name).as_dict():
            raise UserError(f'MODEL.KEYPOINT_ON is True, but dataset "{name}" has no keypoints')


def _image_sizes(cfg: CfgNode, job: Job) -> None:
    """Check the sizes in annotations: such an image could not be read, and its anchors would fill memory."""
    most = cfg.INPUT.FOCAL.MAX_PIXELS
    for name in datasets_of(cfg, training=job.training):
        table = load_table(name)
        pixels = table.sizes.astype(float).prod(1)
        if len(table) and pixels.max() > most:
            i = int(pixels.argmax())
            height, width = table.sizes[i].tolist()
            raise UserError(
                f'dataset "{name}": {table.file_names[i]} has {height} × {width} pixels by its annotations, '
                f"more than INPUT.FOCAL.MAX_PIXELS {most}"
            )


def _best_metric(cfg: CfgNode, job: Job) -> None:
    if job.training:
        check_best(cfg)


def _exchange(cfg: CfgNode, _: Job) -> None:
    check_backend(torch.device(cfg.MODEL.DEVICE).type)


def _file_handles(cfg: CfgNode, job: Job) -> None:
    """Check the limit on open files: an evaluation during training starts additional workers."""
    evaluates = bool(cfg.DATASETS.VAL or cfg.DATASETS.TEST)
    check_handles(cfg.DATALOADER.NUM_WORKERS, loaders=2 if job.training and evaluates else 1)


def _mapper(cfg: CfgNode, job: Job) -> None:
    with building("trainer" if job.training else "model"):
        FocalDatasetMapper(cfg, is_train=job.training)


def _model_and_solver(cfg: CfgNode, job: Job) -> None:
    """Build the model, and for training its optimizer and schedule, on the CPU."""
    cfg = (resolve_alpha(cfg) if job.training else cfg).clone()
    cfg.defrost()
    if cfg.MODEL.DEVICE != "cpu":
        # On a GPU, building would leave a context and memory allocated. AMP is off, because a CPU has other
        # types than the GPU.
        cfg.MODEL.DEVICE, cfg.MODEL.FOCAL.AMP.ENABLED = "cpu", False
    with building("trainer" if job.training else "model"):
        model = build_model(cfg)
        if job.training:
            build_lr_scheduler(cfg, build_optimizer(cfg, model))


def _weights(cfg: CfgNode, _: Job) -> None:
    check_file(cfg.MODEL.WEIGHTS)


# The phases, by what their checks need: only the config; the datasets' files; the names of their classes,
# which are part of metrics' names; the job's processes; the mapper, which reads images; model and solver.
PHASES = ("config", "datasets", "metrics", "processes", "input", "build")
CHECKS: tuple[tuple[str, Callable[[CfgNode, Job], None]], ...] = (
    ("config", _device),
    ("config", _output_dir),
    ("config", _expected_results),
    ("config", _training_values),
    ("config", _batch),
    ("config", _sampler),
    ("config", _training_data),
    ("config", _proposals),
    ("datasets", _datasets),
    ("datasets", _image_sizes),
    ("input", _keypoints),
    ("metrics", _keypoints),
    ("metrics", _best_metric),
    ("processes", _exchange),
    ("processes", _file_handles),
    ("input", _mapper),
    ("build", _model_and_solver),
    ("build", _weights),
)
