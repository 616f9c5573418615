"""Running things: configs and checks, trainer, predictor, pictures."""

from focal_d2.engine.alpha import resolve_alpha
from focal_d2.engine.cli import (
    Parser,
    add_trust_flag,
    argument_parser,
    check_writable,
    command_line,
    positive,
)
from focal_d2.engine.job import check_job, launch_job
from focal_d2.engine.load_config import load_config
from focal_d2.engine.trainer import FocalTrainer

__all__ = [
    "FocalTrainer",
    "Parser",
    "add_trust_flag",
    "argument_parser",
    "check_job",
    "check_writable",
    "command_line",
    "launch_job",
    "load_config",
    "positive",
    "resolve_alpha",
]
