"""From detections to numbers."""

from focal_d2.evaluation.coco import FocalCOCOEvaluator, format_results

__all__ = ["FocalCOCOEvaluator", "format_results"]
