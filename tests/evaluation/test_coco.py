from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import comm

from focal_d2.data import register_datasets
from focal_d2.data.readers import read_coco
from focal_d2.engine import FocalTrainer, load_config
from focal_d2.errors import UserError
from focal_d2.evaluation import FocalCOCOEvaluator, format_results
from focal_d2.evaluation.backends import BACKENDS
from tests.data import formats
from tests.evaluation.scenes import random_scene
from tests.evaluation.test_backends import pycocotools_alone
from tests.processes import run_in_processes


@pytest.fixture
def evaluator_and_records(coco_dataset, tmp_path):
    data = coco_dataset(images=3, classes=2)
    register_datasets([data.entry])
    evaluator = FocalCOCOEvaluator(data.name, output_dir=str(tmp_path / "out"))
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


def of_scene(content, found, folder, **kwargs):
    """Evaluate a scene from a file; detections arrive as from a model."""
    folder.mkdir(exist_ok=True)
    (folder / "truth.json").write_text(json.dumps(content))
    name = f"scene_{folder.name}"
    numbers = sorted(c["id"] for c in content["categories"])
    names = {c["id"]: c["name"] for c in content["categories"]}
    MetadataCatalog.get(name).set(
        json_file=str(folder / "truth.json"),
        thing_classes=[names[n] for n in numbers],
        thing_dataset_id_to_contiguous_id={n: k for k, n in enumerate(numbers)},
    )
    evaluator = FocalCOCOEvaluator(name, output_dir=str(folder), **kwargs)
    evaluator.reset()
    for image in content["images"]:
        own = [x for x in found if x["image_id"] == image["id"]]
        annotations = [{**x, "category_id": numbers.index(x["category_id"])} for x in own]
        instances = instances_of(annotations)
        instances.scores = torch.tensor([x["score"] for x in own])
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


FOUND = "coco_instances_results.json"


def assert_as_pycocotools(results, content, found, class_names):
    evaluation = pycocotools_alone(content, found)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR@1", "AR@10", "AR@100")
    expected = dict(zip(names, evaluation.stats, strict=False))
    if len(class_names) > 1:
        for k, name in enumerate(class_names):
            values = evaluation.eval["precision"][:, :, k, 0, -1]
            expected[f"AP-{name}"] = values[values > -1].mean() if (values > -1).any() else -1
    assert set(results) == set(expected)
    for name, value in expected.items():
        if value < 0:
            assert math.isnan(results[name]), name
        else:
            assert results[name] / 100 == pytest.approx(value, abs=1e-9, rel=0), name


def test_every_figure_is_pycocotools_on_200_random_scenes(tmp_path):
    for seed in range(200):
        content, found = random_scene(seed)
        folder = tmp_path / str(seed)
        results = of_scene(content, found, folder)
        written = json.loads((folder / "coco_instances_results.json").read_text())
        assert len(written) == len(found)
        classes = sorted(content["categories"], key=lambda c: c["id"])
        assert_as_pycocotools(results, content, written, [c["name"] for c in classes])


def test_every_figure_is_pycocotools_on_a_trained_models_predictions(job, tmp_path):
    path, data = job
    cfg = load_config(
        str(path), ["SOLVER.MAX_ITER", "30", "SOLVER.CHECKPOINT_PERIOD", "1000", "SOLVER.BASE_LR", "0.002"]
    )
    trainer = FocalTrainer(cfg)
    trainer.train()
    results = trainer.last_results
    content = json.loads(data.annotations.read_text())
    written = json.loads((tmp_path / f"out/inference/{data.name}/coco_instances_results.json").read_text())
    assert len(written) > 50
    assert results["bbox"]["AP50"] > 1
    assert_as_pycocotools(results["bbox"], content, written, ["class0", "class1", "class2"])


def test_backends_give_the_same_figures(tmp_path):
    content, found = random_scene(7)
    fast, slow = (of_scene(content, found, tmp_path / x, backend=x) for x in ("hotcoco", "pycocotools"))
    assert fast == pytest.approx(slow, abs=1e-9, rel=0, nan_ok=True)


