"""Running things: configs and checks, trainer, predictor, pictures."""

from focal_d2.engine.cli import command_line
from focal_d2.engine.predictor import Detections, Predictor
from focal_d2.engine.setup import load_config
from focal_d2.engine.trainer import FocalTrainer, job_arguments, launch_job

__all__ = [
    "Detections",
    "FocalTrainer",
    "Predictor",
    "command_line",
    "job_arguments",
    "launch_job",
    "load_config",
]
