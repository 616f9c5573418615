"""Running things: configs and checks, trainer, predictor, pictures."""

from detectron2.engine import default_argument_parser

from focal_d2.engine.alpha import resolve_alpha
from focal_d2.engine.cli import check_writable, command_line, positive
from focal_d2.engine.predictor import Detections, Predictor
from focal_d2.engine.setup import building, load_config
from focal_d2.engine.trainer import FocalTrainer, check_job, launch_job

__all__ = [
    "Detections",
    "FocalTrainer",
    "Predictor",
    "building",
    "check_job",
    "check_writable",
    "command_line",
    "default_argument_parser",
    "launch_job",
    "load_config",
    "positive",
    "resolve_alpha",
]