def test_analysis_is_written_with_the_evaluators_figures(tmp_path):
    for seed in (4, 7):  # whatever the backend
        content, found = random_scene(seed)
        results = of_scene(content, found, tmp_path / f"a{seed}")
        of_scene(content, found, tmp_path / f"b{seed}", backend="pycocotools")
        fast, slow = (json.loads((tmp_path / f"{x}{seed}/analysis.json").read_text()) for x in "ab")
        assert (fast.pop("backend"), slow.pop("backend")) == ("hotcoco", "pycocotools")
        assert (fast.pop("dataset"), slow.pop("dataset")) == (f"scene_a{seed}", f"scene_b{seed}")
        assert (fast["operating_point"].pop("chosen_on"), slow["operating_point"].pop("chosen_on")) == (
            f"scene_a{seed}", f"scene_b{seed}"
        )  # fmt: skip
        assert fast == slow
        stats = pycocotools_alone(content, json.loads((tmp_path / f"a{seed}" / FOUND).read_text())).stats
        for name, value in zip(("ARs", "ARm", "ARl"), stats[9:], strict=True):
            assert fast["coco"].pop(name) == (None if value < 0 else pytest.approx(100 * value, abs=1e-7))
        assert fast["coco"] == {k: None if math.isnan(v) else v for k, v in results.items()}
        numbers = sorted(c["id"] for c in content["categories"])
        assert [c["name"] for c in fast["per_class"]] == [f"class{n}" for n in numbers]
        assert fast["max_dets"] == [1, 10, 100]


def evaluate_boxes(name, found, backend):
    """AP of these boxes, (left, top, width, height) in each image."""
    evaluator = FocalCOCOEvaluator(name, backend=backend)
    evaluator.reset()
    for record, boxes in zip(DatasetCatalog.get(name), found, strict=True):
        annotations = [{"bbox": box, "category_id": 0} for box in boxes]
        evaluator.process([record], [{"instances": instances_of(annotations)}])
    return evaluator.evaluate()["bbox"]["AP"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignore_counts_for_our_datasets_and_not_for_detectron2s(coco_dataset, backend):
    """pycocotools overwrites "ignore" with "iscrowd"; recall of 1 of 2 boxes is AP 51 / 101."""
    data = coco_dataset(images=1, classes=1)
    content = json.loads(data.annotations.read_text())
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": 1, "bbox": box, "area": 100, "iscrowd": 0, "ignore": ignore}
        for i, (box, ignore) in enumerate([([4, 4, 10, 10], 0), ([30, 30, 10, 10], 1)], 1)
    ]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    found = [[[4, 4, 10, 10]]]
    assert evaluate_boxes(data.name, found, backend) == pytest.approx(100)
    # The region is no false alarm either.
    assert evaluate_boxes(data.name, [[*found[0], [30, 30, 10, 10]]], backend) == pytest.approx(100)
    # As detectron2 registers a file; its own reader refuses the flag, its evaluator does not.
    MetadataCatalog.get(data.name).set(json_file=str(data.annotations))
    assert evaluate_boxes(data.name, found, backend) == pytest.approx(100 * 51 / 101)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("style", formats.STYLES)
