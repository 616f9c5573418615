from __future__ import annotations

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from focal_d2.data import register_datasets
from focal_d2.evaluation import FocalCOCOEvaluator, format_results


@pytest.fixture
def evaluator_and_records(coco_dataset, tmp_path):
    data = coco_dataset(images=3, classes=2)
    register_datasets([data.entry])
    evaluator = FocalCOCOEvaluator(
        data.name, tasks=("bbox",), output_dir=str(tmp_path / "out"), use_fast_impl=False
    )
    evaluator.reset()
    return evaluator, DatasetCatalog.get(data.name)


def instances_of(annotations, size=(64, 64)) -> Instances:
    boxes = torch.tensor([a["bbox"] for a in annotations], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    labels = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
    return Instances(
        size, pred_boxes=Boxes(boxes), scores=torch.full((len(boxes),), 0.9), pred_classes=labels
    )


def test_perfect_detections_score_100(evaluator_and_records):
    evaluator, records = evaluator_and_records
    outputs = [{"instances": instances_of(r["annotations"])} for r in records]
    evaluator.process(records, outputs)
    results = evaluator.evaluate()["bbox"]
    for metric in ("AP", "AP50", "AP75", "AR@10", "AR@100", "AP-class0"):
        assert results[metric] == pytest.approx(100)
    # Recall is averaged over classes, and an image has one object of each.
    assert results["AR@1"] == pytest.approx(100)


def test_half_of_the_boxes_give_half_of_the_recall(evaluator_and_records):
    evaluator, records = evaluator_and_records
    outputs = [{"instances": instances_of(r["annotations"][:1])} for r in records]
    evaluator.process(records, outputs)
    results = evaluator.evaluate()["bbox"]
    assert results["AR@100"] == pytest.approx(50)  # class0 all, class1 none


def test_a_model_that_finds_nothing_scores_0(evaluator_and_records):
    evaluator, records = evaluator_and_records
    evaluator.process(records, [{"instances": instances_of([])} for _ in records])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == results["AP50"] == results["AR@100"] == 0


def test_format_results_is_a_markdown_table():
    results = {
        "a": {"bbox": {"AP": 12.345, "AR@100": 50.0, "AP-tree": 1.0}},
        "b": {"bbox": {"AP": 1.0, "AR@100": 2.0}},
    }
    lines = format_results(results).splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")] == ["dataset", "AP", "AR@100"]
    assert [c.strip() for c in lines[2].strip("|").split("|")] == ["a", "12.35", "50.00"]
    assert len(lines) == 4
