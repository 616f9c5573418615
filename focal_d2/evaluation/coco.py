"""COCO evaluation with the interface of detectron2's evaluator."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from pycocotools.coco import COCO
from tabulate import tabulate

from focal_d2.detectron2_compat import COCOHooks
from focal_d2.errors import UserError, escaped
from focal_d2.evaluation.backends import (
    AREAS,
    IOUS,
    Curves,
    Detections,
    Truth,
    as_coco,
    check_backend,
    coco_curves,
)
from focal_d2.evaluation.errors import analyse, finite
from focal_d2.evaluation.ground_truth import read_ground_truth
from focal_d2.evaluation.operating_point import BEST_F1, SCORE_OF, Goal, OperatingPoint
from focal_d2.storage.files import write_aside

logger = logging.getLogger(__name__)


class FocalCOCOEvaluator(COCOHooks, COCOEvaluator):
    """detectron2's evaluator for boxes, with a fast library and with average recall.

    AP is 0, not NaN, for a model without detections. The evaluator reads files without area or iscrowd. It
    writes no COCO file for datasets that have none. An image counts once, also if several processes saw it.
    """

    def __init__(
        self,
        dataset_name: str,
        tasks: Sequence[str] | None = ("bbox",),
        distributed: bool = True,
        output_dir: str | None = None,
        *,
        backend: str = "hotcoco",
        max_dets_per_image: int | Sequence[int] | None = None,
        goal: Goal = BEST_F1,
        validation: bool = False,
    ) -> None:
        """See detectron2's `COCOEvaluator`.

        With `output_dir`, "operating_point" is a second task of the results: "score", and "precision",
        "recall" and "f1" from it on (0 to 1, at IoU 0.5, all classes together). The score is that of the
        attribute `operating_point`, or is chosen on the detections if that is None.

        Args:
            dataset_name: registered; see `read_ground_truth`.
            tasks: boxes only.
            distributed: gather the predictions of all processes.
            output_dir: folder for predictions and the analysis; None: they are not written.
            backend: "hotcoco" or "pycocotools".
            max_dets_per_image: limits on the detections of a class in an image; AP takes the last. A number n
                is those of [1, 10] that are lower, and n; None is [1, 10, 100].
            goal: what the score of the operating point is chosen for.
            validation: whether the dataset is held out from testing, too: a report says where it was chosen.

        Raises:
            UserError: for a mistake in these, or for a dataset's file that can't be read.
        """
        # Not detectron2's constructor: it would write a COCO file, and it takes only one limit.
        if tuple(tasks or ("bbox",)) != ("bbox",):
            raise UserError(f'tasks is {tasks}: FocalCOCOEvaluator evaluates boxes, ("bbox",)')
        self._name = dataset_name
        self._gathers = distributed
        self._backend = check_backend(backend)
        self._max_dets = detection_limits(max_dets_per_image)
        self._goal, self._validation = goal, validation
        self.operating_point: OperatingPoint | None = None
        self._ground_truth = read_ground_truth(dataset_name)
        self.metadata, self.output_dir = MetadataCatalog.get(dataset_name), output_dir
        self.prepare(
            logger=logger,
            metadata=self.metadata,
            output_dir=output_dir,
            # A test set may have no annotations. Its predictions are then written and not evaluated.
            has_annotations=self._ground_truth.truth is not None,
        )

    def take_detections(self, detections: Sequence[Mapping[str, Any]]) -> None:
        """Take detections from elsewhere in the place of a model's.

        Args:
            detections: as in `coco_instances_results.json`, each with "image_id", "category_id" (the number
                of a class in the dataset), "bbox" (left, top, width, height in pixels) and "score".

        Raises:
            UserError: for an image or a category that the dataset does not have.
        """
        ids, labels, _ = self._ground_truth
        of_image: dict[Any, list[dict[str, Any]]] = {image_id: [] for image_id in ids}
        for detection in detections:
            image_id, number = detection["image_id"], detection["category_id"]
            for key, value, known in (("image_id", image_id, of_image), ("category_id", number, labels)):
                if value not in known:
                    raise UserError(f'{key} {value} is not in the ground truth of dataset "{self._name}"')
            of_image[image_id].append({**detection, "category_id": labels[number]})
        self.predictions = [{"image_id": x, "instances": boxes} for x, boxes in of_image.items()]

    def evaluate(self, img_ids: Sequence[Any] | None = None) -> dict[str, Any]:
        """Compute the metrics from all processes' predictions; see detectron2's `COCOEvaluator`.

        Args:
            img_ids: the images to evaluate; None: all.

        Returns:
            {"bbox": metric -> per cent} in the main process, {} in others. NaN if there are no such boxes.
        """
        if self._gathers:
            comm.synchronize()
            gathered = comm.gather(self.predictions, dst=0)
            if not comm.is_main_process():
                return {}
            self.predictions = list(itertools.chain(*gathered))
        # A sampler that fills up its last batch repeats images.
        self.predictions = list({p["image_id"]: p for p in self.predictions}.values())
        return super().evaluate(img_ids)

    def evaluate_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Sequence[Any] | None = None
    ) -> None:
        """Write the predictions, and compute the metrics if the dataset has annotations."""
        ids, labels, truth = self._ground_truth
        instances = [box for prediction in predictions for box in prediction["instances"]]
        detections = self._detections(instances, ids, len(labels))
        if self.output_dir:
            numbers = {label: number for number, label in labels.items()}
            path = str(Path(self.output_dir) / "coco_instances_results.json")
            logger.info(f"Saving results to {path}")
            content = [{**x, "category_id": numbers[x["category_id"]]} for x in instances]
            write_aside(path, lambda file: file.write(msgspec.json.encode(content)))
        if truth is None:
            logger.info("Annotations are not available for evaluation.")
            return
        if img_ids is not None:
            chosen = np.isin(np.arange(len(ids)), [ids.index(i) for i in img_ids])
            truth = _of_images(truth, chosen)
            detections = _of_images(detections, chosen)
        logger.info(f"Evaluating {len(instances)} boxes with {self._backend} ...")
        curves = coco_curves(truth, detections, backend=self._backend, max_dets=self._max_dets)
        self.results["bbox"] = self.derive_results(
            SimpleNamespace(stats=_average_precisions(curves), eval=curves._asdict()),
            self.metadata.get("thing_classes"),
        )
        for i, limit in enumerate(self._max_dets):
            self.results["bbox"][f"AR@{limit}"] = _per_cent(_mean(curves.recall[:, :, 0, i]))
        if self.output_dir:
            self._write_analysis(truth, detections, curves)

    def _write_analysis(self, truth: Truth, detections: Detections, curves: Curves) -> None:
        names = self.metadata.get("thing_classes") or [str(k) for k in range(truth.classes)]
        point = self.operating_point
        analysis = analyse(
            truth,
            detections,
            curves,
            names=names,
            max_dets=self._max_dets,
            goal=self._goal,
            score=None if point is None else point.score,
        )
        chosen = dict(analysis["operating_point"])
        scores = {f"{SCORE_OF}{name}": x for name, x in chosen.pop("per_class").items()}
        self.results["operating_point"] = {
            **{name: math.nan if x is None else x for name, x in chosen.items()},
            **scores,
        }
        if point is not None:
            analysis["operating_point"]["per_class"] = dict(point.per_class)
        analysis["operating_point"] |= {
            "goal": self._goal.in_words(analysis["operating_point"]) if point is None else point.goal,
            "chosen_on": self._name if point is None else point.chosen_on,
            "validation": self._validation if point is None else point.validation,
        }
        analysis["coco"] = {**finite(self.results["bbox"]), **analysis["coco"]}
        analysis = {"dataset": self._name, "backend": self._backend, **analysis}
        path = str(Path(self.output_dir or "") / "analysis.json")
        write_aside(path, lambda file: file.write(msgspec.json.encode(analysis)))

    def coco_api(self) -> COCO:
        """Return pycocotools' object with the boxes, which detectron2's evaluation of proposals reads."""
        assert self._ground_truth.truth is not None  # detectron2 calls this only if there are annotations
        return as_coco(self._ground_truth.truth, self._ground_truth.image_ids)

    def _detections(self, instances: list[dict[str, Any]], ids: list[Any], classes: int) -> Detections:
        position = {image_id: i for i, image_id in enumerate(ids)}
        try:
            image = np.array([position[x["image_id"]] for x in instances], dtype=np.int64)
        except KeyError as error:
            raise UserError(
                f'image_id {error} is not in the ground truth of dataset "{self._name}"'
            ) from error
        labels = np.array([x["category_id"] for x in instances], dtype=np.int64)
        if len(labels) and labels.max() >= classes:
            raise UserError(
                f'the model found class {labels.max()}, dataset "{self._name}" has {classes} classes: '
                "the model's number of classes must be the same"
            )
        boxes = np.array([x["bbox"] for x in instances], dtype=np.float64).reshape(-1, 4)
        return Detections(image, boxes, labels, np.array([x["score"] for x in instances], dtype=np.float64))


def detection_limits(limits: int | Sequence[int] | None) -> tuple[int, ...]:
    """Check the limits on detections of a class in an image; see `FocalCOCOEvaluator`.

    Raises:
        UserError: unless they are ascending whole numbers above 0.
    """
    if limits is None or isinstance(limits, int):
        last = 100 if limits is None else limits
        limits = [*(x for x in (1, 10) if x < last), last]
    if not limits or any(type(x) is not int or x < 1 for x in limits) or sorted(set(limits)) != list(limits):
        raise UserError(
            f"TEST.FOCAL.MAX_DETS (max_dets_per_image) is {list(limits)}; it must be ascending whole numbers "
            "above 0"
        )
    return tuple(limits)


def metric_names(limits: int | Sequence[int] | None, classes: Sequence[str]) -> list[str]:
    """Return the names of the metrics that `FocalCOCOEvaluator` returns under "bbox".

    Args:
        limits: its max_dets_per_image.
        classes: names; for a single class there is no separate AP.
    """
    of_classes = classes if len(classes) > 1 else ()
    return [
        *("AP", "AP50", "AP75", "APs", "APm", "APl"),
        *(f"AP-{name}" for name in of_classes),
        *(f"AR@{limit}" for limit in detection_limits(limits)),
    ]


def _of_images(columns: Any, chosen: np.ndarray) -> Any:
    """Keep the rows of the chosen images, (N,) bool."""
    kept = chosen[columns.image]
    return columns._replace(**{k: v[kept] for k, v in columns._asdict().items() if isinstance(v, np.ndarray)})


def _mean(values: np.ndarray) -> float:
    """Return the mean of the defined values, as pycocotools does; -1 if there are none."""
    values = values[values > -1]
    return float(np.mean(values)) if values.size else -1.0


def _per_cent(value: float) -> float:
    return 100 * value if value >= 0 else float("nan")


def _average_precisions(curves: Curves) -> list[float]:
    """Return AP, AP50, AP75, and AP of small, medium and large boxes: pycocotools' first six, from 0 to 1."""
    last = curves.precision[..., -1]
    by_iou = [_mean(last[np.isclose(IOUS, iou)][..., 0]) for iou in (0.5, 0.75)]
    return [_mean(last[..., 0]), *by_iou, *(_mean(last[..., i]) for i in range(1, len(AREAS)))]


def log_results(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Log `format_results`, if there is a result: a test set without annotations has none."""
    table = format_results(results)
    if table:
        logger.info(f"Average precision and recall, per cent:\n{table}", extra={"lines": True})


def format_results(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of the box metrics.

    Args:
        results: dataset name -> task ("bbox") -> metric -> per cent; after a validation also "total_loss".

    Returns:
        A row for each dataset and a column for each metric, without the AP of classes, which is in the log.
    """
    rows = [
        {
            "dataset": escaped(dataset),
            **{k: v for k, v in tasks["bbox"].items() if not k.startswith("AP-")},
            **({"total loss": tasks["total_loss"]} if "total_loss" in tasks else {}),
        }
        for dataset, tasks in results.items()
        if "bbox" in tasks
    ]
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f")
