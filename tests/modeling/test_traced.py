"""Recorded models (TorchScript, ONNX, torch.export) against the eager one, on images they never saw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.export import TracingAdapter
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import GeneralizedRCNN, RetinaNet, build_model
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from focal_d2.modeling.folding import fold_norms
from tests.conftest import make_cfg, runs_bfloat16

EXAMPLE = (128, 160)
# Not seen while recording: smaller, larger, upright, wide; 96 × 128 and 192 × 256 are those of a bug report.
SIZES = [(96, 128), (192, 256), (320, 160), (150, 403)]
OUTPUTS = ["boxes", "classes", "scores", "size"]


def make_detector(**overrides):
    """A detector with some thousand logits above the threshold of 0.05."""
    model = build_model(make_cfg(**overrides)).eval()
    with torch.no_grad():
        for layer, deviation in ((model.head.cls_score, 0.3), (model.head.bbox_pred, 0.03)):
            layer.weight.normal_(0, deviation)
        model.head.cls_score.bias.fill_(-2.9)
    return model


def make_picture(height: int, width: int, brightness: float = 1.0) -> Tensor:
    """Coloured clouds, (3, H, W) in [0, 255]."""
    clouds = torch.rand(1, 3, height // 8 + 1, width // 8 + 1)
    return F.interpolate(clouds, size=(height, width), mode="bilinear")[0] * 255 * brightness


def detect(model, picture: Tensor) -> Instances:
    with torch.no_grad():
        return model([{"image": picture}])[0]["instances"]


def most_candidates_of_a_level(model, picture: Tensor, threshold: float) -> int:
    with torch.no_grad():
        _, (logits, _) = model.network(model.preprocess_image([{"image": picture}]))
    return max(int((x.sigmoid() > threshold).sum()) for x in logits)


def is_same_detection(eager: Instances, boxes: Tensor, classes: Tensor, scores: Tensor) -> Tensor:
    """Whether each of D eager detections is each of E recorded ones: by class, score and IoU, (D, E)."""
    close = pairwise_iou(eager.pred_boxes, Boxes(boxes)) >= 0.999
    close &= eager.pred_classes[:, None] == classes
    return close & ((eager.scores[:, None] - scores).abs() < 1e-4)


def assert_same_detections(eager: Instances, outputs: list[Tensor], at_least: int) -> None:
    """Every detection has its twin: class, score within 1e-4, IoU of 0.999."""
    boxes, classes, scores, size = outputs
    assert tuple(size.tolist()) == eager.image_size
    assert len(scores) == len(eager) >= at_least
    torch.testing.assert_close(scores, eager.scores, atol=1e-4, rtol=0)
    close = is_same_detection(eager, boxes, classes, scores)
    assert close.any(dim=1).all()
    assert close.any(dim=0).all()


def record(model, how: str, path: Path | None = None):
    """Record the model on one picture; return picture -> boxes, classes, scores, size."""
    picture = make_picture(*EXAMPLE)
    adapter = TracingAdapter(model, [{"image": picture}]).eval()
    if how == "torchscript":
        return torch.jit.trace(adapter, (picture,), check_trace=False)
    torch.onnx.export(
        adapter,
        (picture,),
        str(path),
        dynamo=False,
        opset_version=int(how.removeprefix("opset ")),
        input_names=["image"],
        output_names=OUTPUTS,
        dynamic_axes={"image": {1: "height", 2: "width"}, **{x: {0: "detections"} for x in OUTPUTS[:3]}},
    )
    return load_onnx(path)


def load_onnx(path: Path):
    session = pytest.importorskip("onnxruntime").InferenceSession(
        str(path), providers=["CPUExecutionProvider"]
    )
    return lambda picture: [torch.from_numpy(x) for x in session.run(None, {"image": picture.numpy()})]


pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return make_detector()


@pytest.fixture(scope="module")
def scenes(detector):
    """Pictures with eager detections: many candidates at four sizes and in the dark, few in one pixel."""
    torch.manual_seed(0)
    many = [*(make_picture(*size) for size in SIZES), make_picture(*SIZES[0], brightness=0.2)]
    assert all(most_candidates_of_a_level(detector, x, 0.05) > 1000 for x in many)
    few = make_picture(1, 1)
    assert most_candidates_of_a_level(detector, few, 0.05) < 1000
    return [(x, detect(detector, x)) for x in (*many, few)]


@pytest.mark.parametrize("how", ["torchscript", "opset 16", "opset 20"])
def test_recorded_detections_equal_eager_ones_at_other_sizes(detector, scenes, how, tmp_path):
    recorded = record(detector, how, tmp_path / "model.onnx")
    for picture, expected in scenes:
        assert_same_detections(expected, recorded(picture), at_least=20)


@pytest.mark.slow
def test_exported_detections_equal_eager_ones_at_other_sizes(detector, scenes, tmp_path):
    """`torch.export`, and ONNX from it, which is what `torch.onnx.export` does by default."""
    example = make_picture(192, 256)
    adapter = TracingAdapter(detector, [{"image": example}]).eval()
    dynamic = {1: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    program = torch.export.export(adapter, (example,), dynamic_shapes=((dynamic,),), strict=False)
    torch.onnx.export(program, f=str(tmp_path / "model.onnx"), input_names=["image"], output_names=OUTPUTS)
    exported, onnx = program.module(), load_onnx(tmp_path / "model.onnx")
    for picture, expected in scenes:
        assert_same_detections(expected, onnx(picture), at_least=20)
        # At 128 and below a level has a single row, which torch.export takes for fixed.
        if min(picture.shape[1:]) > 128:
            assert_same_detections(expected, exported(picture), at_least=20)


@pytest.mark.parametrize("how", ["torchscript", "opset 16"])
@pytest.mark.parametrize(("threshold", "at_least"), [(0.15, 20), (0.7, 0)])
def test_few_candidates_and_none(how, threshold, at_least, tmp_path):
    model = make_detector(MODEL__RETINANET__SCORE_THRESH_TEST=threshold)
    recorded = record(model, how, tmp_path / "model.onnx")
    picture = make_picture(*SIZES[1])
    assert at_least <= most_candidates_of_a_level(model, picture, threshold) < 50 * at_least + 1
    assert_same_detections(detect(model, picture), recorded(picture), at_least)


@pytest.mark.parametrize(
    "overrides",
    [
        {"MODEL__RETINANET__NUM_CLASSES": 80},
        {"MODEL__FOCAL__LOSS__NAME": "softmax_focal"},
        {"MODEL__FOCAL__CHANNELS_LAST": True},
        {"MODEL__ANCHOR_GENERATOR__OFFSET": 0.5, "MODEL__RETINANET__TOPK_CANDIDATES_TEST": 50},
    ],
    ids=str,
)
def test_tracing_knows_every_setting_of_inference(overrides):
    model = make_detector(**overrides)
    recorded = record(model, "torchscript")
    picture = make_picture(*SIZES[1])
    assert_same_detections(detect(model, picture), recorded(picture), at_least=20)


@runs_bfloat16
@pytest.mark.parametrize("channels_last", [False, True])
def test_tracing_in_bfloat16_gives_the_same_but_for_ties(channels_last):
    model = make_detector(
        MODEL__FOCAL__AMP__ENABLED=True,
        MODEL__FOCAL__AMP__DTYPE="bfloat16",
        MODEL__FOCAL__CHANNELS_LAST=channels_last,
    )
    recorded = record(model, "torchscript")
    for size in SIZES:
        picture = make_picture(*size)
        eager, (boxes, classes, scores, _) = detect(model, picture), recorded(picture)
        assert len(scores) == len(eager) == 100
        torch.testing.assert_close(scores, eager.scores, atol=0.01, rtol=0)
        same = is_same_detection(eager, boxes, classes, scores)
        # Where logits are equal, NMS may keep the one or the other of two boxes.
        assert same.any(dim=0).sum() >= 90
        assert same.any(dim=1).sum() >= 90


def test_a_compiled_model_is_traced_as_it_is_written(monkeypatch):
    def refuse(*args):
        raise RuntimeError("torch.compile refuses to be traced")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", refuse))
    picture = make_picture(*EXAMPLE)
    adapter = TracingAdapter(make_detector(MODEL__FOCAL__COMPILE=True), [{"image": picture}]).eval()
    boxes, *_ = torch.jit.trace(adapter, (picture,), check_trace=False)(picture)
    assert len(boxes) >= 20


def test_tracing_two_images_and_the_size_of_the_result():
    model = make_detector()

    def batch(*sizes, height, width):
        pictures = [make_picture(*size) for size in sizes]
        size = {"height": torch.tensor(height), "width": torch.tensor(width)}
        return [{"image": pictures[0], **size}, {"image": pictures[1]}]

    adapter = TracingAdapter(model, batch(EXAMPLE, EXAMPLE, height=500, width=300)).eval()
    traced = torch.jit.trace(adapter, adapter.flattened_inputs)
    inputs = batch(*SIZES[1:3], height=410, width=720)
    with torch.no_grad():
        eager = model([{k: v if k == "image" else int(v) for k, v in x.items()} for x in inputs])
    outputs = traced(inputs[0]["height"], inputs[0]["image"], inputs[0]["width"], inputs[1]["image"])
    assert eager[0]["instances"].image_size == (410, 720)
    assert_same_detections(eager[0]["instances"], outputs[:4], at_least=20)
    assert_same_detections(eager[1]["instances"], outputs[4:], at_least=20)


def test_folding_while_tracing_does_not_depend_on_the_image():
    def count_norms(size: int) -> int:
        network = torch.nn.Sequential(Conv2d(3, 8, 3, norm=FrozenBatchNorm2d(8), bias=False))
        fold_norms(network)
        graph = torch.jit.trace(network, (torch.rand(1, 3, size, size),)).inlined_graph
        return len(graph.findAllNodes("aten::batch_norm"))

    assert count_norms(4) == count_norms(64) == 0


def test_detectron2s_export_model_evaluates_the_traced_model(coco_dataset, tmp_path):
    """The steps of detectron2's tools/deploy/export_model.py, --export-method tracing --run-eval."""
    data = coco_dataset(size=96)
    register_coco_instances(data.name, {}, str(data.annotations), str(data.images))
    cfg = make_cfg(DATASETS__TEST=(data.name,), INPUT__MIN_SIZE_TEST=160, INPUT__MAX_SIZE_TEST=200)
    model = make_detector(INPUT__MIN_SIZE_TEST=160)
    loader = build_detection_test_loader(cfg, data.name)
    inputs = [{"image": next(iter(loader))[0]["image"]}]
    adapter = TracingAdapter(model, inputs, None)
    traced = torch.jit.trace(adapter, (inputs[0]["image"],))
    torch.jit.save(traced, tmp_path / "model.ts")
    traced = torch.jit.load(tmp_path / "model.ts")
    # The script evaluates nothing else.
    assert isinstance(model, GeneralizedRCNN | RetinaNet)

    def evaluated(inputs):
        instances = adapter.outputs_schema(traced(inputs[0]["image"]))[0]["instances"]
        return [{"instances": detector_postprocess(instances, inputs[0]["height"], inputs[0]["width"])}]

    results = []
    for one in (evaluated, model):
        evaluator = COCOEvaluator(data.name, output_dir=str(tmp_path), use_fast_impl=False)
        results.append(inference_on_dataset(one, loader, evaluator)["bbox"])
    np.testing.assert_allclose([*results[0].values()], [*results[1].values()], atol=1e-3)
    assert results[1]["AP50"] >= 0
