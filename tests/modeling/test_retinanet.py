"""FocalRetinaNet against detectron2's RetinaNet: same weights, images and boxes."""

from __future__ import annotations

import importlib
import math
from unittest.mock import Mock

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import focal_d2
from focal_d2 import UserError
from focal_d2.ops.common import import_kernels
from tests.conftest import make_cfg, make_resnet_cfg, runs_bfloat16
from tests.waits import PretendedGPU

SIZE = (128, 160)


def make_pair(**overrides):
    """The two models with the same random weights, with some scores above the prior."""
    ours = build_model(make_cfg(**overrides))
    theirs = build_model(make_cfg(MODEL__META_ARCHITECTURE="RetinaNet", **overrides))
    with torch.no_grad():
        for parameter in ours.head.cls_score.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    incompatible = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert incompatible.unexpected_keys == ["loss_normalizer.ema"]
    assert incompatible.missing_keys == []
    return ours, theirs


def make_image(num_boxes: int, num_classes: int, size=SIZE) -> dict:
    h, w = size
    centers = torch.rand(num_boxes, 2) * torch.tensor([w, h])
    halves = (torch.rand(num_boxes, 2) * 3 + 1).exp() / 2  # sides of 3 to 55 pixels
    boxes = Boxes(torch.cat([centers - halves, centers + halves], 1))
    boxes.clip(size)
    instances = Instances(size, gt_boxes=boxes)
    instances.gt_classes = torch.randint(0, num_classes, (num_boxes,))
    return {"image": torch.randint(0, 256, (3, h, w), dtype=torch.uint8), "instances": instances}


SCENES = {
    "plain": (3, 5),
    "one_empty": (4, 0),
    "all_empty": (0, 0),
    "crowded": (300, 2),
}


def losses_and_gradients(model, batch):
    model.zero_grad()
    with EventStorage():
        losses = model(batch)
        sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("box_loss_type", ["smooth_l1", "giou", "diou", "ciou"])
@pytest.mark.parametrize("num_classes", [1, 80])
def test_losses_and_gradients_equal_detectron2(num_classes, box_loss_type, scene):
    ours, theirs = make_pair(
        MODEL__RETINANET__NUM_CLASSES=num_classes,
        MODEL__RETINANET__BBOX_REG_LOSS_TYPE=box_loss_type,
        MODEL__RETINANET__SMOOTH_L1_LOSS_BETA=0.1,
    )
    batch = [make_image(n, num_classes) for n in SCENES[scene]]
    for _ in range(2):  # twice: the normaliser moves alike
        actual, actual_grads = losses_and_gradients(ours, batch)
        expected, expected_grads = losses_and_gradients(theirs, batch)
        assert actual.keys() == expected.keys() == {"loss_cls", "loss_box_reg"}
        for name in actual:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=0)
        assert actual_grads.keys() == expected_grads.keys()
        for name, grad in actual_grads.items():
            difference = (grad - expected_grads[name]).norm()
            assert difference <= 1e-4 * expected_grads[name].norm(), name


# Every key of detectron2's RetinaNet away from its default.
OTHER_VALUES = {
    "MODEL__PIXEL_MEAN": [90.0, 100.0, 110.0],
    "MODEL__PIXEL_STD": [50.0, 60.0, 70.0],
    "MODEL__RETINANET__BBOX_REG_WEIGHTS": (2.0, 2.0, 0.5, 0.5),
    "MODEL__RETINANET__FOCAL_LOSS_ALPHA": 0.6,
    "MODEL__RETINANET__FOCAL_LOSS_GAMMA": 1.3,
    "MODEL__RETINANET__IOU_LABELS": [-1, 0, 1],
    "MODEL__RETINANET__IOU_THRESHOLDS": [0.1, 0.6],
    "MODEL__RETINANET__IN_FEATURES": ["p4", "p5", "p6"],
    "MODEL__RETINANET__NMS_THRESH_TEST": 0.2,
    "MODEL__RETINANET__NORM": "GN",
    "MODEL__RETINANET__NUM_CLASSES": 5,
    "MODEL__RETINANET__NUM_CONVS": 2,
    "MODEL__RETINANET__PRIOR_PROB": 0.03,
    "MODEL__RETINANET__SCORE_THRESH_TEST": 0.3,
    "MODEL__RETINANET__SMOOTH_L1_LOSS_BETA": 0.3,
    "MODEL__RETINANET__TOPK_CANDIDATES_TEST": 4,
    "MODEL__ANCHOR_GENERATOR__SIZES": [[20.0], [40.0], [80.0]],
    "MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[0.7, 1.4]],
    "TEST__DETECTIONS_PER_IMAGE": 17,
}


