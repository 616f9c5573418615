"""From detections to numbers."""

from focal_d2.evaluation.backends import check_backend
from focal_d2.evaluation.coco import (
    FocalCOCOEvaluator,
    detection_limits,
    format_results,
    log_results,
    metric_names,
)
from focal_d2.evaluation.lvis import FocalLVISEvaluator

__all__ = [
    "FocalCOCOEvaluator",
    "FocalLVISEvaluator",
    "check_backend",
    "detection_limits",
    "format_results",
    "log_results",
    "metric_names",
]
