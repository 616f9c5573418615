"""Every classification loss, through the interface that the detector uses."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from torchvision.ops import box_iou

from focal_d2 import UserError
from focal_d2.config import LOSS_DEFAULTS, loss_parameters
from focal_d2.modeling.losses import (
    LOSSES,
    ClassificationLoss,
    DenseBatch,
    build_loss,
    gather_deltas,
)
from focal_d2.ops import IGNORE_LABEL, sigmoid_focal_loss
from tests.conftest import REPOSITORY, make_cfg
from tests.modeling.test_retinanet import losses_and_gradients, make_image

K, A = 3, 2
SIZES = [(4, 5), (2, 3)]
NAMES = [
    "balanced_ce",
    "ce",
    "fixed_weights",
    "focal",
    "focal_star",
    "ghm",
    "hard_negative_mining",
    "ohem",
    "quality_focal",
    "random_sampling",
    "softmax_ce",
    "softmax_focal",
    "varifocal",
]


def build(name: str, *, implementation: str = "auto", **parameters) -> ClassificationLoss:
    changes = {f"MODEL__FOCAL__LOSS__{k}": v for k, v in parameters.items()}
    cfg = make_cfg(MODEL__FOCAL__LOSS__NAME=name, **changes)
    return build_loss(
        name, num_classes=K, parameters=loss_parameters(cfg), implementation=implementation, use_kernels=False
    )


def make_batch(loss: ClassificationLoss, images: int = 2, labels=None) -> DenseBatch:
    c = loss.num_logits
    anchors = sum(h * w * A for h, w in SIZES)
    low = torch.rand(anchors, 2) * 60
    boxes = torch.cat([low, low + 10 + torch.rand(anchors, 2) * 30], 1)
    if labels is None:
        labels = torch.randint(-1, K + 1, (images, anchors))
        labels[torch.rand(labels.shape) < 0.6] = K
    positive = (labels >= 0) & (labels < K)
    gt = boxes.expand(images, -1, -1)[positive] + torch.randn(int(positive.sum()), 4)
    image, anchor = positive.nonzero(as_tuple=True)
    return DenseBatch(
        logits=[torch.randn(images, A * c, h, w, requires_grad=True) for h, w in SIZES],
        num_logits=c,
        labels=labels,
        positive=positive,
        image=image,
        anchor=anchor,
        gt_boxes=gt,
        deltas=[torch.randn(images, A * 4, h, w) * 0.1 for h, w in SIZES],
        anchors=boxes,
        decode=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)).apply_deltas,
        seeds=range(images),
    )


def cross_entropy(batch: DenseBatch) -> torch.Tensor:
    """(N, R), summed over classes."""
    return sigmoid_focal_loss(
        batch.all_logits(), batch.labels, num_classes=K, alpha=-1.0, gamma=0.0, reduction="none"
    ).sum(-1)


def test_names_are_these():
    assert sorted(LOSSES) == NAMES
    assert set(LOSS_DEFAULTS) <= set(NAMES)


def test_levels_are_read_cell_by_cell():
    batch = make_batch(build("ce"))
    flat, r = batch.all_logits(), 0
    for level, (h, w) in zip(batch.logits, SIZES, strict=True):
        for y in range(h):
            for x in range(w):
                for a in range(A):
                    assert torch.equal(flat[:, r], level[:, a * K : (a + 1) * K, y, x])
                    r += 1
    assert torch.equal(torch.cat([labels for _, labels in batch.levels()], 1), batch.labels)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("labels", ["mixed", "background", "ignored", "no images"])
def test_loss_is_finite_with_gradients(name, labels):
    loss = build(name)
    anchors = sum(h * w * A for h, w in SIZES)
    given = {
        "mixed": None,
        "background": torch.full((2, anchors), K),
        "ignored": torch.full((2, anchors), IGNORE_LABEL),
        "no images": torch.zeros(0, anchors, dtype=torch.int64),
    }[labels]
    images = 0 if labels == "no images" else 2
    batch = make_batch(loss, images, given)
    value = loss(batch)
    assert value.shape == ()
    assert value.isfinite()
    grads = torch.autograd.grad(value, batch.logits)
    assert all(g.isfinite().all() for g in grads)
    if labels in ("ignored", "no images"):
        assert value.item() == 0
        assert all((g == 0).all() for g in grads)
    elif labels == "mixed":
        assert value.item() > 0


@pytest.mark.parametrize("name", NAMES)
def test_loss_agrees_in_half_precision(name):
    loss = build(name)
    batch = make_batch(loss)
    half = batch._replace(logits=[x.detach().bfloat16() for x in batch.logits])
    full = batch._replace(logits=[x.float() for x in half.logits])
    again = build(name)  # GHM keeps state
    assert loss(half).dtype == torch.float32
    torch.testing.assert_close(build(name)(half), again(full), rtol=1e-6, atol=0)


def test_worked_example_of_the_paper():
    # 50 positives at CE 3 sum to 150; 10,000 negatives at CE 0.1 sum to 1000 and own the gradient.
    positive_x = -math.log(math.exp(3) - 1)  # -log σ(x) = 3
    negative_x = math.log(math.exp(0.1) - 1)  # -log(1 - σ(x)) = 0.1
    x = torch.cat([torch.full((50, 1), positive_x), torch.full((10_000, 1), negative_x)]).double()
    labels = torch.cat([torch.zeros(50), torch.ones(10_000)]).long()

    def shares(**parameters) -> tuple[float, float]:
        loss = sigmoid_focal_loss(x, labels, num_classes=1, reduction="none", **parameters)
        return loss[:50].sum().item(), loss[50:].sum().item()

    assert shares(alpha=-1.0, gamma=0.0) == pytest.approx((150, 1000))
    assert shares(alpha=0.75, gamma=0.0) == pytest.approx((112.5, 250))
    p, q = math.exp(-3), 1 - math.exp(-0.1)  # p_t of the positives, 1 - p_t of the negatives
    assert shares(alpha=-1.0, gamma=2.0) == pytest.approx((150 * (1 - p) ** 2, 1000 * q**2))
    assert shares(alpha=0.25, gamma=2.0) == pytest.approx((33.86, 6.79), rel=1e-3)


def ratio_of_shares(name: str, **parameters) -> float:
    """Positives' share of the loss over the negatives', in the paper's example (with 1 : 200)."""
    loss = LOSSES[name](num_classes=1, **{**_defaults(name), **parameters})
    positive_x, negative_x = -math.log(math.exp(3) - 1), math.log(math.exp(0.1) - 1)
    values = torch.cat([torch.full((50,), positive_x), torch.full((10_000,), negative_x)])
    labels = torch.cat([torch.zeros(50), torch.ones(10_000)]).long()[None]
    logits = values.reshape(1, 1, 1, -1)
    if loss.num_logits == 2:  # background's logit is 0, so that p is the same
        logits = torch.stack([values, torch.zeros_like(values)]).reshape(1, 2, 1, -1)
    logits.requires_grad_()
    spread = torch.arange(10_050.0) * 100
    boxes = torch.stack([spread, spread, spread + 10, spread + 10], 1)
    batch = DenseBatch(
        logits=[logits],
        num_logits=loss.num_logits,
        labels=labels,
        positive=labels == 0,
        image=torch.zeros(50, dtype=torch.int64),
        anchor=torch.arange(50),
        gt_boxes=boxes[:50],
        deltas=[torch.zeros(1, 4, 1, 10_050)],
        anchors=boxes,
        decode=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)).apply_deltas,
        seeds=[0],
    )
    loss(batch).backward()
    grad = logits.grad[0, 0, 0].abs()
    return (grad[:50].sum() / grad[50:].sum().clamp(min=1e-12)).item()