def test_boxes_without_area_do_not_count(coco_dataset, tmp_path, style, backend):
    data = coco_dataset(images=1, classes=1)
    table = read_coco(str(data.annotations), str(data.images))
    # A second object of no width; VOC's format can write it, too, as xmax = xmin - 1.
    columns = ("image", "labels", "ignored", "areas")
    table = dataclasses.replace(
        table,
        boxes=np.array([*table.boxes, [5.0, 6.0, 0.0, 20.0]]),
        **{name: np.repeat(getattr(table, name), 2) for name in columns},
    )
    entry = formats.write(style, tmp_path / style, table, data.images)
    register_datasets([entry])
    (box,) = [a["bbox"] for a in DatasetCatalog.get(entry["NAME"])[0]["annotations"]]
    assert evaluate_boxes(entry["NAME"], [[box]], backend) == pytest.approx(100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_boxes_outside_their_image_do_not_count(coco_dataset, backend):
    data = coco_dataset(images=1, classes=1)
    content = json.loads(data.annotations.read_text())
    boxes = [[1, 1, 10, 10], [200, 200, 20, 20]]
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": 1, "bbox": b} for i, b in enumerate(boxes, 1)
    ]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    assert evaluate_boxes(data.name, [[[1, 1, 10, 10]]], backend) == pytest.approx(100)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_region_of_any_class_ignores_detections_of_each(coco_dataset, backend):
    """A false alarm of class 1 in the region would halve the precision of the object that is found."""
    data = coco_dataset(images=1, classes=3)
    content = json.loads(data.annotations.read_text())
    rows = [(2, [4, 4, 10, 10]), (3, [30, 30, 10, 10]), (1, [50, 4, 10, 10])]
    content["annotations"] = [
        {"id": i, "image_id": 0, "category_id": k, "bbox": box} for i, (k, box) in enumerate(rows, 1)
    ]
    data.annotations.write_text(json.dumps(content))
    results = {}
    for others in ("ignored", "background"):
        register_datasets([{**data.entry, "KEEP": ["class0", "class1"], "OTHERS": others}])
        (record,) = DatasetCatalog.get(data.name)
        evaluator = FocalCOCOEvaluator(data.name, backend=backend)
        evaluator.reset()
        found = [(0, rows[1][1]), (1, rows[1][1]), (1, rows[0][1]), (0, rows[2][1])]
        instances = instances_of([{"bbox": box, "category_id": k} for k, box in found])
        instances.scores = torch.tensor([0.9, 0.9, 0.8, 0.8])
        evaluator.process([record], [{"instances": instances}])
        results[others] = evaluator.evaluate()["bbox"]["AP"]
    assert results == {"ignored": pytest.approx(100), "background": pytest.approx(50)}


def test_deepforests_empty_image_does_not_count(coco_dataset, tmp_path):
    data = coco_dataset(images=2, classes=1)
    (tmp_path / "boxes.csv").write_text("0.png,0,0,0,0,Tree\n1.png,5,6,25,40,Tree\n")
    paths = {"IMAGES": str(data.images), "ANNOTATIONS": str(tmp_path / "boxes.csv")}
    register_datasets([{"NAME": "deepforest", "FORMAT": "csv", **paths}])
    assert evaluate_boxes("deepforest", [[], [[5, 6, 20, 34]]], "hotcoco") == pytest.approx(100)


def test_max_dets_limit_ap_and_name_recall(tmp_path):
    boxes = [[20.0 * i, 0.0, 10.0, 10.0] for i in range(150)]
    common = {"image_id": 1, "category_id": 3}
    content = {
        "images": [{"id": 1}],
        "annotations": [{**common, "id": i, "bbox": box} for i, box in enumerate(boxes, 1)],
        "categories": [{"id": 3, "name": "tree"}],
    }
    found = [{**common, "bbox": box, "score": 0.5} for box in boxes]
    results = of_scene(content, found, tmp_path / "a")
    assert results["AR@100"] == pytest.approx(100 * 100 / 150)
    assert results["AP50"] == pytest.approx(100 * 67 / 101)  # recall 0, 0.01 to 0.66
    results = of_scene(content, found, tmp_path / "b", max_dets_per_image=150)
    assert results["AR@150"] == results["AP"] == results["APs"] == pytest.approx(100)
    assert "AR@100" not in results
    results = of_scene(content, found, tmp_path / "c", max_dets_per_image=[5, 50])
    assert results["AR@5"] == pytest.approx(100 * 5 / 150)
    assert results["AP"] == pytest.approx(100 * 34 / 101)
    for wrong in ([], [10, 1], [1, 1], [0, 5], [1.5], ["a"]):
        with pytest.raises(UserError, match="TEST.FOCAL.MAX_DETS"):
            FocalCOCOEvaluator("scene_a", max_dets_per_image=wrong)


