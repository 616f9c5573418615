from __future__ import annotations

import errno
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from torch import nn

from focal_d2.engine.nonfinite import Report, Step, examine, load_step, save_step
from focal_d2.engine.nonfinite.facts import LargestWeight
from tests.conftest import make_cfg, runs_bfloat16

INF, NAN = float("inf"), float("nan")
ANCHORS_A_CELL = 9


def make_sample(i: int, size: int = 64) -> dict:
    """A square image with two boxes."""
    instances = Instances((size, size))
    instances.gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 30.0, 30.0], [20.0, 20.0, 60.0, 50.0]]))
    instances.gt_classes = torch.tensor([0, 1])
    return {
        "image": torch.randint(0, 255, (3, size, size), dtype=torch.uint8),
        "instances": instances,
        "ignored_boxes": torch.zeros(0, 4),
        "file_name": f"images/{i}.png",
        "image_id": i,
        "height": size,
        "width": size,
    }


@pytest.fixture
def batch() -> list[dict]:
    return [make_sample(i) for i in range(2)]


def make_model(**overrides: object) -> nn.Module:
    return build_model(make_cfg(**overrides)).train()


def usual(iterations: int = 5) -> list[Step]:
    """A history in which nothing grows."""
    return [Step(i, 0.01, {"loss_cls": 1.0, "loss_box_reg": 0.5}, 3.0 + i % 2) for i in range(iterations)]


def plant(module: nn.Module, call: int, change) -> None:
    """Change the output of a module's nth call."""
    calls = []

    def hook(_module, _inputs, output):
        calls.append(1)
        return change(output) if len(calls) == call + 1 else None

    module.register_forward_hook(hook)


def at_one_place(index: tuple[int, ...], value: float):
    """Return a change of a single value that keeps the gradient of the others."""

    def change(output):
        where = torch.zeros_like(output, dtype=torch.bool)
        where[index] = True
        return torch.where(where, value, output)

    return change


@pytest.mark.parametrize(
    "value, loss, box_loss",
    [
        (INF, "focal", "smooth_l1"),
        (NAN, "focal", "smooth_l1"),
        (INF, "ghm", "giou"),
        (NAN, "ghm", "giou"),
        (INF, "quality_focal", "ghm_r"),
        (NAN, "quality_focal", "ghm_r"),
    ],
)
def test_examine_names_the_box_that_is_not_finite(batch, value, loss, box_loss):
    model = make_model(MODEL__FOCAL__LOSS__NAME=loss, MODEL__RETINANET__BBOX_REG_LOSS_TYPE=box_loss)
    batch[1]["instances"].gt_boxes.tensor[0, 2] = value
    report = examine(model, batch, steps=usual())
    assert report.cause == "annotation"
    assert "bad annotation: box 0 of image images/1.png (id 1) is (4, 4, " in report.verdict
    (bad,) = [x for x in report.anchors if x.term == "loss_box_reg"]
    assert bad.image.position == 1
    assert bad.matched_index == 0
    assert [(x.image.position, x.position, x.why) for x in report.boxes] == [(1, 0, "not finite")]


@pytest.mark.parametrize(
    "box, why",
    [
        ([10.0, 10.0, 10.0, 50.0], "no area"),
        ([-1e30, 0.0, 1e38, 40.0], "far outside the image of 64 × 64 pixels"),
    ],
)
def test_examine_names_a_finite_box_that_cannot_be_trained(batch, box, why):
    batch[0]["instances"] = batch[0]["instances"][:1]
    batch[0]["instances"].gt_boxes.tensor[0] = torch.tensor(box)
    report = examine(make_model(), batch, steps=usual())
    assert report.cause == "annotation"
    assert report.verdict.startswith("bad annotation: box 0 of image images/0.png (id 0) is (")
    assert report.verdict.endswith(why)


def test_examine_does_not_blame_a_box_that_no_bad_anchor_is_matched_to(batch):
    model = make_model()
    batch[1]["ignored_boxes"] = torch.tensor([[0.0, 0.0, INF, 9.0]])
    plant(model.head.cls_score, 1, at_one_place((0, 0, 0, 0), NAN))
    report = examine(model, batch, steps=usual())
    assert report.cause == "unknown"
    assert [x.field for x in report.boxes] == ["ignored_boxes"]
    assert "ignored box 0 of image images/1.png (id 1) is (0, 0, inf, 9): not finite" in report.text()


