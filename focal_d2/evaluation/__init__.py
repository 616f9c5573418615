"""From detections to numbers."""

from focal_d2.evaluation.coco import FocalCOCOEvaluator, format_results
from focal_d2.evaluation.lvis import FocalLVISEvaluator

__all__ = ["FocalCOCOEvaluator", "FocalLVISEvaluator", "format_results"]