def test_a_dataset_without_a_file_scores_as_with_one(evaluator_and_records, tmp_path):
    evaluator, records = evaluator_and_records
    outputs = [{"instances": instances_of(r["annotations"][:1])} for r in records]
    evaluator.process(records, outputs)
    expected = evaluator.evaluate()["bbox"]
    for record in records:
        for a in record["annotations"]:
            a["bbox"] = BoxMode.convert(a["bbox"], BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)
            a["bbox_mode"] = BoxMode.XYXY_ABS
            del a["iscrowd"]
    DatasetCatalog.register("in_memory", lambda: records)
    MetadataCatalog.get("in_memory").set(
        thing_classes=["class0", "class1"], thing_dataset_id_to_contiguous_id={7: 1, 9: 0}
    )
    folder = tmp_path / "memory"
    evaluator = FocalCOCOEvaluator("in_memory", output_dir=str(folder))
    evaluator.reset()
    evaluator.process(records, outputs)
    assert evaluator.evaluate()["bbox"] == pytest.approx(expected, nan_ok=True)
    assert not hasattr(MetadataCatalog.get("in_memory"), "json_file")
    assert not list(folder.glob("*coco_format*"))
    written = json.loads((folder / "coco_instances_results.json").read_text())
    assert {x["category_id"] for x in written} == {9}


