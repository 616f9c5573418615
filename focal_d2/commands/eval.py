"""Evaluate a checkpoint, or detections that another program wrote, on DATASETS.TEST.

focal-d2 eval --config-file output/config.yaml MODEL.WEIGHTS output/model_final.pth OUTPUT_DIR output/eval
focal-d2 eval --config-file CFG --detections FILE DATASETS.TEST '["mine_val"]' OUTPUT_DIR output/other
"""

import argparse

from focal_d2.commands.cli import Parser
from focal_d2.commands.train import add_job_options


def add_options(parser: Parser) -> None:
    """Add the options of a job, and those for detections in a file."""
    add_job_options(parser)
    parser.add_argument(
        "--detections",
        metavar="FILE",
        help="evaluate these, a JSON file as COCO has it, instead of a checkpoint",
    )
    parser.add_argument(
        "--operating-point",
        metavar="FILE",
        help="for --detections: the analysis.json of the evaluation that chose it (default: chosen anew)",
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    from focal_d2.engine import launch_job

    args.eval_only = True
    launch_job(args)