@pytest.mark.parametrize("value, why", [(NAN, "not finite"), (-INF, "not finite"), (3e38, "beyond ±65536")])
def test_examine_names_the_pixel(batch, value, why):
    batch[1]["image"] = batch[1]["image"].float()
    batch[1]["image"][2, 5, 7] = value
    model = make_model()
    with torch.no_grad():
        model.backbone.stem[0].weight.mul_(6400)
    report = examine(model, batch, steps=usual())
    assert report.cause == "pixel"
    assert f"image images/1.png (id 1) has 1 value {why}, first {value:.5g} at x 7, y 5, channel 2" in (
        report.verdict
    )


@pytest.mark.parametrize("name", ["head.cls_score.weight", "backbone.levels.1.weight"])
def test_examine_names_the_weights_that_are_not_finite(batch, name):
    model = make_model()
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3:5] = NAN
    report = examine(model, batch, steps=usual())
    assert report.cause == "weights"
    size = model.get_parameter(name).numel()
    assert f": 2 of {size} values of the parameter {name}; the batch is not to blame" in report.verdict
    assert report.module.name == name.removesuffix(".weight")


def test_examine_sees_into_a_compiled_model(batch):
    model = make_model(MODEL__FOCAL__COMPILE=True)
    assert model.backbone._compiled_call_impl is not None
    with torch.no_grad():
        model.get_parameter("backbone.levels.1.weight").view(-1)[0] = INF
    assert examine(model, batch, steps=usual()).module.name == "backbone.levels.1"
    model = make_model(MODEL__FOCAL__COMPILE=True)
    batch[1]["instances"].gt_boxes.tensor[0, 2] = NAN
    (bad,) = [x for x in examine(model, batch, steps=usual()).anchors if x.term == "loss_box_reg"]
    assert (bad.image.position, bad.matched_index) == (1, 0)


def test_examine_names_the_buffer_that_is_not_finite(batch):
    model = make_model()
    model.loss_normalizer.ema.fill_(INF)
    # Divided by infinity, the losses are 0 and their gradients too.
    assert examine(model, batch, steps=usual()).cause == "not_reproduced"
    model.loss_normalizer.ema.fill_(NAN)
    report = examine(model, batch, steps=usual())
    assert "1 of 1 value of the buffer loss_normalizer.ema" in report.verdict
    assert report.anchors == []


