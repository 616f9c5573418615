"""A trained detector on images, and the forms of its results."""

from focal_d2.inference.predictor import Predictor
from focal_d2.inference.results import Detection, Detections

__all__ = ["Detection", "Detections", "Predictor"]
