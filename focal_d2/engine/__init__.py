"""Running things: configs and checks, jobs, the trainer."""

from focal_d2 import register
from focal_d2.engine.alpha import resolve_alpha
from focal_d2.engine.job import check_job, launch_job
from focal_d2.engine.trainer import FocalTrainer
from focal_d2.load_config import load_config

__all__ = [
    "FocalTrainer",
    "check_job",
    "launch_job",
    "load_config",
    "resolve_alpha",
]

register()  # in the process of a command, importing focal_d2 does not