@pytest.mark.parametrize(
    "loss, value", [("focal", INF), ("focal", NAN), ("ghm", NAN), ("softmax_focal", INF), ("ohem", NAN)]
)
def test_examine_finds_the_anchor_of_a_bad_logit(batch, value, loss):
    model = make_model(MODEL__FOCAL__LOSS__NAME=loss, MODEL__FOCAL__LOW_QUALITY_MATCHES=False)
    logits = model.cls_loss.num_logits
    # P4 is the second level: cell x 2, y 3, the 6th of its anchors, the class 1 of the second image.
    plant(model.head.cls_score, 1, at_one_place((1, 5 * logits + 1, 3, 2), value))
    report = examine(model, batch, steps=usual())
    (bad,) = report.anchors
    assert (bad.term, bad.image.file_name) == ("loss_cls", "images/1.png")
    assert (bad.level, bad.stride, bad.cell) == ("p4", 16, (2, 3))
    assert (bad.alike, bad.complete) == (1, True)
    assert [math.isfinite(x) for x in bad.logits] == [i != 1 for i in range(logits)]
    first = 8 * 8 * ANCHORS_A_CELL
    anchors = model.anchors_for(model.preprocess_image(batch)).boxes
    assert bad.anchor == anchors[first + (3 * 4 + 2) * ANCHORS_A_CELL + 5].tolist()
    assert report.cause == "unknown"
    assert report.module.name == "head.cls_score"
    assert "level p4 (stride 16), cell x 2, y 3" in report.text()


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "ciou", "ghm_r"])
def test_examine_finds_the_anchor_of_a_bad_delta(batch, box_loss):
    model = make_model(MODEL__RETINANET__BBOX_REG_LOSS_TYPE=box_loss)
    targets = model.label_anchors(
        model.anchors_for(model.preprocess_image(batch)), [x["instances"] for x in batch]
    ).positives()
    p3 = targets.anchor < 8 * 8 * ANCHORS_A_CELL
    image, anchor = int(targets.image[p3][-1]), int(targets.anchor[p3][-1])
    cell, a = divmod(anchor, ANCHORS_A_CELL)
    plant(model.head.bbox_pred, 0, at_one_place((image, a * 4 + 2, cell // 8, cell % 8), NAN))
    report = examine(model, batch, steps=usual())
    (bad,) = report.anchors
    assert (bad.term, bad.image.position, bad.level) == ("loss_box_reg", image, "p3")
    assert (bad.cell, bad.alike) == ((cell % 8, cell // 8), 1)
    assert bad.matched_box == targets.gt_boxes[p3][-1].tolist()
    assert bad.label == f"class {bad.matched_index}"


def test_examine_says_when_only_the_sum_overflows(batch, monkeypatch):
    model = make_model()
    term = model.cls_loss.term
    model.cls_loss.implementation = "reference"
    monkeypatch.setattr(
        model.cls_loss, "term", lambda x, labels: term(x, labels) + 3e38 * (x.numel() > 3) + x.sum() * 0
    )
    report = examine(model, batch, steps=usual())
    assert report.bad_terms == ["loss_cls"]
    assert report.anchors == []
    assert "loss_cls: the loss of each anchor is finite, but not their sum" in report.text()


def test_examine_finds_a_gradient_that_is_not_finite(batch):
    model = make_model()

    def root(output):
        where = torch.zeros_like(output)
        where[0, 4, 1, 2] = 1
        return output + where * (output.detach() - output).abs().sqrt()  # adds 0, with gradient 0 · ∞

    plant(model.head.bbox_pred, 1, root)
    report = examine(model, batch, steps=usual())
    assert report.cause == "gradient"
    assert report.bad_terms == []
    assert "head.bbox_pred.bias" in report.gradient.parameters
    assert "head.cls_score.bias" not in report.gradient.parameters
    assert report.verdict.startswith("overflow of the gradient: the losses are finite (loss_cls ")


def test_examine_says_when_only_the_norm_of_the_gradient_overflows(batch):
    model = make_model()
    # Adds 0, whose gradient of 1e25 float32 holds, but not its square.
    plant(model.head.cls_score, 1, lambda x: x + (x - x.detach()) * 1e25)
    report = examine(model, batch, steps=usual())
    assert report.cause == "gradient"
    assert (report.gradient.parameters, report.gradient_norm) == ([], INF)
    assert report.verdict.endswith("the gradient's values are so large that its norm is not")
    assert "all values finite, but not their norm" in report.text()


def test_examine_finds_the_anchor_of_a_gradient_that_is_not_finite(batch, monkeypatch):
    model = make_model()
    forward = model.cls_loss.forward

    def root(dense):
        x = dense.logits[1][1, 3, 2, 0]  # P4: cell x 0, y 2, the second anchor
        return forward(dense) + (x - x.detach()).abs().sqrt()

    monkeypatch.setattr(model.cls_loss, "forward", root)
    report = examine(model, batch, steps=usual())
    assert report.cause == "gradient"
    assert report.gradient.first == "head.cls_score"
    (bad,) = report.anchors
    assert (bad.term, bad.level, bad.cell) == ("the gradient of the logits", "p4", (0, 2))
    assert (bad.image.position, bad.alike) == (1, 1)


def train_until_it_breaks(model: nn.Module, batch: list[dict], rate: float) -> list[Step]:
    """Plain SGD; the model is left as it was before the step that is not finite."""
    steps: list[Step] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for i in range(50):
        buffers = {name: x.clone() for name, x in model.named_buffers()}
        optimizer.zero_grad()
        losses = model(batch)
        sum(losses.values()).backward()
        norm = nn.utils.get_total_norm([x.grad for x in model.parameters() if x.grad is not None]).item()
        values = {name: x.item() for name, x in losses.items()}
        steps.append(Step(i, rate, values, norm))
        if not all(map(math.isfinite, [*values.values(), norm])):
            for name, x in model.named_buffers():
                x.copy_(buffers[name])
            return steps
        optimizer.step()
    raise AssertionError("it did not break")


@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=runs_bfloat16)])
def test_examine_tells_divergence_from_its_symptoms(amp):
    model = make_model(MODEL__FOCAL__AMP__ENABLED=amp)
    batch = [make_sample(0, size=96)]
    steps = train_until_it_breaks(model, batch, 1e5)
    report = examine(model, batch, steps=steps)
    assert report.cause == "diverged"
    assert "grew from" in report.verdict
    assert "at learning rate 1e+05 over" in report.verdict
    assert f"the largest weight is {report.largest_weight.value:.5g}" in report.verdict
    assert report.text().count("\n          ") >= len(steps)  # the table of the last iterations


@pytest.mark.parametrize(
    "norms, losses, cause",
    [
        ([3.0, 9.0, 0.4, 5.0, 30.0, 2.0], [1.0] * 6, "unknown"),
        ([3.0, 9.0, 0.4, 5.0, 30.0, NAN], [1.0, 9.0, 0.02, 1.0, 9.0, NAN], "unknown"),
        ([3.0, 3.0, 3.0, 300.0, 3e6, NAN], [1.0] * 6, "diverged"),
        ([NAN] * 6, [1.0, 1.0, 1.0, 2.0, 900.0, NAN], "diverged"),
        ([3.0], [1.0], "unknown"),
        ([], [], "unknown"),
    ],
)
def test_verdict_takes_usual_changes_for_no_divergence(norms, losses, cause):
    steps = [Step(i, 0.01, {"loss_cls": x}, g) for i, (g, x) in enumerate(zip(norms, losses, strict=True))]
    report = Report(
        losses={"loss_cls": NAN},
        normalizer=None,
        boxes=[],
        pixels=[],
        tensors=[],
        largest_weight=LargestWeight("head.cls_score.weight", 2.0),
        module=None,
        anchors=[],
        gradient=None,
        gradient_norm=3.0,
        steps=steps,
    )
    assert report.cause == cause
    assert replace(report, largest_weight=LargestWeight("x", 1001.0)).cause == "diverged"


@pytest.mark.parametrize("precision", [pytest.param("bfloat16", marks=runs_bfloat16), "float32"])
def test_examine_runs_in_the_precision_of_training(precision):
    batch = [make_sample(i, size=96) for i in range(2)]
    model = make_model(MODEL__FOCAL__AMP__ENABLED=precision == "bfloat16")
    with torch.no_grad():
        model.head.cls_score.bias[0] = NAN
    module = examine(model, batch, steps=usual()).module
    assert (module.name, module.precision) == ("head.cls_score", precision)


@runs_bfloat16
@pytest.mark.parametrize("processes", [1, 2])
def test_examine_proves_overflow_of_half_precision(monkeypatch, processes):
    batch = [make_sample(i, size=96) for i in range(2)]
    model = make_model(MODEL__FOCAL__AMP__ENABLED=True)
    # On a CPU there is no float16 autocast for the whole model: the module makes it.
    layer = model.head.cls_score
    layer.forward = lambda x: nn.functional.conv2d(
        x, (layer.weight * 1e7).to(x.dtype), layer.bias.to(x.dtype), padding=1
    ).to(torch.float16 if x.dtype == torch.bfloat16 else x.dtype)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: processes)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x: x)  # the loss normaliser's
    report = examine(model, batch, steps=usual())
    assert report.cause == ("half_precision" if processes == 1 else "unknown")
    if processes > 1:  # a norm in the module could wait for them
        assert report.module.in_float32 is None
        assert "cause unknown: head.cls_score (Conv2d) made " in report.verdict
        return
    assert "in float16 the output of head.cls_score (Conv2d) is not finite, in float32" in report.verdict
    assert report.module.in_float32 > 65504