def test_every_key_means_what_it_means_in_detectron2():
    ours, theirs = make_pair(**OTHER_VALUES)
    batch = [make_image(6, 5), make_image(40, 5)]
    torch.testing.assert_close(outcome(ours, batch), outcome(theirs, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_every_key_matters(key):
    """So that the test above would notice a key that is not read."""
    changes = {key: OTHER_VALUES[key]}
    if key == "MODEL__RETINANET__IN_FEATURES":  # one list of sizes a level
        changes["MODEL__ANCHOR_GENERATOR__SIZES"] = [[128.0], [256.0], [512.0]]
    if key == "MODEL__ANCHOR_GENERATOR__SIZES":
        changes[key] = [[20.0], [40.0], [80.0], [160.0], [320.0]]
    outcomes = []
    for overrides in ({}, changes):
        torch.manual_seed(0)
        model, _ = make_pair(**overrides)
        torch.manual_seed(1)
        outcomes.append(outcome(model, [make_image(6, 3), make_image(40, 3)]))
    assert outcomes[0] != outcomes[1]


def outcome(model, batch) -> list[float]:
    """Losses and the first image's detections, as plain numbers."""
    model.train()
    with EventStorage(), torch.no_grad():
        numbers = [x.item() for x in model(batch).values()]
    model.eval()
    with torch.no_grad():
        found = model(batch)[0]["instances"]
    return [*numbers, *found.scores.tolist(), *found.pred_boxes.tensor.flatten().tolist()]


@pytest.mark.parametrize("num_classes", [1, 80])
def test_targets_equal_detectron2_and_have_ignored_anchors(num_classes):
    ours, theirs = make_pair(MODEL__RETINANET__NUM_CLASSES=num_classes)
    batch = [make_image(n, num_classes) for n in (7, 0, 300)]
    instances = [x["instances"] for x in batch]
    features = [torch.zeros(1, 1, 128 // s, -(-160 // s)) for s in (8, 16, 32, 64, 128)]
    targets = ours.label_anchors(ours.anchors_for(ours.preprocess_image(batch)), instances)
    theirs_of = theirs.label_anchors(theirs.anchor_generator(features), instances)
    labels, boxes = (torch.stack(x) for x in theirs_of)
    assert torch.equal(targets.labels, labels)
    assert torch.equal(targets.boxes[targets.matched[targets.positive]], boxes[targets.positive])
    assert targets.num_positives() == targets.positive.sum()
    assert set(targets.labels[0].tolist()) >= {-1, num_classes}


@pytest.mark.parametrize("num_classes", [1, 80])
def test_detections_equal_detectron2(num_classes):
    ours, theirs = make_pair(
        MODEL__RETINANET__NUM_CLASSES=num_classes, MODEL__RETINANET__SCORE_THRESH_TEST=0.02
    )
    ours.eval(), theirs.eval()
    batch = [
        {**make_image(0, num_classes), "height": 256, "width": 320},
        make_image(0, num_classes, size=(96, 130)),
    ]
    with torch.no_grad():
        for actual, expected in zip(ours(batch), theirs(batch), strict=True):
            actual, expected = actual["instances"], expected["instances"]
            assert len(actual) > 10
            assert actual.image_size == expected.image_size
            assert torch.equal(actual.pred_classes, expected.pred_classes)
            torch.testing.assert_close(actual.scores, expected.scores)
            torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor)


@pytest.mark.parametrize("part, value", [("cls_score.bias", math.nan), ("bbox_pred.bias", 3e38)])
def test_outputs_that_are_not_finite_are_named_and_detect_nothing(part, value, monkeypatch):
    model = build_model(make_cfg(MODEL__RETINANET__SCORE_THRESH_TEST=0.001)).eval()
    said = Mock()
    monkeypatch.setattr("focal_d2.modeling.retinanet.log_first_n", said)
    image = {"image": torch.zeros(3, 96, 130)}
    with torch.no_grad():
        assert len(model([image])[0]["instances"])
        said.assert_not_called()
        model.get_parameter(f"head.{part}").fill_(value)
        assert not len(model([image])[0]["instances"])
    assert "NaN or infinite" in said.call_args.args[1]


def test_model_zoo_yaml_is_a_one_line_change():
    models = []
    for meta_architecture in ("RetinaNet", "FocalRetinaNet"):
        cfg = get_cfg()
        focal_d2.add_focal_config(cfg)
        cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml"))
        cfg.merge_from_list(["MODEL.META_ARCHITECTURE", meta_architecture, "MODEL.DEVICE", "cpu"])
        models.append(build_model(cfg))
    theirs, ours = (m.state_dict() for m in models)
    assert [n for n in ours if n != "loss_normalizer.ema"] == list(theirs)
    assert all(ours[n].shape == tensor.shape for n, tensor in theirs.items())
    models[1].load_state_dict(theirs, strict=True)


def test_initial_classification_loss_is_what_the_prior_predicts():
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NORMALIZER="paper", MODEL__RETINANET__NUM_CLASSES=10))
    anchors = 9 * (16 * 20 + 8 * 10 + 4 * 5 + 2 * 3 + 1 * 2)
    with torch.no_grad():
        empty = model([make_image(0, 10)])["loss_cls"].item()
    # π = 0.01, α = 0.25, γ = 2: a negative costs 0.75 · 0.01² · -ln 0.99 = 7.538e-7.
    assert empty == pytest.approx(anchors * 10 * 7.538e-7, rel=0.02)

    image = make_image(5, 10)
    with EventStorage() as storage, torch.no_grad():
        crowded = model([image])["loss_cls"].item()
    positives = storage.latest()["num_pos_anchors"][0]
    # A positive costs 0.25 · 0.99² · -ln 0.01 = 1.1284; the negatives' share is small beside it.
    negatives = anchors * 10 * 7.538e-7 / positives
    assert crowded == pytest.approx(1.1284 + negatives, rel=0.02)


def test_bias_is_minus_log_odds_of_the_prior():
    model = build_model(make_cfg())
    assert model.head.cls_score.bias.unique().item() == pytest.approx(-math.log(99), rel=1e-6)
    assert model.head.cls_score.bias.unique().item() == pytest.approx(-4.595, abs=1e-3)


def test_training_needs_no_event_storage():
    model = build_model(make_cfg())
    assert model([make_image(2, 3)])["loss_cls"].isfinite()


def test_empty_images_train_without_nan():
    model = build_model(make_cfg())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        losses = model([make_image(0, 3), make_image(0, 3)])
        assert losses["loss_box_reg"].item() == 0
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None for p in model.parameters())


