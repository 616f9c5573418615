"""Candidates against a plain computation of all scores."""

from __future__ import annotations

import math

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2.modeling.candidates import find_candidates
from tests.conftest import make_cfg
from tests.modeling.test_retinanet import make_pair

A = 3
SIZES = [(36, 40), (9, 7), (1, 1)]


def make_loss(name, num_classes):
    cfg = make_cfg(MODEL__FOCAL__LOSS__NAME=name, MODEL__RETINANET__NUM_CLASSES=num_classes)
    return build_model(cfg).cls_loss


def make_outputs(num_logits, *, images=2, std=0.6, dtype=torch.float32, channels_last=False):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    logits, deltas = [], []
    for height, width in SIZES:
        x = torch.randn(images, A * num_logits, height, width) * std - 4.6
        logits.append(x.to(dtype).contiguous(memory_format=layout))
        y = torch.randn(images, A * 4, height, width)
        deltas.append(y.to(dtype).contiguous(memory_format=layout))
    return logits, deltas


def all_in_order(outputs, per_anchor):
    """(N, R, per_anchor) float of all levels."""
    levels = [x.float().unflatten(1, (-1, per_anchor)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in outputs]
    return torch.cat(levels, dim=1).contiguous()


def plain_candidates(logits, loss, threshold, most):
    """Scores (N, R, K), and a mask of the candidates: level by level and image by image."""
    scores = loss.probabilities(all_in_order(logits, loss.num_logits))
    is_best = torch.zeros_like(scores, dtype=torch.bool)
    start = 0
    for x in logits:
        stop = start + A * x.shape[2] * x.shape[3]
        for image in range(len(x)):
            anchor, label = (scores[image, start:stop] > threshold).nonzero(as_tuple=True)
            values = scores[image, anchor + start, label]
            best = values.sort(descending=True, stable=True).indices[:most]
            is_best[image, anchor[best] + start, label[best]] = True
        start = stop
    return scores, is_best


def check(logits, deltas, loss, threshold, most, *, ties=False):
    found = find_candidates(logits, deltas, loss, threshold, most)
    scores, is_best = plain_candidates(logits, loss, threshold, most)
    place = (found.image, found.anchor, found.label)
    is_found = torch.zeros_like(is_best)
    is_found[place] = True
    assert len(found.score) == is_found.sum() == is_best.sum()
    torch.testing.assert_close(found.score, scores[place], rtol=1e-6, atol=0)
    if ties:
        values = (scores[is_found].sort().values, scores[is_best].sort().values)
        torch.testing.assert_close(*values, rtol=1e-6, atol=0)
    else:
        assert torch.equal(is_found, is_best)
    assert torch.equal(found.deltas, all_in_order(deltas, 4)[found.image, found.anchor])
    return found


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, num_classes", [("focal", 1), ("focal", 20), ("softmax_ce", 20)])
def test_candidates_are_the_best_of_all_scores(name, num_classes, dtype, channels_last):
    loss = make_loss(name, num_classes)
    logits, deltas = make_outputs(loss.num_logits, dtype=dtype, channels_last=channels_last)
    for threshold in (0.0, 0.001, 0.02, 0.05, 0.3, 1.0):
        for most in (1, 50, 1000):
            check(logits, deltas, loss, threshold, most, ties=dtype == torch.bfloat16)


def test_of_equal_scores_the_first_in_memory_are_kept():
    loss = make_loss("focal", 20)
    logits, deltas = make_outputs(20, std=0.0, channels_last=True)  # then memory is in the anchors' order
    assert len(check(logits, deltas, loss, 0.001, 50).score) == 2 * 3 * 50


def test_nan_is_no_candidate_and_infinity_is_one():
    loss = make_loss("focal", 20)
    logits, deltas = make_outputs(20)
    logits[0][0, 0] = math.nan
    logits[0][1, 0, :5] = math.inf
    logits[0][1, 1] = -math.inf
    for most in (50, 1000):
        found = check(logits, deltas, loss, 0.02, most, ties=True)
        assert (found.score == 1).sum() == min(most, 5 * 40)


def test_a_batch_may_be_empty():
    logits, deltas = make_outputs(20, images=0)
    found = find_candidates(logits, deltas, make_loss("focal", 20), 0.02, 50)
    assert found.score.shape == (0,)
    assert found.deltas.shape == (0, 4)


@pytest.mark.parametrize("threshold", [0.001, 0.02, 0.05, 0.3])
@pytest.mark.parametrize("num_classes", [1, 80])
def test_detections_from_noise_equal_detectron2s(num_classes, threshold):
    """One in eight logits passes 0.02, nearly all pass 0.001, as in a model's first evaluations."""
    pair = make_pair(MODEL__RETINANET__NUM_CLASSES=num_classes, MODEL__RETINANET__SCORE_THRESH_TEST=threshold)
    images = pair[0].preprocess_image(
        [{"image": torch.zeros(3, 128, 192)}, {"image": torch.zeros(3, 120, 160)}]
    )
    sizes = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    features = [torch.zeros(1, 1, *size) for size in sizes]
    logits = [torch.randn(2, 9 * num_classes, *size) * 0.6 - 4.6 for size in sizes]
    deltas = [torch.randn(2, 9 * 4, *size) * 0.2 for size in sizes]
    found = []
    for model in pair:
        copies = [[x.clone() for x in level] for level in (logits, deltas)]
        with torch.no_grad():
            found.append(model.eval().forward_inference(images, features, copies))
    for actual, expected in zip(*found, strict=True):
        assert (len(expected) > 0) == (threshold < 0.3)
        assert actual.image_size == expected.image_size
        assert torch.equal(actual.pred_classes, expected.pred_classes)
        torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
