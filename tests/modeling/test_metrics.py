from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from focal_d2.modeling import metrics
from focal_d2.modeling.losses import ClassificationLoss
from focal_d2.modeling.metrics import PERIOD, measure
from focal_d2.ops import IGNORE_LABEL
from tests.conftest import make_cfg
from tests.modeling.losses.test_losses import NAMES, A, K, build, make_batch
from tests.modeling.losses.test_waits import on_gpu
from tests.modeling.test_retinanet import make_image
from tests.processes import run_in_processes
from tests.waits import PretendedGPU

LEVELS = ("P3", "P4")


def batch_of(loss: ClassificationLoss, labels: dict[tuple[int, int], int], logits: dict, images: int = 1):
    """Background of p = 0.01 but for some (image, anchor) labels and (image, anchor, class) probabilities."""
    given = torch.full((images, 4 * 5 * A + 2 * 3 * A), K)
    for place, label in labels.items():
        given[place] = label
    batch = make_batch(loss, images, given)
    flat = torch.full((images, given.shape[1], K), math.log(0.01 / 0.99))
    for place, p in logits.items():
        flat[place] = math.log(p / (1 - p))
    first, second = flat.split([4 * 5 * A, 2 * 3 * A], dim=1)
    shaped = [x.view(images, h, w, A * K).permute(0, 3, 1, 2) for x, h, w in ((first, 4, 5), (second, 2, 3))]
    return batch._replace(logits=shaped)