def test_records_crowds_areas_and_text_ids_count(tmp_path):
    box = {"bbox": [0, 0, 10, 10], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    crowd = {"bbox": [50, 50, 100, 100], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 1}
    records = [
        {"image_id": "b", "annotations": [{**box, "area": 2000.0}]},
        {"image_id": "a", "annotations": [crowd]},
    ]
    DatasetCatalog.register("text_ids", lambda: records)
    evaluator = FocalCOCOEvaluator("text_ids")
    evaluator.reset()
    # The two in the crowd are neither right nor wrong.
    for record, found in zip(records, ([[0, 0, 10, 10]], [[60, 60, 9, 9], [70, 70, 9, 9]]), strict=True):
        annotations = [{"bbox": x, "category_id": 0} for x in found]
        evaluator.process([record], [{"instances": instances_of(annotations)}])
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == results["APm"] == pytest.approx(100)
    assert math.isnan(results["APs"])  # of 100 pixels by its box, 2000 as annotated
    assert evaluator.evaluate(img_ids=["a"])["bbox"]["AP"] != results["AP"]  # no box there


def test_processes_images_count_once(evaluator_and_records, monkeypatch, tmp_path):
    evaluator, records = evaluator_and_records
    outputs = [{"instances": instances_of(r["annotations"])} for r in records]
    # Three images over two processes: the second has the first image again, to be as long.
    first, second = (
        [{"image_id": r["image_id"], "instances": p["instances"]} for r, p in part]
        for part in ((lambda o: (o[:2], [o[2], o[0]]))(process_all(evaluator, records, outputs)))
    )
    monkeypatch.setattr(comm, "gather", lambda data, dst: [first, second])
    evaluator.predictions = first
    results = evaluator.evaluate()["bbox"]
    assert results["AP"] == pytest.approx(100)
    written = json.loads((tmp_path / "out/coco_instances_results.json").read_text())
    assert len(written) == 6
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluator.evaluate() == {}


def process_all(evaluator, records, outputs):
    evaluator.process(records, outputs)
    return list(zip(records, evaluator.predictions, strict=True))


def _evaluate_in_process(folder):
    rank = comm.get_rank()
    MetadataCatalog.get("two").set(json_file=f"{folder}/truth.json", thing_classes=["a"])
    evaluator = FocalCOCOEvaluator("two", output_dir=str(folder))
    evaluator.reset()
    for i in ([0, 2], [1, 0])[rank]:
        annotations = [{"bbox": [0, 0, 10 + i, 10], "category_id": 0}]
        evaluator.process([{"image_id": i}], [{"instances": instances_of(annotations)}])
    results = evaluator.evaluate()
    assert results == {} if rank else results["bbox"]["AP"] == pytest.approx(100)


@pytest.mark.slow
def test_two_gloo_processes_count_each_image_once(tmp_path):
    content = {
        "images": [{"id": i} for i in range(3)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 0, "bbox": [0, 0, 10 + i, 10]} for i in range(3)
        ],
        "categories": [{"id": 0, "name": "a"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    run_in_processes(_evaluate_in_process, tmp_path)
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 3


def test_mistakes_are_named(coco_dataset, tmp_path):
    data = coco_dataset(images=1, classes=1)
    register_datasets([data.entry])
    with pytest.raises(UserError, match="evaluates boxes"):
        FocalCOCOEvaluator(data.name, tasks=("bbox", "segm"))
    evaluator = FocalCOCOEvaluator(data.name)
    for image_id, label, match in (
        (0, 2, "found class 2, dataset .* has 1 classes: the model's number"),
        (8, 0, "image_id 8 is not in the ground truth"),
    ):
        evaluator.reset()
        found = instances_of([{"bbox": [0, 0, 9, 9], "category_id": label}])
        evaluator.process([{"image_id": image_id}], [{"instances": found}])
        with pytest.raises(UserError, match=match):
            evaluator.evaluate()
    data.annotations.write_text("{")
    register_coco_instances("broken", {}, str(data.annotations), str(data.images))
    with pytest.raises(UserError, match="annotations.json"):
        FocalCOCOEvaluator("broken")


def test_a_test_set_without_annotations_is_only_written(tmp_path):
    content = {"images": [{"id": 4}], "categories": [{"id": 9, "name": "a"}]}
    (tmp_path / "truth.json").write_text(json.dumps(content))
    MetadataCatalog.get("hidden").set(json_file=str(tmp_path / "truth.json"))
    evaluator = FocalCOCOEvaluator("hidden", output_dir=str(tmp_path))
    evaluator.reset()
    found = instances_of([{"bbox": [0, 0, 9, 9], "category_id": 0}])
    evaluator.process([{"image_id": 4}], [{"instances": found}])
    assert evaluator.evaluate() == {}
    (written,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert (written["image_id"], written["category_id"]) == (4, 9)


def test_format_results_is_a_markdown_table():
    results = {
        "a": {"bbox": {"AP": 12.345, "AR@100": 50.0, "AP-tree": 1.0}},
        "b": {"bbox": {"AP": 1.0, "AR@100": 2.0}},
    }
    lines = format_results(results).splitlines()
    assert [c.strip() for c in lines[0].strip("|").split("|")] == ["dataset", "AP", "AR@100"]
    assert [c.strip() for c in lines[2].strip("|").split("|")] == ["a", "12.35", "50.00"]
    assert len(lines) == 4


def test_a_test_set_without_annotations_gets_predictions_and_no_metrics(coco_dataset, tmp_path):
    data = coco_dataset(images=2, classes=2)
    content = json.loads(data.annotations.read_text())
    del content["annotations"]
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    evaluator = FocalCOCOEvaluator(data.name, output_dir=str(tmp_path))
    evaluator.reset()
    found = Instances((64, 64), pred_boxes=Boxes(torch.tensor([[1.0, 2, 10, 12]])))
    found.scores, found.pred_classes = torch.tensor([0.5]), torch.tensor([1])
    evaluator.process([{"image_id": 1}], [{"instances": found}])
    assert evaluator.evaluate() == {}
    (prediction,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert prediction == {"image_id": 1, "category_id": 2, "bbox": [1, 2, 9, 10], "score": 0.5}


def test_proposals_are_evaluated_with_the_datasets_own_image_ids(coco_dataset):
    data = coco_dataset(images=2, classes=2)
    content = json.loads(data.annotations.read_text())
    for item in content["images"]:
        item["id"] += 50
    for item in content["annotations"]:
        item["image_id"] += 50
    data.annotations.write_text(json.dumps(content))
    register_datasets([data.entry])
    evaluator = FocalCOCOEvaluator(data.name)
    evaluator.reset()
    for record in DatasetCatalog.get(data.name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"][: record["image_id"] - 49]])
        boxes[:, 2:] += boxes[:, :2]
        proposals = Instances(
            (64, 64), proposal_boxes=Boxes(boxes), objectness_logits=torch.zeros(len(boxes))
        )
        evaluator.process([record], [{"proposals": proposals}])
    # One of the two boxes of the first image, and both of the second.
    assert evaluator.evaluate()["box_proposals"]["AR@100"] == pytest.approx(75)
