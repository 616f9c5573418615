"""Train a detector, with detectron2's own arguments.

One machine:       focal-d2 train --num-gpus 8 --config-file CFG
Continue:          focal-d2 train --resume --config-file CFG
Another setting:   focal-d2 train --config-file CFG SOLVER.BASE_LR 0.001
A limited time:    focal-d2 train --config-file CFG --minutes 30
Several machines:  docs/training.md
"""

import argparse

from focal_d2.commands.cli import Parser, add_config_options, add_trust_flag
from focal_d2.console import tell
from focal_d2.errors import UserError


def add_options(parser: Parser) -> None:
    """Add detectron2's options and ours."""
    add_job_options(parser)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS instead")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="lower SOLVER.MAX_ITER, and the schedule with it, to what this machine does in M minutes",
    )


def add_job_options(parser: Parser) -> None:
    """Add the options of a job that trains or evaluates: those of detectron2's `default_argument_parser`.

    This module repeats them, because importing detectron2 takes seconds.
    """
    add_config_options(parser, default="")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint, if any")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes on each machine (1)")
    parser.add_argument("--num-machines", type=int, default=1, metavar="N", help="(1)")
    parser.add_argument("--machine-rank", type=int, default=0, metavar="N", help="number of this one (0)")
    # detectron2's default is one port for all jobs of a user: a second job on the machine fails there.
    parser.add_argument(
        "--dist-url",
        metavar="URL",
        default="auto",
        help="where several machines meet: tcp://HOST:PORT of machine 0 (one machine: any free port)",
    )
    add_trust_flag(parser)


def run(args: argparse.Namespace) -> None:
    """Train, or evaluate."""
    from focal_d2.engine import launch_job

    if getattr(args, "minutes", None) is not None:
        args.opts = [*args.opts, *_within(args)]
    args.detections = None
    launch_job(args)


def _within(args: argparse.Namespace) -> list[str]:
    """Return overrides of the schedule for `--minutes`."""
    if args.resume or args.eval_only or args.num_gpus * args.num_machines > 1:
        raise UserError("--minutes is for a training of one process from its start")
    if not args.minutes > 0:
        raise UserError(f"--minutes is {args.minutes:g}; it must be above 0")
    from focal_d2.analysis.time_limit import fit_schedule
    from focal_d2.engine import load_config
    from focal_d2.engine.checks import PHASES, run_checks

    cfg = load_config(
        args.config_file, args.opts, trust_files=args.trust_files, allow_download=args.allow_download
    )
    run_checks(cfg, *PHASES, training=True)
    overrides, line = fit_schedule(cfg, args.minutes)
    tell(f"--minutes {args.minutes:g}: {line}")
    return overrides
