"""COCO evaluation with detectron2's evaluator and pycocotools."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from detectron2.evaluation import COCOEvaluator
from tabulate import tabulate

# Where pycocotools' summary has the average recall at most 1, 10 and 100 detections an image.
_RECALL_STATS = {6: "AR@{0}", 7: "AR@{1}", 8: "AR@{2}"}

# COCO's small, medium and large boxes, in square pixels.
_AREAS = {"APs": (0.0, 32.0**2), "APm": (32.0**2, 96.0**2), "APl": (96.0**2, float("inf"))}


class FocalCOCOEvaluator(COCOEvaluator):
    """detectron2's evaluator that also reports average recall, 0 where a model finds nothing, and reads
    files without area or iscrowd."""

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        """See detectron2's `COCOEvaluator`."""
        super().__init__(dataset_name, **kwargs)
        # pycocotools needs both; many exports have neither.
        for annotation in self._coco_api.anns.values():
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    def _derive_coco_results(
        self, coco_eval: Any, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        for stat, name in _RECALL_STATS.items():
            value = float("nan") if coco_eval is None else float(coco_eval.stats[stat])
            results[name.format(*self._max_dets_per_image)] = 100 * value if value >= 0 else float("nan")
        if coco_eval is None:
            # detectron2 has NaN for a model that finds nothing; of the boxes there are it misses every one.
            areas = [a["area"] for a in self._coco_api.anns.values() if not a["iscrowd"]]
            for name in results:
                low, high = _AREAS.get(name, (0.0, float("inf")))
                if any(low <= area <= high for area in areas):
                    results[name] = 0.0
        return results


def format_results(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Draw a Markdown table of the box metrics.

    Args:
        results: dataset name -> task ("bbox") -> metric -> per cent.

    Returns:
        One row a dataset, one column a metric; per-class figures are left to the log.
    """
    rows = [
        {"dataset": dataset, **{k: v for k, v in tasks["bbox"].items() if not k.startswith("AP-")}}
        for dataset, tasks in results.items()
        if "bbox" in tasks
    ]
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f")
