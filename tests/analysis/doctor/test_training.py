from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.models import make_batch
from focal_d2.analysis.benchmark.timing import peak_bytes
from focal_d2.analysis.doctor import training
from focal_d2.analysis.doctor.training import anchor_facts, check_learning_rate, memory_facts
from focal_d2.data import Table, load_table, register_datasets
from focal_d2.engine.alpha import count_anchors
from focal_d2.modeling.build import build_without_memory
from tests.conftest import make_resnet_cfg

SMALL = {"INPUT__MIN_SIZE_TRAIN": (64, 128), "INPUT__MAX_SIZE_TRAIN": 200}


def table(boxes, labels, size=(256, 256)):
    """One image with boxes."""
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    return Table(
        classes=("a", "b"),
        category_ids=(1, 2),
        file_names=["image.png"],
        image_ids=np.array([1]),
        sizes=np.array([size]),
        image=np.zeros(len(boxes), np.int64),
        boxes=boxes,
        labels=np.array(labels, np.int64),
        ignored=np.zeros(len(boxes), bool),
        areas=boxes[:, 2] * boxes[:, 3],
    )


def square_anchors(**settings):
    """One square anchor a cell: 32 pixels at stride 8 to 512 at stride 128."""
    return make_resnet_cfg(
        MODEL__ANCHOR_GENERATOR__SIZES=[[32], [64], [128], [256], [512]],
        MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=[[1.0]],
        **settings,
    )


def test_anchor_facts_of_three_boxes():
    # The first is an anchor: stride 8 has a centre at (48, 48). The second is half of that anchor at
    # (128, 128): IoU 16 · 32 / 32² = 0.5. The third is 4 of 64 pixels wide: IoU 4 · 64 / 64² = 1 / 16 there.
    boxes = [[32, 32, 32, 32], [120, 112, 16, 32], [190, 160, 4, 64]]
    facts, _ = anchor_facts(square_anchors(), {"train": table(boxes, [0, 0, 1])})
    assert (facts.boxes, facts.with_anchor) == (3, 2)
    assert [tuple(s) for s in facts.by_size] == [("16 to 32", 2, 1), ("32 to 64", 1, 1)]
    assert [tuple(s) for s in facts.by_class] == [("a", 2, 2), ("b", 1, 0)]
    assert sum(facts.best_iou) == 3
    assert facts.best_iou[19] == facts.best_iou[10] == 1
    assert [level.stride for level in facts.levels] == [8, 16, 32, 64, 128]
    assert facts.levels[0].anchors == [(32, 32)]
    assert facts.levels[0].best_for == [3]
    # 256 pixels: 32² + 16² + 8² + 4² + 2² cells.
    ignored = 1364 - facts.positives - facts.negatives
    assert 0 <= ignored < 20
    assert facts.ratio == facts.negatives / facts.positives
    assert facts.alpha == pytest.approx(facts.ratio / (1 + facts.ratio))
    np.testing.assert_allclose(facts.extents, [[32, 32], [16, 32], [4, 64]])
    assert facts.side[1] == math.sqrt(16 * 32)
    assert facts.aspect[1] == 2


def test_anchor_facts_with_atss_count_its_anchors_and_say_what_iou_counts():
    # No anchor's centre is inside the second box; no anchor is ignored.
    boxes = [[32, 32, 32, 32], [190, 160, 1, 64]] * 3
    cfg = square_anchors(MODEL__FOCAL__ASSIGNER__NAME="atss")
    facts, findings = anchor_facts(cfg, {"train": table(boxes, [0, 1] * 3)})
    assert (facts.boxes, facts.with_anchor) == (6, 3)
    assert facts.positives + facts.negatives == 1364
    assert [x.code for x in findings] == ["assigner", "imbalance"]
    assert "NAME is atss: positive and negative anchors are those of atss, and 5 of 6" in findings[0].message
    _, findings = anchor_facts(square_anchors(), {"train": table(boxes, [0, 1] * 3)})
    assert [x.code for x in findings] == ["box-long", "anchor-recall", "imbalance"]


def test_anchor_facts_are_those_of_the_training_resolution():
    boxes = [[16, 16, 16, 16]]
    cfg = square_anchors(INPUT__MIN_SIZE_TRAIN=(512,))
    facts, _ = anchor_facts(cfg, {"train": table(boxes, [0])})
    np.testing.assert_allclose(facts.extents, [[32, 32]])
    assert facts.with_anchor == 1


def test_anchor_facts_add_up_over_datasets_by_class_name():
    box = [[32, 32, 32, 32]]
    empty = table([], [])
    facts, _ = anchor_facts(square_anchors(), {"x": table(box, [1]), "y": empty, "z": table(box, [1])})
    assert [tuple(s) for s in facts.by_class] == [("b", 2, 2)]
    assert facts.images_counted == 2  # that without boxes is not trained on
    assert anchor_facts(square_anchors(), {"y": empty}) == anchor_facts(square_anchors(), {}) == (None, [])


