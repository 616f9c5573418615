from __future__ import annotations

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_lvis_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances

from focal_d2 import UserError
from focal_d2.data import check_files, register_datasets
from focal_d2.engine import FocalTrainer, check_job
from focal_d2.evaluation import FocalCOCOEvaluator, FocalLVISEvaluator
from tests.conftest import make_cfg


@pytest.mark.parametrize("name, kind", [("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)])
def test_optimizer_is_what_yaml_says(name, kind):
    settings = {"SOLVER__BASE_LR": 0.003, "SOLVER__WEIGHT_DECAY": 0.07, "MODEL__FPN__NORM": "BN"}
    cfg = make_cfg(SOLVER__FOCAL__OPTIMIZER=name, **settings)
    optimizer = FocalTrainer.build_optimizer(cfg, build_model(cfg))
    assert isinstance(optimizer, kind)
    assert {group["lr"] for group in optimizer.param_groups} == {0.003}
    # detectron2 exempts norms (SOLVER.WEIGHT_DECAY_NORM).
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.07, 0.0}


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradients_are_clipped_if_yaml_says_so(name):
    cfg = make_cfg(SOLVER__FOCAL__OPTIMIZER=name)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.5
    model = build_model(cfg)
    optimizer = FocalTrainer.build_optimizer(cfg, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) * 10
    optimizer.step()
    assert all(p.grad.norm().item() == pytest.approx(0.5, rel=1e-3) for p in model.parameters())


def test_check_job_returns_what_makes_two_runs_comparable(job):
    path = str(job[0])
    config = check_job(path)
    assert "SEED: -1\n" in config
    assert "OUTPUT_DIR: ''\n" in config
    assert check_job(path, ["SOLVER.BASE_LR", "0.5"]) != config
    # α itself depends on the data, the config does not.
    assert "ALPHA: auto" in check_job(path, ["MODEL.FOCAL.LOSS.ALPHA", "auto"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["DATASETS.TRAIN", "('nothing',)"], 'dataset "nothing" is not registered'),
        (["MODEL.FOCAL.LOSS.BETA", "1.0"], "the loss focal does not read it"),
        (["SEED", "7"], "SEED is set for each run"),
        (["OUTPUT_DIR", "elsewhere"], "OUTPUT_DIR is set for each run"),
    ],
)
def test_check_job_finds_what_would_stop_the_job(job, overrides, message):
    with pytest.raises(UserError, match=message):
        check_job(str(job[0]), overrides)


@pytest.mark.parametrize(
    "limits, an_image, expected",
    [([], 50, {1, 10, 100}), ([], 300, {1, 10, 300}), ([2, 20], 300, {2, 20})],
)
@pytest.mark.parametrize("backend", ["hotcoco", "pycocotools"])
def test_build_evaluator_takes_limits_and_backend(limits, an_image, expected, backend, coco_dataset):
    data = coco_dataset(images=1, classes=1)
    register_datasets([data.entry])
    cfg = make_cfg(
        TEST__FOCAL__MAX_DETS=limits,
        TEST__FOCAL__EVAL_BACKEND=backend,
        TEST__DETECTIONS_PER_IMAGE=an_image,
        OUTPUT_DIR=str(data.images.parent),
    )
    evaluator = FocalTrainer.build_evaluator(cfg, data.name)
    assert isinstance(evaluator, FocalCOCOEvaluator)
    evaluator.reset()
    evaluator.predictions = [{"image_id": 0, "instances": []}]
    results = evaluator.evaluate()["bbox"]
    assert {k for k in results if k.startswith("AR@")} == {f"AR@{n}" for n in expected}
    cfg.TEST.FOCAL.EVAL_BACKEND = "cocoapi"
    with pytest.raises(UserError, match="legal values: hotcoco, pycocotools"):
        FocalTrainer.build_evaluator(cfg, data.name)


def test_lvis_is_read_and_evaluated_by_detectron2(coco_dataset, monkeypatch):
    data = coco_dataset(images=2, classes=3)
    content = json.loads(data.annotations.read_text())
    names = {
        "id": 0,
        "name": "",
        "synset": "",
        "synonyms": [],
        "def": "",
        "image_count": 1,
        "instance_count": 1,
    }
    content["categories"] = [{**names, "id": k, "frequency": "rcf"[k % 3]} for k in range(1, 1204)]
    for image in content["images"]:
        image.update(neg_category_ids=[9], not_exhaustive_category_ids=[], coco_url=f"a/{image['file_name']}")
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    data.annotations.write_text(json.dumps(content))
    register_lvis_instances("lvis_v1_tiny", {}, str(data.annotations), str(data.images))

    check_files("DATASETS.TEST", "lvis_v1_tiny")
    records = DatasetCatalog.get("lvis_v1_tiny")
    assert [len(r["annotations"]) for r in records] == [3, 3]
    evaluator = FocalTrainer.build_evaluator(make_cfg(), "lvis_v1_tiny")
    assert isinstance(evaluator, FocalLVISEvaluator)
    evaluator._output_dir = None
    evaluator.reset()
    for record in records:
        # The third object is missed: the classes 1 (c) and 2 (f) are found, 3 (r) is not.
        found = record["annotations"][:2]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in found]
        instances = Instances((64, 64), pred_boxes=Boxes(boxes), scores=torch.ones(2))
        instances.pred_classes = torch.tensor([a["category_id"] for a in found])
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()["bbox"]
    expected = {"AP": 200 / 3, "APr": 0, "APc": 100, "APf": 100}
    assert {name: results[name] for name in expected} == pytest.approx(expected)
    assert len(DatasetCatalog.get("lvis_v1_tiny")) == 2  # the real package is back

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match='reads dataset "lvis_v1_tiny" with the package lvis: pip install lvis'
    ):
        check_files("DATASETS.TEST", "lvis_v1_tiny")


def test_check_job_of_a_gpu_job_leaves_its_precision_to_the_gpu(job, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    overrides = ["MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", "True", "MODEL.FOCAL.AMP.DTYPE"]
    assert "DTYPE: float16" in check_job(str(job[0]), [*overrides, "float16"])
    check_job(str(job[0]), [*overrides, "auto"])
    assert "this CPU" not in caplog.text