def _defaults(name: str) -> dict:
    defaults = {"ALPHA": 0.25, "GAMMA": 2.0} if name == "focal" else LOSS_DEFAULTS.get(name, {})
    return {k.lower(): v for k, v in defaults.items()}


def test_every_answer_to_imbalance_shifts_the_gradient_to_the_positives():
    ratios = {name: ratio_of_shares(name) for name in NAMES}
    # CE: 50 · (1 - e⁻³) against 10,000 · (1 - e^-0.1).
    assert ratios["ce"] == pytest.approx(50 * (1 - math.exp(-3)) / (10_000 * (1 - math.exp(-0.1))))
    assert ratios["softmax_ce"] == pytest.approx(ratios["ce"], rel=1e-4)
    assert ratios["balanced_ce"] == pytest.approx(3 * ratios["ce"], rel=1e-4)
    assert ratios["fixed_weights"] == pytest.approx(2 * ratios["ce"], rel=1e-4)
    # All 50 positives against 150 negatives.
    assert ratios["random_sampling"] == pytest.approx(ratios["ce"] * 10_000 / 150, rel=1e-4)
    assert ratios["hard_negative_mining"] == pytest.approx(ratios["ce"] * 10_000 / 150, rel=1e-4)
    # The 128 of the highest loss: all 50 positives and 78 negatives.
    assert ratios["ohem"] == pytest.approx(ratios["ce"] * 10_000 / 78, rel=1e-4)
    # Two bins are occupied; each gets the same weight, so the norms decide: 0.95 against 0.095.
    assert ratios["ghm"] == pytest.approx((1 - math.exp(-3)) / (1 - math.exp(-0.1)), rel=1e-4)
    # The others reshape the two sides by functions of p; by hand from the formulas' derivatives.
    p, q = math.exp(-3), 1 - math.exp(-0.1)

    def slope(p_t, alpha, gamma):  # of FL with respect to x_t
        return alpha * (1 - p_t) ** gamma * (gamma * p_t * math.log(p_t) + p_t - 1)

    def star(x_t):  # of FL* at γ 2, β 1
        return -1 / (1 + math.exp(2 * x_t + 1))

    focal = 50 * slope(p, 0.25, 2) / (10_000 * slope(1 - q, 0.75, 2))
    assert ratios["focal"] == pytest.approx(focal, rel=1e-4)
    assert ratios["softmax_focal"] == pytest.approx(focal, rel=1e-4)
    x = [math.log(p_t / (1 - p_t)) for p_t in (p, 1 - q)]
    assert ratios["focal_star"] == pytest.approx(50 * star(x[0]) / (10_000 * star(x[1])), rel=1e-4)
    # Boxes are exact: the target is 1.
    quality = 50 * slope(p, 1, 2) / (10_000 * slope(1 - q, 1, 2))
    assert ratios["quality_focal"] == pytest.approx(quality, rel=1e-3)
    varifocal = 50 * (1 - p) / (-10_000 * slope(1 - q, 0.75, 2))
    assert ratios["varifocal"] == pytest.approx(varifocal, rel=1e-3)
    assert min(ratios["focal"], ratios["focal_star"], ratios["varifocal"]) > 5 * ratios["ce"]


