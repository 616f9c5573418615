"""Evaluate detections of a file, which any program may have made, as those of a model are evaluated."""

from __future__ import annotations

import argparse
import logging
from typing import Annotated, Any

import msgspec
from detectron2.config import CfgNode
from msgspec import Meta, Struct

from focal_d2.engine.evaluators import build_evaluator
from focal_d2.errors import UserError, reason
from focal_d2.evaluation import FocalCOCOEvaluator, log_results
from focal_d2.evaluation.operating_point import OPERATING_POINT, OperatingPoint
from focal_d2.storage.files import LARGEST_ANNOTATIONS, read_data

logger = logging.getLogger(__name__)


class Detection(Struct):
    """A detection in COCO's format of results."""

    image_id: int | str
    category_id: int  # the dataset's own number of the class
    bbox: Annotated[list[float], Meta(min_length=4, max_length=4)]  # left, top, width, height in pixels
    score: Annotated[float, Meta(ge=0, le=1)]


def score_detections(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Evaluate `--detections` on the one dataset of `DATASETS.TEST`, and log the table.

    Args:
        cfg: full config.
        args: of `focal_d2.commands.eval`.

    Raises:
        UserError: for a file that cannot be read or does not fit the dataset.
    """
    if len(cfg.DATASETS.TEST) != 1:
        raise UserError(
            f"--detections needs one dataset in DATASETS.TEST, that of the file, not {len(cfg.DATASETS.TEST)}"
        )
    (name,) = cfg.DATASETS.TEST
    evaluator = build_evaluator(cfg, name)
    if not isinstance(evaluator, FocalCOCOEvaluator):
        raise UserError(f'--detections: dataset "{name}" is evaluated as LVIS, which takes no such file')
    if args.operating_point:
        evaluator.operating_point = read_point(args.operating_point)
    detections = _decoded(args.detections, list[Detection], "a list of detections as COCO has it")
    try:
        evaluator.take_detections([msgspec.structs.asdict(x) for x in detections])
    except UserError as error:
        raise UserError(f"{args.detections}: {error}") from error
    logger.info(f"operating point: {evaluator.operating_point or 'chosen on this dataset'}")
    log_results({name: evaluator.evaluate()})


def read_point(path: str) -> OperatingPoint:
    """Return the operating point that an evaluation chose, from its analysis.json.

    Raises:
        UserError: if there is none in the file.
    """
    content = _decoded(path, dict[str, msgspec.Raw], "an analysis.json of an evaluation")
    try:
        point = OperatingPoint.from_dict(msgspec.json.decode(content[OPERATING_POINT]))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} has no operating point: {reason(error)}") from error
    assert point is not None
    return point


def _decoded(path: str, kind: Any, what: str) -> Any:
    try:
        return msgspec.json.decode(read_data(path, limit=LARGEST_ANNOTATIONS), type=kind)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not {what}: {reason(error)}") from error
