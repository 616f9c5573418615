"""Detect objects in images, folders of images and videos.

focal-d2 predict --model trees.pth --output out field.jpg more_fields/ "day*/*.png"

In --output: records.jsonl, a line for each image; pictures with boxes; detections.csv; with --format others.
Exit status 1: some files could not be read; they are named, and left out. See docs/prediction.md.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from focal_d2.commands.cli import Parser, add_import_flag, add_trust_flag, positive
from focal_d2.console import tell, write
from focal_d2.errors import UserError, escaped

_FORMATS = ("pictures", "csv", "coco", "yolo")
# How a config's key begins, or what it is; all that comes after it are KEY VALUE pairs.
_KEY = re.compile(
    r"(MODEL|INPUT|DATASETS|DATALOADER|SOLVER|TEST|GLOBAL)\.\S+"
    r"|SEED|CUDNN_BENCHMARK|FLOAT32_PRECISION|OUTPUT_DIR|VIS_PERIOD|VERSION"
)


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.intermixed = True
    parser.add_argument(
        "inputs", nargs="*", metavar="INPUT", help="image, video, folder, or a pattern such as 'a/**/*.jpg'"
    )
    parser.add_argument("--model", metavar="FILE", help="a checkpoint (.pth); its config is in it")
    parser.add_argument("--config-file", metavar="CFG", help="a YAML file instead of the checkpoint's config")
    parser.add_argument("--dataset", help="a registered dataset's name, instead of inputs")
    parser.add_argument("--output", type=Path, help="folder for what is written")
    parser.add_argument(
        "--format",
        type=_formats,
        default=("pictures", "csv"),
        metavar="A,B",
        help=f"what is written besides records.jsonl: {', '.join(_FORMATS)}, or none (default: pictures,csv)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score that counts (default: the checkpoint's operating point, or 0.3 if it has none); "
        "the model returns none below SCORE_THRESH_TEST",
    )
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines")
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="most images that are computed together"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue a run that was stopped, if there is one"
    )
    parser.add_argument(
        "--shard", type=_shard, default=(1, 1), metavar="I/N", help="only the I-th of N parts of the images"
    )
    parser.add_argument("--join", action="store_true", help="put the shards in --output together")
    add_import_flag(parser)
    add_trust_flag(parser)


def _formats(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(dict.fromkeys(x.strip() for x in text.split(",")))
    for name in names:
        if name not in _FORMATS:
            raise argparse.ArgumentTypeError(f'"{name}" is none of {", ".join(_FORMATS)}, none')
    return names


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not I/N with I from 1 to N, such as 2/8")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    """Detect, write and print."""
    inputs, overrides = _split(args.inputs)
    if args.output is None and (not args.json or args.join or args.resume or args.shard != (1, 1)):
        raise UserError("--output is missing; only --json alone needs none")
    if args.join:
        return _join(args, inputs)
    if bool(inputs) == (args.dataset is not None):
        raise UserError("give images, folders or videos, or --dataset NAME, and not both")
    if args.model is None and args.config_file is None:
        raise UserError("--model is missing: a checkpoint (.pth); or --config-file with MODEL.WEIGHTS")
    if args.config_file is None and not args.model.endswith(".pth"):
        raise UserError(
            f"--model is {args.model}; a checkpoint of another name (not .pth) needs --config-file"
        )
    prediction, threshold = _prepare(args, inputs, overrides)
    tell(f"threshold: {threshold}; --threshold sets another")
    number = prediction()
    if prediction.cut[0]:
        tell(
            f"TEST.DETECTIONS_PER_IMAGE {prediction.limit} cuts off detections above the threshold in "
            f"{prediction.cut[0]} of {number} images; the first is {prediction.cut[1]}"
        )
    failed = prediction.failed
    if failed:
        tell(
            f"{failed} of {number} files can't be read"
            + (f"; {args.output} names them" if args.output else "")
        )
    if not args.json:
        part = " of shard {}/{}".format(*args.shard) if args.shard != (1, 1) else ""
        write(escaped(f"{number - failed} images{part} in {args.output}"))
    return 1 if failed else 0


def _join(args: argparse.Namespace, inputs: list[str]) -> int:
    from focal_d2.inference.formats import write_formats
    from focal_d2.inference.records import join_shards

    if inputs or args.dataset or args.shard != (1, 1):
        raise UserError("--join takes --output and --format only")
    settings = join_shards(args.output)
    write_formats(args.output, settings, tuple(x for x in args.format if x != "pictures"))
    write(escaped(f"{settings.number} images in {args.output}"))
    return 0


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Divide the arguments into inputs, and KEY VALUE pairs, which come last."""
    keys = (i for i, x in enumerate(texts) if _KEY.fullmatch(x) and not os.path.lexists(x))
    first = next(keys, len(texts))
    return texts[:first], texts[first:]


def _prepare(args: argparse.Namespace, texts: list[str], overrides: list[str]) -> tuple[Any, str]:
    """Build the model and find the files; return the run and its threshold in words."""
    from focal_d2.data.dataset_checks import check_datasets
    from focal_d2.data.datasets import ground_truth
    from focal_d2.engine import load_config
    from focal_d2.evaluation.operating_point import SCORE_WITHOUT_POINT
    from focal_d2.inference import Predictor
    from focal_d2.inference.inputs import Inputs, find_inputs
    from focal_d2.inference.prediction_run import PredictionRun

    trust = {"trust_files": args.trust_files, "allow_download": args.allow_download}
    if args.model is not None and args.config_file is not None:
        overrides = ["MODEL.WEIGHTS", args.model, *overrides]
    if args.dataset is not None:
        overrides = [*overrides, "DATASETS.TEST", f"({args.dataset!r},)"]
    cfg = load_config(args.config_file or args.model, overrides, **trust)
    truth = None
    if args.dataset is not None:
        check_datasets(cfg, training=False)
        truth = {str(file): boxes for file, boxes in ground_truth(args.dataset).items()}
        inputs = Inputs.of(list(truth))
    else:
        inputs = find_inputs(texts, besides=args.output)
    # In tiles it is a limit on each of them.
    limit = 0 if cfg.TEST.FOCAL.TILES.ENABLED else cfg.TEST.DETECTIONS_PER_IMAGE
    if limit > 0:
        # One detection above the limit shows that the limit cuts detections off.
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TEST.DETECTIONS_PER_IMAGE = limit + 1
    predictor = Predictor(cfg, threshold=args.threshold, batch_size=args.batch_size, **trust)
    words = f"score {args.threshold}"
    if args.threshold is None:
        point = predictor.operating_point
        if point is None:
            predictor.thresholds[:] = SCORE_WITHOUT_POINT
        words = f"{point or f'score {SCORE_WITHOUT_POINT:g}, because the checkpoint has no operating point'}"
    prediction = PredictionRun(
        predictor,
        inputs,
        args.output,
        formats=args.format,
        shard=args.shard,
        resume=args.resume,
        limit=limit,
        truth=truth,
        on_record=write if args.json else lambda line: None,
        on_problem=tell,
    )
    return prediction, words