def test_hard_negative_mining_keeps_what_brute_force_keeps():
    loss = build("hard_negative_mining")
    batch = make_batch(loss)
    ce, expected = cross_entropy(batch), 0.0
    for row, labels in zip(ce, batch.labels, strict=True):
        positives = [row[i] for i in range(len(row)) if 0 <= labels[i] < K]
        negatives = sorted((row[i] for i in range(len(row)) if labels[i] == K), reverse=True)
        expected += sum(positives) + sum(negatives[: 3 * len(positives)])
    torch.testing.assert_close(loss(batch), expected, rtol=1e-5, atol=0)


def chosen(loss: ClassificationLoss, batch: DenseBatch) -> torch.Tensor:
    """The anchors (N, R) bool that a loss of cross entropy is taken over."""
    return torch.cat([x.sum(-1) for x in loss.example_losses(batch)], dim=1) > 0


def sparse_labels(images: int) -> torch.Tensor:
    """(N, R) with 5 positives and 4 ignored anchors an image."""
    labels = torch.full((images, sum(h * w * A for h, w in SIZES)), K)
    labels[:, 10:15], labels[:, 20:24] = 1, -1
    return labels


def test_random_sampling_takes_all_positives_and_three_negatives_for_each():
    loss = build("random_sampling")
    batch = make_batch(loss, labels=sparse_labels(2))
    kept = chosen(loss, batch)
    assert kept[batch.positive].all()
    assert not kept[batch.labels < 0].any()
    assert (kept & (batch.labels == K)).sum(1).tolist() == [15, 15]
    torch.testing.assert_close(loss(batch), cross_entropy(batch)[kept].sum(), rtol=1e-5, atol=0)
    nothing = batch._replace(positive=torch.zeros_like(batch.positive))
    assert loss(nothing) == 0


