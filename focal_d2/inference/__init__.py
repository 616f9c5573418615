"""A trained detector on images."""

from focal_d2.inference.predictor import Detections, Predictor

__all__ = ["Detections", "Predictor"]