def test_examine_says_when_nothing_fails(batch):
    report = examine(make_model(), batch, steps=usual())
    assert report.cause == "not_reproduced"
    assert (report.module, report.anchors, report.gradient) == (None, [], None)


def test_examine_divides_by_the_normalizer_of_the_step(batch):
    model = make_model()
    ones = examine(model, batch, steps=[], normalizer=1.0).losses
    tens = examine(model, batch, steps=[], normalizer=10.0).losses
    assert {k: x / 10 for k, x in ones.items()} == pytest.approx(tens)
    own = examine(model, batch, steps=[]).losses
    assert {k: x.item() for k, x in model(batch).items()} == own


def all_state(model: nn.Module) -> dict:
    return {
        **{name: x.detach().clone() for name, x in model.named_parameters()},
        **{name: x.clone() for name, x in model.named_buffers()},
        **{f"{name}.grad": x.grad.clone() for name, x in model.named_parameters() if x.grad is not None},
        "random": torch.get_rng_state(),
        "training": torch.tensor([m.training for m in model.modules()]),
    }


@pytest.mark.parametrize("value", [30.0, INF])
def test_examine_leaves_everything_as_it_was(batch, value):
    model = make_model(
        MODEL__FOCAL__LOSS__NAME="ghm",
        MODEL__RETINANET__BBOX_REG_LOSS_TYPE="ghm_r",
        MODEL__RESNETS__NORM="BN",
        MODEL__RETINANET__NORM="BN",
    )
    model.head.cls_subnet.append(nn.Dropout(0.5))
    sum(model(batch).values()).backward()
    batch[0]["instances"].gt_boxes.tensor[0, 2] = value
    model.backbone.eval()
    before, hooks = all_state(model), sum(len(m._forward_hooks) for m in model.modules())
    examine(model, batch, steps=usual(), normalizer=3.0)
    after = all_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    # The forward pass itself changes what is compared.
    model(batch)
    assert not torch.equal(before["cls_loss.histogram"], model.cls_loss.histogram)
    assert not torch.equal(before["random"], torch.get_rng_state())