def test_random_sampling_is_of_the_images_seed_alone():
    loss = build("random_sampling")
    batch = make_batch(loss, images=3, labels=sparse_labels(3))._replace(seeds=[5, 2**63 - 1, 7])
    kept = chosen(loss, batch)
    torch.rand(9)  # whatever is drawn elsewhere
    for i, image in enumerate(batch.in_parts(pairs=1)):  # as in another process, or another part
        assert torch.equal(chosen(loss, image)[0], kept[i])
    other = chosen(loss, batch._replace(seeds=[5, 6, 7]))
    assert [torch.equal(a, b) for a, b in zip(kept, other, strict=True)] == [True, False, True]


def test_random_sampling_draws_each_negative_alike():
    loss = build("random_sampling")
    batch = make_batch(loss, images=1, labels=sparse_labels(1))
    draws = 600
    counts = sum(chosen(loss, batch._replace(seeds=[i])).long() for i in range(draws))[batch.labels == K]
    share = 15 / len(counts)
    # Of a binomial distribution, whatever the losses are.
    assert (counts - share * draws).abs().max() < 5 * math.sqrt(draws * share * (1 - share))


def test_random_sampling_takes_the_same_negatives_however_the_image_is_padded():
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NAME="random_sampling"))
    batches = []
    model.cls_loss.forward = lambda batch: batches.append(batch) or torch.zeros(())
    image = {**make_image(5, K, size=(100, 130)), "sampling_seed": 11}
    wide = {**make_image(5, K, size=(300, 520)), "sampling_seed": 12}
    model([image])
    model([wide, image])
    del model.cls_loss.forward
    (alone, beside), found = batches, []
    for batch, index in ((alone, 0), (beside, 1)):
        kept = chosen(model.cls_loss, batch)[index] & ~batch.positive[index]
        numbers = dict(zip(batch.positions().tolist(), batch.anchors.tolist(), strict=True))
        found.append({x: numbers[x] for x in batch.positions()[kept].tolist()})
    assert found[0] == found[1]
    assert len(found[0]) == 3 * int(alone.positive.sum()) > 20
    # None in the padding: both are padded to multiples of 128.
    for left, top, right, bottom in found[0].values():
        assert (left + right) / 2 < 130
        assert (top + bottom) / 2 < 100


def test_random_sampling_in_the_model_reads_the_samples_seeds(monkeypatch):
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NAME="random_sampling"))
    seeds = []
    monkeypatch.setattr(model.cls_loss, "forward", lambda batch: seeds.append(batch.seeds) or torch.zeros(()))
    images = [make_image(5, K), make_image(5, K)]
    images[0]["sampling_seed"] = 11
    model(images)
    torch.manual_seed(0)
    model(images)
    torch.manual_seed(0)
    model(images)
    # Another loader gives none: PyTorch's generator does.
    assert [x[0] for x in seeds] == [11] * 3
    assert seeds[0][1] != seeds[1][1] == seeds[2][1]
    model.cls_loss.samples = False
    model(images)
    assert seeds[3] == ()


@pytest.mark.parametrize("ratio", [0.0, 3.0])
@pytest.mark.parametrize("examples, threshold", [(8, 0.5), (20, 0.7), (1000, 0.5)])
def test_ohem_keeps_what_brute_force_keeps(examples, threshold, ratio):
    loss = build("ohem", EXAMPLES=examples, NMS_THRESH=threshold, NEGATIVES_PER_POSITIVE=ratio)
    batch = make_batch(loss)
    ce, expected = cross_entropy(batch), 0.0
    for image, (row, labels) in enumerate(zip(ce, batch.labels, strict=True)):
        boxes = batch.predicted_boxes(image, torch.arange(len(row)))
        survivors: list[int] = []
        for i in row.argsort(descending=True).tolist():
            if labels[i] == IGNORE_LABEL:
                continue
            if not survivors or box_iou(boxes[i : i + 1], boxes[survivors]).max() <= threshold:
                survivors.append(i)
        if ratio:
            positives = [i for i in survivors if labels[i] < K][: round(examples / 4)]
            negatives = [i for i in survivors if labels[i] == K]
            kept = positives + negatives[: 3 * len(positives)]
        else:
            kept = survivors[:examples]
        expected += row[kept].sum()
    torch.testing.assert_close(loss(batch), expected, rtol=1e-5, atol=0)