def test_measure_counts_easy_and_hard_by_hand():
    loss = build("ce")
    # Three positives: p_t 0.95 (easy), 0.7 (neither), 0.2 (hard); one ignored; a negative with p 0.8 (hard).
    batch = batch_of(
        loss,
        {(0, 0): 1, (0, 1): 1, (0, 40): 2, (0, 3): IGNORE_LABEL},
        {(0, 0, 1): 0.95, (0, 1, 1): 0.7, (0, 40, 2): 0.2, (0, 5, 0): 0.8, (0, 3, 0): 0.6},
    )
    figures = measure(loss, batch, loss(batch) / 2, levels=LEVELS)
    pairs = 52 * K - K - 3  # 52 anchors but for the ignored one's and the positives'
    assert figures["num_ignored_anchors"] == 1
    assert figures["examples/positive_easy"] == pytest.approx(1 / 3)
    assert figures["examples/positive_hard"] == pytest.approx(1 / 3)
    assert figures["examples/negative_easy"] == pytest.approx((pairs - 1) / pairs)
    assert figures["examples/negative_hard"] == pytest.approx(1 / pairs)
    positive = [-math.log(x) for x in (0.95, 0.7, 0.2)]
    negative = [-math.log(0.2), *[-math.log(0.99)] * (pairs - 1)]
    assert figures["weight/positive_hard"] == pytest.approx(positive[2] / sum(positive), rel=1e-5)
    assert figures["weight/negative_hard"] == pytest.approx(negative[0] / sum(negative), rel=1e-5)
    assert figures["weight/positive"] == pytest.approx(sum(positive) / sum(positive + negative), rel=1e-5)
    # The third positive stands on the second level, with its 12 anchors.
    second = (positive[2] + 35 * -math.log(0.99)) / 2
    assert figures["level/P4"] == pytest.approx(second, rel=1e-5)
    assert figures["level/P3"] == pytest.approx(sum(positive + negative) / 2 - second, rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_example_losses_add_up_to_the_loss(name):
    loss = build(name)
    batch = make_batch(loss)
    value = loss(batch).item()
    buffers = {k: v.clone() for k, v in loss.named_buffers()}
    images = list(batch.in_parts(pairs=1))
    sums = [[x.sum().item() for x in loss.example_losses(image)] for image in images]
    # FixedWeights' parts lack what its weights add up to.
    assert sum(map(sum, sums)) * getattr(loss, "total", 1) == pytest.approx(value, rel=1e-5)
    shapes = [x.shape for x in loss.example_losses(images[0])]
    assert shapes == [x.shape for x in loss.correctness(images[0])]
    assert all(torch.equal(v, buffers[k]) for k, v in loss.named_buffers())
    figures = measure(loss, batch, torch.tensor(3.0), levels=LEVELS)
    assert figures["level/P3"] + figures["level/P4"] == pytest.approx(3.0)
    assert figures["level/P3"] / 3 == pytest.approx(
        sum(first for first, _ in sums) / sum(map(sum, sums)), rel=1e-5
    )


def test_correctness_is_what_the_losses_call_p_t():
    batch = make_batch(build("ce"))
    p_t = torch.cat(list(build("ce").correctness(batch)), 1)
    counts = (batch.labels >= 0).unsqueeze(-1)
    expected = torch.cat(list(build("ce").example_losses(batch)), 1)
    torch.testing.assert_close(-p_t.log() * counts, expected)
    softmax = build("softmax_ce")
    batch = make_batch(softmax)
    p_t = torch.cat(list(softmax.correctness(batch)), 1)
    expected = torch.cat(list(softmax.example_losses(batch)), 1)
    torch.testing.assert_close(-p_t.log() * (batch.labels >= 0).unsqueeze(-1), expected)


def test_correctness_compares_with_quality_where_that_is_the_target():
    loss = build("quality_focal")
    batch = make_batch(loss)
    p_t = torch.cat(list(loss.correctness(batch)), 1)[batch.image, batch.anchor]
    own = batch.labels[batch.image, batch.anchor]
    p = batch.all_logits().sigmoid()[batch.image, batch.anchor, own]
    y = batch.quality()[batch.image, batch.anchor]
    torch.testing.assert_close(p_t[torch.arange(len(own)), own], 1 - (y - p).abs())


def test_negatives_that_weigh_nothing_have_no_share():
    loss = build("fixed_weights", NEGATIVE_WEIGHT=0.0)
    batch = make_batch(loss)
    figures = measure(loss, batch, loss(batch).detach(), levels=LEVELS)
    assert figures["weight/positive"] == 1
    assert math.isnan(figures["weight/negative_hard"])


@pytest.mark.parametrize("images, label", [(0, K), (1, IGNORE_LABEL), (1, K)])
def test_measure_leaves_undefined_what_is_not_there(images, label):
    loss = build("focal")
    batch = make_batch(loss, images, torch.full((images, 52), label))
    figures = measure(loss, batch, loss(batch), levels=LEVELS)
    assert math.isnan(figures["examples/positive_easy"])
    assert math.isnan(figures["weight/positive"]) == (label == IGNORE_LABEL or images == 0)
    assert math.isfinite(figures["level/P3"])


def test_a_loss_that_knows_no_examples_has_shares_but_no_levels():
    class Own(ClassificationLoss):
        def forward(self, batch):
            return batch.all_logits().sum()

    loss = Own(num_classes=K)
    figures = measure(loss, make_batch(loss), torch.tensor(1.0), levels=LEVELS)
    assert {k for k, v in figures.items() if math.isnan(v)} == {
        "level/P3",
        "level/P4",
        "weight/positive",
        "weight/positive_hard",
        "weight/negative_hard",
    }


@pytest.mark.parametrize("name", ["focal", "ghm", "ohem"])
def test_figures_come_when_writers_look_and_change_nothing(name):
    model = build_model(make_cfg(MODEL__FOCAL__LOSS__NAME=name))
    start = {k: v.clone() for k, v in model.state_dict().items()}
    inputs = [make_image(4, K, (64, 64)), make_image(0, K, (64, 64))]
    outcomes = []
    for iteration in (PERIOD - 2, PERIOD - 1):
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(3)
        with EventStorage(iteration) as storage:
            losses = model(inputs)
        sum(losses.values()).backward()
        outcomes.append(
            [
                *losses.values(),
                *(p.grad for p in model.parameters() if p.grad is not None),
                *model.state_dict().values(),
                torch.get_rng_state(),
            ]
        )
        names = set(storage.latest()) - {"num_pos_anchors"}
        if iteration == PERIOD - 2:
            assert not names
    assert {"level/P3", "level/P7", "examples/negative_easy", "num_ignored_anchors"} <= names
    levels = [v for k, (v, _) in storage.latest().items() if k.startswith("level/")]
    assert sum(levels) == pytest.approx(losses["loss_cls"].item())
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def _measure_in_process(folder: Path) -> None:
    torch.manual_seed(comm.get_rank())
    loss = build("focal")
    batch = make_batch(loss)
    own = loss(batch).detach()
    figures = measure(loss, batch, own, levels=LEVELS)
    positives = len(batch.image)
    outcome = {"figures": figures, "loss": own.item(), "positives": positives}
    (folder / f"{comm.get_rank()}.json").write_text(json.dumps(outcome))


def test_processes_share_their_figures(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run_in_processes(_measure_in_process, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["figures"] == second["figures"]
    assert first["loss"] != second["loss"]
    levels = sum(first["figures"][f"level/{name}"] for name in LEVELS)
    assert levels == pytest.approx((first["loss"] + second["loss"]) / 2)
    positives = first["positives"] + second["positives"]
    hard = first["figures"]["examples/positive_hard"] * positives
    assert hard == pytest.approx(round(hard))


@pytest.mark.parametrize("most_pairs, operations", [(metrics._MOST_PAIRS, 200), (1, 2700)])
def test_metrics_wait_for_the_gpu_twice_however_many_images(monkeypatch, most_pairs, operations):
    monkeypatch.setattr(metrics, "_MOST_PAIRS", most_pairs)
    loss = build("focal")
    batch = make_batch(loss, 16)
    expected = measure(loss, batch, torch.tensor(2.0), levels=LEVELS)
    with PretendedGPU() as gpu:
        batch, value = on_gpu(batch), torch.tensor(2.0, device="cuda")
        gpu.clear()
        figures = measure(loss, batch, value, levels=LEVELS)
    assert len(gpu.waits) == 2  # the positives of each image, and the metrics
    assert sum(gpu.operations.values()) < operations
    assert figures == expected