@pytest.mark.parametrize("drop_empty", [True, False])
def test_anchors_are_counted_once_and_as_alpha_counts_them(coco_dataset, monkeypatch, drop_empty):
    names = []
    for folder in ("one", "two"):
        data = coco_dataset(folder, images=3)
        # The second image has no box.
        data.annotations.write_text(data.annotations.read_text().replace('"image_id": 1', '"image_id": 2'))
        register_datasets([data.entry])
        names.append(data.name)
    cfg = make_resnet_cfg(DATASETS__TRAIN=tuple(names), DATALOADER__FILTER_EMPTY_ANNOTATIONS=drop_empty)
    expected = count_anchors(cfg)
    calls = []
    for name in ("build_layout", "training_boxes", "count_labels"):
        call = getattr(training, name)
        monkeypatch.setattr(
            training, name, lambda *args, name=name, call=call, **kw: calls.append(name) or call(*args, **kw)
        )
    facts, _ = anchor_facts(cfg, {name: load_table(name) for name in names})
    assert (facts.positives, facts.negatives) == expected
    assert (facts.images_counted, facts.boxes) == (4 if drop_empty else 6, 18)
    assert sorted(calls) == ["build_layout", "count_labels", "training_boxes"]


def test_examples_of_boxes_name_their_own_file_and_box():
    first, second = table([[0, 0, 100, 100], [5, 5, 3, 2]], [0, 0]), table([[9, 9, 2, 1]], [0])
    second.file_names[0] = "second.png"
    _, found = anchor_facts(square_anchors(), {"x": first, "y": second})
    (tiny,) = [finding for finding in found if finding.code == "box-tiny"]
    assert [(x.file_name, x.box, x.text.split(" pixels")[0]) for x in tiny.examples] == [
        ("second.png", (9, 9, 2, 1), "2.0 × 1.0"),
        ("image.png", (5, 5, 3, 2), "3.0 × 2.0"),
    ]


@pytest.mark.parametrize(
    ("rate", "images", "code", "fix"),
    [
        (0.01, 16, None, None),
        (0.02, 16, None, None),
        (0.005, 16, None, None),
        (0.021, 16, "learning-rate", 0.01),
        (0.01, 4, "learning-rate", 0.0025),  # 0.01 · 4 / 16
        (0.0, 16, "learning-rate", 0.01),
    ],
)
def test_learning_rate_by_the_linear_rule(rate, images, code, fix):
    found = check_learning_rate(architecture="RetinaNet", optimizer="SGD", base_lr=rate, images=images)
    assert [finding.code for finding in found] == ([code] if code else [])
    assert [x.value for finding in found for x in finding.fixes] == ([fix] if fix else [])


def test_learning_rate_of_adamw_is_not_judged():
    found = check_learning_rate(architecture="RetinaNet", optimizer="AdamW", base_lr=9.0, images=1)
    assert [x.code for x in found] == ["learning-rate-unchecked"]


@pytest.mark.parametrize(
    "architecture, rule", [("GeneralizedRCNN", 0.02), ("ProposalNetwork", None), (None, None)]
)
def test_learning_rate_has_a_rule_for_architectures_with_baselines(architecture, rule):
    (finding,) = check_learning_rate(architecture=architecture, optimizer="SGD", base_lr=1.0, images=16)
    assert [x.value for x in finding.fixes] == ([rule] if rule else [])
    assert finding.code == ("learning-rate" if rule else "learning-rate-unchecked")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_memory_of_weights_is_exact_and_of_a_step_near_what_is_measured(optimizer):
    cfg = make_resnet_cfg(SOLVER__FOCAL__OPTIMIZER=optimizer, MODEL__BACKBONE__FREEZE_AT=2)
    model = build_without_memory(cfg)
    assert {x.device.type for x in model.parameters()} == {"meta"}
    facts = memory_facts(cfg, model, {"train": table([[32, 32, 32, 32]], [0])})
    real = build_model(cfg).train()
    trained = [x for x in real.parameters() if x.requires_grad]
    assert facts.parameters == sum(x.numel() for x in real.parameters())
    assert facts.trained == sum(x.numel() for x in trained) < facts.parameters
    assert facts.gradients == 4 * facts.trained
    assert facts.optimizer == facts.gradients * {"SGD": 1, "AdamW": 2}[optimizer]
    assert facts.total == facts.weights + facts.gradients + facts.optimizer + facts.activations
    assert (facts.images, facts.height, facts.width) == (2, 256, 256)

    setting = Setting("cpu", 256, 2, 3, 1, 1, "fp32")
    batch = make_batch(setting)

    def step():
        with EventStorage():
            sum(real(batch).values()).backward()
        for parameter in trained:
            parameter.grad = None

    peak = peak_bytes(step, "cpu")
    assert 0.95 * peak < facts.gradients + facts.activations < 1.4 * peak


def test_memory_is_of_the_largest_image_and_half_of_it_under_autocast(monkeypatch):
    cfg = make_resnet_cfg(**SMALL)
    model = build_without_memory(cfg)
    train = {"x": table([], [], size=(100, 100)), "y": table([], [], size=(100, 400))}
    facts = memory_facts(cfg, model, train)
    # 100 × 400 would become 128 × 512, which MAX_SIZE_TRAIN makes 50 × 200; padded to multiples of 32. The
    # square has 128 × 128.
    assert (facts.height, facts.width) == (128, 128)
    doubled = memory_facts(
        make_resnet_cfg(**{**SMALL, "INPUT__FOCAL__SCALE_JITTER": [0.5, 1.5]}), model, train
    )
    assert (doubled.height, doubled.width) == (192, 192)
    for dtype, activations in (("bfloat16", facts.activations // 2), ("auto", facts.activations)):
        # "auto" is float32 on this CPU.
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True}, raising=False)
        amp = {"MODEL__FOCAL__AMP__ENABLED": True, "MODEL__FOCAL__AMP__DTYPE": dtype}
        assert memory_facts(make_resnet_cfg(**SMALL, **amp), model, train).activations == activations
    assert memory_facts(cfg, model, {}) is None
    assert memory_facts(cfg, torch.nn.Identity(), train) is None