def test_ghm_weights_counted_by_hand():
    loss = build_loss(
        "ghm",
        num_classes=1,
        parameters={"BINS": 4, "MOMENTUM": 0.0},
        implementation="auto",
        use_kernels=False,
    )
    p = torch.tensor([0.1, 0.2, 0.6, 0.9])
    logits = p.logit().reshape(1, 1, 1, 4)
    labels = torch.tensor([[1, 1, 1, 0]])
    batch = make_batch(build("ce"))._replace(logits=[logits], num_logits=1, labels=labels)
    # Norms 0.1, 0.2, 0.6 and 0.1: three in the first quarter (density 12), one in the third (4).
    expected = -(math.log(0.9) + math.log(0.8) + math.log(0.9)) / 12 - math.log(0.4) / 4
    assert loss(batch).item() == pytest.approx(expected, rel=1e-6)
    assert loss.histogram.tolist() == [3, 0, 1, 0]
    assert loss.state_dict().keys() == {"histogram"}


def test_quality_losses_read_the_predicted_boxes():
    loss = build("quality_focal")
    batch = make_batch(loss)
    image, anchor = batch.image, batch.anchor
    boxes = batch.decode(gather_deltas(batch.deltas, image, anchor), batch.anchors[anchor])
    torch.testing.assert_close(batch.quality()[image, anchor], box_iou(boxes, batch.gt_boxes).diagonal())
    assert (batch.quality()[~batch.positive] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_model_trains_and_infers_with_every_loss(name):
    cfg = make_cfg(MODEL__FOCAL__LOSS__NAME=name, MODEL__RETINANET__SCORE_THRESH_TEST=0.001)
    model = build_model(cfg)
    batch = [make_image(3, K), make_image(0, K)]
    losses, gradients = losses_and_gradients(model, batch)
    assert all(x.isfinite() for x in losses.values())
    assert all(g is not None and g.isfinite().all() for g in gradients.values())
    model.eval()
    with torch.no_grad():
        detections = model(batch)[0]["instances"]
    assert len(detections) > 0
    assert detections.pred_classes.max() < K


@pytest.mark.parametrize("name", NAMES)
def test_anchors_start_at_the_prior(name):
    loss = build(name)
    probabilities = loss.probabilities(loss.prior_bias(0.01))
    assert probabilities.shape == (K,)
    total = probabilities.sum().item()
    assert total == pytest.approx(0.01 if "softmax" in name else 0.01 * K, rel=1e-5)


def test_alpha_may_be_a_list_one_for_each_class():
    loss = build("focal", ALPHA=[0.1, 0.5, 0.9])
    batch = make_batch(loss)
    expected = sum(
        sigmoid_focal_loss(
            batch.all_logits()[..., k : k + 1],
            torch.where(batch.labels == k, 0, torch.where(batch.labels < 0, -1, 1)),
            num_classes=1,
            alpha=alpha,
            gamma=2.0,
        )
        for k, alpha in enumerate([0.1, 0.5, 0.9])
    )
    torch.testing.assert_close(loss(batch), expected, rtol=1e-5, atol=0)


def test_focal_reads_detectron2s_keys_unless_its_own_are_set():
    cfg = make_cfg(MODEL__RETINANET__FOCAL_LOSS_ALPHA=0.4, MODEL__RETINANET__FOCAL_LOSS_GAMMA=1.5)
    assert loss_parameters(cfg) == {"ALPHA": 0.4, "GAMMA": 1.5}
    cfg.MODEL.FOCAL.LOSS.GAMMA = 3.0
    assert loss_parameters(cfg) == {"ALPHA": 0.4, "GAMMA": 3.0}


@pytest.mark.parametrize(
    "name, parameters, match",
    [
        ("focall", {}, 'NAME is "focall"; legal values: balanced_ce, ce, '),
        ("ce", {"GAMMA": 2.0}, "LOSS.GAMMA is set, but the loss ce does not read it; it reads no"),
        ("focal", {"BINS": 3}, "LOSS.BINS is set.* it reads ALPHA, GAMMA"),
        ("focal", {"ALPHA": [0.5]}, "ALPHA has 1 values for 3 classes"),
        ("focal", {"ALPHA": [0.5, -1.0, 0.5]}, "each of ALPHA is -1.0; it must be in \\[0, 1\\]"),
        (
            "focal",
            {"ALPHA": "Auto"},
            "ALPHA is 'Auto'; it must be a number, a list .*, auto or auto_per_class",
        ),
        ("focal", {"ALPHA": True}, "ALPHA is True"),
        ("focal", {"ALPHA": float("nan")}, "ALPHA is nan"),
        ("focal_star", {"ALPHA": "auto"}, "ALPHA is 'auto'; it must be a number, a list .* class$"),
        ("focal", {"GAMMA": -1.0}, "GAMMA is -1.0; it must be at least 0"),
        ("focal", {"GAMMA": "abc"}, "focal"),
        ("focal_star", {"GAMMA": 0.0}, "GAMMA is 0.0; it must be above 0"),
        ("softmax_focal", {"ALPHA": 3.0}, "ALPHA is 3.0"),
        ("softmax_focal", {"ALPHA": "auto"}, "softmax_focal"),
        ("softmax_focal", {"GAMMA": -1.0}, "GAMMA is -1.0"),
        ("varifocal", {"ALPHA": -1.0}, "ALPHA is -1.0; it must be in"),
        ("varifocal", {"GAMMA": -2.0}, "GAMMA is -2.0"),
        ("quality_focal", {"BETA": 0.5}, "beta is 0.5; it must be 0, or at least 1"),
        ("ohem", {"EXAMPLES": 0}, "EXAMPLES is 0"),
        ("ohem", {"EXAMPLES": 2.5}, "EXAMPLES is 2.5; it must be a whole number"),
        ("ohem", {"NMS_THRESH": 50.0}, "NMS_THRESH is 50.0"),
        ("ohem", {"NEGATIVES_PER_POSITIVE": -1.0}, "NEGATIVES_PER_POSITIVE is -1.0"),
        ("hard_negative_mining", {"NEGATIVES_PER_POSITIVE": -1.0}, "NEGATIVES_PER_POSITIVE is -1.0"),
        ("random_sampling", {"NEGATIVES_PER_POSITIVE": -1.0}, "NEGATIVES_PER_POSITIVE is -1.0"),
        *[
            (
                name,
                {"NEGATIVES_PER_POSITIVE": value},
                f"NEGATIVES_PER_POSITIVE is {value!r}; .* finite number",
            )
            for name in ("random_sampling", "hard_negative_mining", "ohem")
            for value in (float("inf"), float("nan"), "inf", True)
        ],
        ("ghm", {"BINS": 0}, "BINS is 0"),
        ("fixed_weights", {"POSITIVE_WEIGHT": -1.0}, "at least 0"),
    ],
)
def test_mistakes_name_the_key(name, parameters, match):
    with pytest.raises(UserError, match=match):
        build(name, **parameters)


def example_in_the_docs() -> tuple[str, str]:
    """The Python and the YAML that docs/losses.md shows for a new loss."""
    section = (REPOSITORY / "docs/losses.md").read_text().split("## A new loss")[1]
    python, yaml_text = (section.split(f"```{kind}\n")[1].split("```")[0] for kind in ("python", "yaml"))
    assert len(python.splitlines()) <= 22
    return python, yaml_text


def test_a_users_own_loss_is_one_file_and_one_key(tmp_path, monkeypatch):
    python, yaml_text = example_in_the_docs()
    (tmp_path / "my_losses.py").write_text(python)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        __import__("my_losses")
        path = tmp_path / "own.yaml"
        path.write_text(yaml_text)
        cfg = make_cfg()
        cfg.merge_from_file(str(path))
        model = build_model(cfg)
        assert model.cls_loss.margin == 2.0
        losses, _ = losses_and_gradients(model, [make_image(3, K)])
        assert losses["loss_cls"].isfinite()
    finally:
        LOSSES.pop("hinge", None)
        sys.modules.pop("my_losses", None)


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("focal_star", "BETA", 0.5),
        ("focal_star", "GAMMA", 4.0),
        ("quality_focal", "BETA", 1.0),
        ("varifocal", "ALPHA", 0.25),
        ("softmax_focal", "ALPHA", 0.75),
        ("ohem", "EXAMPLES", 4),
        ("hard_negative_mining", "NEGATIVES_PER_POSITIVE", 1.0),
        ("random_sampling", "NEGATIVES_PER_POSITIVE", 1.0),
        ("fixed_weights", "NEGATIVE_WEIGHT", 0.1),
        ("fixed_weights", "POSITIVE_WEIGHT", 2.0),
        ("ghm", "BINS", 3),
    ],
)
def test_parameters_from_yaml_change_the_loss(name, key, value):
    batch = make_batch(build(name))
    assert build(name)(batch).item() != build(name, **{key: value})(batch).item()


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_of_nan_logits_is_nan(name):
    # The trainer looks at the losses: none may hide what happened, or fail before it is seen.
    loss = build(name)
    batch = make_batch(loss)
    assert loss(batch._replace(logits=[x * float("nan") for x in batch.logits])).isnan()