def test_compile_takes_backbone_and_head(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    model = build_model(make_cfg(MODEL__FOCAL__COMPILE=True))
    assert compiled == [model.backbone, model.head]
    compiled.clear()
    build_model(make_cfg())
    assert compiled == []


def test_a_backbone_that_rounds_its_sizes_down_is_labelled_by_what_it_gives():
    model = build_model(make_cfg())
    batch = [make_image(5, 3)]
    expected = model(batch)
    model._strides = [s * 2 for s in model._strides]
    model.loss_normalizer.ema.fill_(model.loss_normalizer.INITIAL)
    torch.testing.assert_close(model(batch), expected, rtol=0, atol=0)


@runs_bfloat16
@pytest.mark.parametrize("channels_last", [True, False])
def test_amp_and_channels_last_change_little(channels_last):
    overrides = {"MODEL__RETINANET__SCORE_THRESH_TEST": 0.01, "MODEL__FOCAL__CHANNELS_LAST": channels_last}
    plain = build_model(make_cfg(**overrides))
    amp = build_model(make_cfg(MODEL__FOCAL__AMP__ENABLED=True, **overrides))
    amp.load_state_dict(plain.state_dict())
    batch = [make_image(5, 3)]
    with torch.no_grad():
        expected, actual = plain(batch), amp(batch)
        for name in expected:
            assert actual[name].dtype == torch.float32
            assert actual[name] != expected[name]  # bfloat16 was at work
            torch.testing.assert_close(actual[name], expected[name], rtol=0.02, atol=0)
        plain.eval(), amp.eval()
        expected, actual = (m(batch)[0]["instances"] for m in (plain, amp))
    assert actual.scores.dtype == actual.pred_boxes.tensor.dtype == torch.float32
    assert actual.scores.max() != expected.scores.max()
    torch.testing.assert_close(actual.scores[:5], expected.scores[:5], rtol=0.02, atol=0)


def test_images_64_pixels_wide_compute_in_float32_under_bfloat16():
    plain = build_model(make_cfg())
    amp = build_model(make_cfg(MODEL__FOCAL__AMP__ENABLED=True, MODEL__FOCAL__AMP__DTYPE="bfloat16"))
    amp.load_state_dict(plain.state_dict())
    batch = [make_image(3, 3, size=(96, 64))]
    for model in (plain, amp):
        sum(model(batch).values()).backward()
    for (name, expected), actual in zip(plain.named_parameters(), amp.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=0, msg=name)


def test_channels_last_is_the_same_function_in_another_layout():
    plain, fast = build_model(make_cfg()), build_model(make_cfg(MODEL__FOCAL__CHANNELS_LAST=True))
    fast.load_state_dict(plain.state_dict())
    batch = [make_image(5, 3)]
    assert fast.head.cls_score.weight.is_contiguous(memory_format=torch.channels_last)
    assert fast.preprocess_image(batch).tensor.is_contiguous(memory_format=torch.channels_last)
    assert plain.preprocess_image(batch).tensor.is_contiguous()
    with torch.no_grad():
        for actual, expected in zip(fast(batch).values(), plain(batch).values(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)


def test_low_quality_matches_can_be_off():
    image = make_image(1, 3)
    image["instances"].gt_boxes.tensor.copy_(torch.tensor([[40.0, 40.0, 43.0, 43.0]]))  # IoU below 0.01
    positives = []
    for low_quality in (True, False):
        model = build_model(make_cfg(MODEL__FOCAL__LOW_QUALITY_MATCHES=low_quality))
        anchors = model.anchors_for(model.preprocess_image([image]))
        positives.append(int(model.label_anchors(anchors, [image["instances"]]).positive.sum()))
    assert positives[0] > 0
    assert positives[1] == 0


def test_ignored_regions_are_no_background():
    model, image = build_model(make_cfg()), make_image(1, 3)
    image["instances"].gt_boxes.tensor.copy_(torch.tensor([[4.0, 4.0, 36.0, 36.0]]))
    region = torch.tensor([[0.0, 0.0, 80.0, 128.0]])
    anchors = model.anchors_for(model.preprocess_image([image]))
    plain = model.label_anchors(anchors, [image["instances"]])
    with_region = model.label_anchors(anchors, [image["instances"]], [region])
    changed = plain.labels != with_region.labels
    # Positives inside stay; what was background and lies at least half inside is ignored; nothing else moves.
    assert (plain.labels[changed] == model.num_classes).all()
    assert (with_region.labels[changed] == -1).all()
    assert torch.equal(plain.positive, with_region.positive)
    x0, y0, x1, y1 = anchors.boxes.T
    inside = (x1.clamp(0, 80) - x0.clamp(0, 80)) * (y1.clamp(0, 128) - y0.clamp(0, 128))
    mostly = inside >= 0.5 * (x1 - x0) * (y1 - y0)
    assert torch.equal(changed[0], mostly & (plain.labels[0] == model.num_classes))
    assert changed.any()


def test_a_region_changes_the_loss_and_an_absent_one_does_not():
    def loss(regions, **overrides):
        torch.manual_seed(0)
        model, image = build_model(make_cfg(**overrides)), make_image(3, 3)
        with torch.no_grad():
            return model([image if regions is None else {**image, "ignored_boxes": regions}])["loss_cls"]

    region = torch.tensor([[0.0, 0.0, 80.0, 128.0]])
    assert loss(region) < loss(None)
    assert loss(torch.zeros(0, 4)) == loss(None)
    assert loss(region, MODEL__FOCAL__IGNORE_OVERLAP=1.01) == loss(None)


def test_model_can_be_saved_whole(tmp_path):
    model = build_model(make_cfg(MODEL__FOCAL__CHANNELS_LAST=True))
    torch.save(model, tmp_path / "model.pth")
    copy = torch.load(tmp_path / "model.pth", weights_only=False)
    assert torch.equal(copy.head.cls_score.weight, model.head.cls_score.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_losses_on_cuda_equal_the_cpus():
    model = build_model(make_cfg())
    batch = [make_image(5, 3), make_image(0, 3)]
    with torch.no_grad():
        expected = model(batch)
        model.loss_normalizer.ema.fill_(100)
        actual = model.cuda()(batch)
    for name in expected:
        torch.testing.assert_close(actual[name].cpu(), expected[name], rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("MODEL__RETINANET__BBOX_REG_LOSS_TYPE", "iou", "smooth_l1, giou, diou, ciou, ghm_r"),
        ("MODEL__FOCAL__LOSS__NORMALIZER", "mean", "ema, paper"),
        ("MODEL__FOCAL__FPN__P6_FROM", "c5", "res5, p5"),
        ("MODEL__RETINANET__IN_FEATURES", ["p2"], "p3, p4, p5, p6, p7"),
        ("MODEL__RETINANET__NUM_CONVS", 0, "within 1 and 100"),
        (
            "MODEL__ANCHOR_GENERATOR__NAME",
            "RotatedAnchorGenerator",
            "have 5 numbers; FocalRetinaNet's have 4",
        ),
        ("MODEL__FOCAL__FPN__INIT", "zeros", "xavier, paper"),
        ("MODEL__FOCAL__IGNORE_OVERLAP", 0.0, "above 0"),
        ("MODEL__RETINANET__FOCAL_LOSS_ALPHA", 1.5, "at most 1"),
        ("MODEL__RETINANET__PRIOR_PROB", 0.0, "above 0 and below 1"),
        ("MODEL__RESNETS__DEPTH", 51, "18, 34, 50, 101, 152"),
        ("MODEL__RESNETS__RES2_OUT_CHANNELS", 256, "needs 64"),
        ("MODEL__RESNETS__OUT_FEATURES", ["res4", "res5"], "lacks res3"),
    ],
)
def test_illegal_values_name_the_key(key, value, match):
    with pytest.raises(focal_d2.UserError, match=match) as error:
        build_model(make_resnet_cfg(**{key: value}))
    assert key.replace("__", ".").split(" ")[0] in str(error.value)


def test_config_without_our_keys_says_what_to_call():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "FocalRetinaNet", "MODEL.DEVICE", "cpu"])
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    with pytest.raises(focal_d2.UserError, match="add_focal_config"):
        build_model(cfg)