def test_examine_knows_less_of_other_models(batch):
    model = make_model(MODEL__META_ARCHITECTURE="RetinaNet")
    assert examine(model, batch, steps=usual()).cause == "not_reproduced"
    assert not hasattr(model, "loss_normalizer")
    with EventStorage():
        model(batch)
    before = model.loss_normalizer  # a plain number that the forward pass changes
    assert examine(model, batch, steps=usual()).cause == "not_reproduced"
    assert model.loss_normalizer == before
    batch[0]["instances"].gt_boxes.tensor[0, 2] = INF
    report = examine(model, batch, steps=usual())
    assert report.cause == "annotation"
    assert report.anchors == []
    with torch.no_grad():
        model.head.bbox_pred.weight[0] = NAN
    report = examine(model, batch, steps=usual())
    assert report.verdict.endswith("of the parameter head.bbox_pred.weight; the batch is not to blame")
    assert report.module.name == "head.bbox_pred"


class _Mean(nn.Module):
    """A model that is nothing like a detector, and returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1)

    def forward(self, batch: list[dict]) -> torch.Tensor:
        return self.scale(torch.stack([x["instances"].gt_boxes.tensor.mean() for x in batch])[:, None]).sum()


def test_examine_takes_any_module_and_rotated_boxes(batch):
    for sample in batch:
        sample["instances"].gt_boxes = RotatedBoxes(torch.tensor([[9.0, 9.0, 2.0, 2.0, -45.0]] * 2))
    model = _Mean()
    assert examine(model, batch, steps=[]).cause == "not_reproduced"
    batch[0]["instances"].gt_boxes.tensor[1, 4] = INF
    report = examine(model, batch, steps=[])
    assert [(x.image.position, x.position) for x in report.boxes] == [(0, 1)]
    assert report.bad_terms == ["total_loss"]
    assert report.cause == "annotation"


def test_report_is_strict_json(batch):
    batch[0]["instances"].gt_boxes.tensor[0, 2] = NAN
    steps = [*usual(), Step(5, 0.01, {"loss_cls": NAN, "loss_box_reg": INF}, NAN)]
    report = examine(make_model(), batch, steps=steps)
    facts = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert facts["cause"] == "annotation"
    assert facts["boxes"][0]["box"] == [4, 4, "nan", 30]
    assert facts["steps"][-1]["losses"] == {"loss_cls": "nan", "loss_box_reg": "inf"}
    assert facts["anchors"][0]["image"]["file_name"] == "images/0.png"
    assert "\n" not in report.verdict
    for line in ("Largest weight", "The last iterations", "Inputs that are wrong"):
        assert line in report.text()


def saved(folder, cfg, model, batch, report: Report, **changes):
    arguments = {
        "losses": report.losses,
        "steps": report.steps,
        "normalizer": report.normalizer,
        "iteration": 12,
        "rank": 0,
        **changes,
    }
    return save_step(folder, cfg=cfg, model=model, batch=batch, report=report, **arguments)


def test_save_step_writes_what_load_step_reads(batch, tmp_path):
    cfg = make_cfg()
    model = build_model(cfg).train()
    batch[0]["instances"].gt_boxes.tensor[0, 2] = NAN
    report = examine(model, batch, steps=usual(), normalizer=20.0)
    folder = saved(tmp_path, cfg, model, batch, report)
    assert folder == tmp_path / "nonfinite_0000012"
    assert sorted(x.name for x in folder.iterdir()) == ["report.json", "report.txt", "step_rank0.pth"]
    assert json.loads((folder / "report.json").read_text()) == report.as_dict()
    assert report.text() in (folder / "report.txt").read_text()
    content = torch.load(folder / "step_rank0.pth", weights_only=True)
    assert (content["iteration"], content["rank"], content["learning_rate"]) == (12, 0, 0.01)
    step = load_step(folder)
    assert yaml.safe_load(step.config)["MODEL"]["META_ARCHITECTURE"] == "FocalRetinaNet"
    assert (step.normalizer, step.steps) == (20.0, usual())
    assert torch.equal(step.random, torch.get_rng_state())
    assert all(torch.equal(x, step.model[name]) for name, x in model.state_dict().items())
    for given, read in zip(batch, step.batch, strict=True):
        assert read.keys() == given.keys()
        assert torch.equal(read["image"], given["image"])
        for get in (lambda x: x.gt_boxes.tensor, lambda x: x.gt_classes):
            assert torch.equal(get(read["instances"]).nan_to_num(), get(given["instances"]).nan_to_num())


def test_save_step_stores_no_types_of_numpy_and_nothing_half(batch, tmp_path, monkeypatch):
    cfg = make_cfg()
    model = build_model(cfg).train()
    batch[0].update(height=np.int64(64), weight=np.float64(0.5), record=object())
    batch[0]["image"] = torch.zeros(300, 3, 64, 64, dtype=torch.uint8)[7]
    steps = [Step(np.int64(1), np.float64(0.01), {"loss_cls": np.float64(NAN)}, np.float64(1.0))]
    report = examine(model, batch, steps=usual())
    folder = saved(tmp_path, cfg, model, batch, report, steps=steps)
    step = load_step(folder)
    assert (step.batch[0]["height"], step.batch[0]["weight"]) == (64, 0.5)
    assert "record" not in step.batch[0]
    assert step.batch[0]["image"].untyped_storage().nbytes() == 3 * 64 * 64
    before = (folder / "step_rank0.pth").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, cfg, model, batch, report)
    assert (folder / "step_rank0.pth").read_bytes() == before
    assert len(list(folder.iterdir())) == 3


def test_load_step_takes_the_rank_that_failed(batch, tmp_path):
    cfg = make_cfg()
    model = build_model(cfg).train()
    report = examine(model, batch, steps=usual())
    folder = saved(tmp_path, cfg, model, batch, report)
    saved(tmp_path, cfg, model, batch, report, rank=1, losses={"loss_cls": NAN})
    assert (folder / "report_rank1.json").exists()
    assert load_step(folder).file.name == "step_rank1.pth"