def test_ghm_r_from_yaml():
    cfg = make_cfg(
        MODEL__RETINANET__BBOX_REG_LOSS_TYPE="ghm_r",
        MODEL__FOCAL__GHM_R__MU=0.5,
        MODEL__FOCAL__GHM_R__BINS=7,
        MODEL__FOCAL__GHM_R__MOMENTUM=0.0,
    )
    model = build_model(cfg)
    losses, _ = losses_and_gradients(model, [make_image(5, K)])
    assert losses["loss_box_reg"].isfinite()
    assert (model.box_loss.ghm_mu, model.box_loss.ghm_momentum) == (0.5, 0.0)
    assert model.state_dict()["box_loss.histogram"].shape == (7,)
    assert model.box_loss.histogram.sum() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if LOSSES[name].has_fused])
def test_one_pass_and_reference_agree(name):
    results = []
    batch = make_batch(build(name))
    for implementation in ("fused", "reference"):
        loss = build(name, implementation=implementation)
        assert loss.use_fused(batch) == (implementation == "fused")
        value = loss(batch)
        results.append([value, *torch.autograd.grad(value, batch.logits)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_implementation_from_yaml():
    batch = make_batch(build("focal"))
    for implementation, fused in (("reference", False), ("auto", True), ("fused", True)):
        model = build_model(make_cfg(MODEL__FOCAL__LOSS__IMPLEMENTATION=implementation))
        assert model.cls_loss.use_fused(batch) == fused


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_alpha_as_a_list(implementation):
    batch = make_batch(build("focal"))
    one, many = build("focal", ALPHA=0.3), build("focal", ALPHA=[0.3] * K, implementation=implementation)
    torch.testing.assert_close(one(batch), many(batch))


@pytest.mark.parametrize(
    "name, implementation, message",
    [
        (
            "ohem",
            "fused",
            "ohem has no such implementation; these have one: balanced_ce, ce, fixed_weights, focal, ",
        ),
        ("focal", "quick", 'IMPLEMENTATION is "quick"; legal values: auto, reference, fused'),
    ],
)
def test_an_implementation_that_is_not_there_is_named(name, implementation, message):
    with pytest.raises(UserError, match=message):
        build(name, implementation=implementation)


def test_gather_deltas_reads_what_a_permuted_copy_holds():
    batch = make_batch(build("focal"))
    copied = torch.cat(
        [x.unflatten(1, (A, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in batch.deltas], dim=1
    )
    image, anchor = torch.randint(0, 2, (50,)), torch.randint(0, copied.shape[1], (50,))
    assert torch.equal(gather_deltas(batch.deltas, image, anchor), copied[image, anchor])
    assert gather_deltas(batch.deltas, image[:0], anchor[:0]).shape == (0, 4)