def test_gradients_add_up_under_ddp_as_without(tmp_path):
    models = build_model(make_cfg()), build_model(make_cfg())
    models[1].load_state_dict(models[0].state_dict())
    batches = [[make_image(5, 3)] for _ in range(2)]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for model in (models[0], torch.nn.parallel.DistributedDataParallel(models[1])):
            for batch in batches:
                sum(model(batch).values()).backward()
    finally:
        torch.distributed.destroy_process_group()
    for (name, plain), parallel in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(parallel.grad, plain.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_a_class_that_the_model_has_not_is_named():
    model, image = build_model(make_cfg()), make_image(4, 3)
    image["instances"].gt_classes = torch.tensor([0, 1, 3, 2])
    with pytest.raises(UserError, match="class 0 or 3; MODEL.RETINANET.NUM_CLASSES 3 means classes 0 to 2"):
        model([image])


@pytest.mark.parametrize("batch", [[], [{"image": torch.zeros(3, 64, 64)}]])
def test_training_without_instances_is_refused(batch):
    with pytest.raises(UserError, match="training needs images with instances"):
        build_model(make_cfg())(batch)


def test_a_known_shape_waits_in_matching_and_for_the_number_of_positives_only():
    model = build_model(make_cfg(MODEL__RETINANET__BBOX_REG_LOSS_TYPE="ciou", MODEL__FOCAL__LOSS__NAME="ghm"))
    batch = [make_image(3, 3, size=(64, 64)), make_image(0, 3, size=(64, 64))]
    with PretendedGPU() as gpu, torch.no_grad():
        model.to("cuda")
        model(batch)
        gpu.clear()
        model(batch)
    # Without kernels, the pairs that matching lists have an unknown number.
    assert {wait.split()[-1].split(":")[0] for wait in gpu.waits} <= {"match.py", "targets.py"}


@pytest.mark.parametrize("channels_last", [False, True])
def test_positives_are_counted_without_a_copy_of_the_images(channels_last):
    model = build_model(make_cfg(MODEL__FOCAL__CHANNELS_LAST=channels_last))
    batch = [make_image(5, 3, size=(100, 130)), make_image(2, 3, size=(64, 200))]
    images = model.preprocess_image(batch)
    targets = model.label_anchors(model.anchors_for(images), [x["instances"] for x in batch])
    with PretendedGPU() as gpu:
        model.to("cuda")
        model.count_positives(batch)  # the anchors are computed
        gpu.clear()
        assert model.count_positives(batch).item() == targets.positive.sum().item() > 0
        # Boxes and classes, and nothing of images of 39,000 and 38,400 bytes.
        assert sum(gpu.pageable) == 7 * (4 * 4 + 8)


@pytest.mark.parametrize("value, wanted", [("auto", False), ("on", True), ("off", False)])
def test_kernels_are_ruled_by_one_key(monkeypatch, value, wanted):
    asked = {"loss": [], "matching": []}
    monkeypatch.setattr("focal_d2.ops.losses.dense.find_kernels", lambda *_: asked["loss"].append(1))
    monkeypatch.setattr(
        "focal_d2.modeling.assigners.iou.find_kernels", lambda *_: asked["matching"].append(1)
    )
    build_model(make_cfg(MODEL__FOCAL__KERNELS=value))([make_image(3, 3)])
    assert {what: len(calls) > 0 for what, calls in asked.items()} == {"loss": wanted, "matching": wanted}


def test_kernels_need_triton_on_a_gpu(monkeypatch, caplog):
    with pytest.raises(UserError, match='KERNELS is "fast"; legal values: auto, on, off'):
        build_model(make_cfg(MODEL__FOCAL__KERNELS="fast"))
    cfg = make_cfg(MODEL__FOCAL__KERNELS="on")
    assert build_model(cfg).use_kernels  # there are none on a CPU
    assert "KERNELS is on, but MODEL.DEVICE is cpu: kernels need a GPU" in caplog.text
    cfg.MODEL.DEVICE = "cuda"
    for error, match in (
        (ModuleNotFoundError("no triton", name="triton"), "KERNELS is on, but Triton is not installed"),
        (ModuleNotFoundError("no libdevice", name="triton.libdevice"), "can't be imported .no libdevice.: "),
        (ImportError("no cdiv", name="triton"), "can't be imported .no cdiv.: install another version"),
    ):
        monkeypatch.setattr(importlib, "import_module", Mock(side_effect=error))
        import_kernels.cache_clear()
        with pytest.raises(UserError, match=match):
            build_model(cfg)
        monkeypatch.undo()
    import_kernels.cache_clear()
