"""Evaluate a checkpoint on DATASETS.TEST.

focal-d2 eval --config-file output/config.yaml MODEL.WEIGHTS output/model_final.pth OUTPUT_DIR output/eval
"""

import argparse

from focal_d2.commands.cli import Parser
from focal_d2.commands.train import add_job_options


def add_options(parser: Parser) -> None:
    """Add the options of a job."""
    add_job_options(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate."""
    from focal_d2.engine import launch_job

    args.eval_only = True
    launch_job(args)
