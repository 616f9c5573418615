"""FocalRetinaNet in detectron2's own hands: its loaders, trainers, evaluator and predictor."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import AMPTrainer, DefaultPredictor, SimpleTrainer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from tests.conftest import make_cfg
from tests.modeling.test_retinanet import make_pair


@pytest.fixture
def squares(coco_dataset):
    data = coco_dataset(images=4, size=96)
    register_coco_instances(data.name, {}, str(data.annotations), str(data.images))
    return data


def overrides(data, tmp_path):
    return {
        "DATASETS__TRAIN": (data.name,),
        "DATASETS__TEST": (data.name,),
        "MODEL__RETINANET__SCORE_THRESH_TEST": 0.01,
        "SOLVER__BASE_LR": 0.004,
        "OUTPUT_DIR": str(tmp_path),
    }


def train(cfg, model, kind=SimpleTrainer, steps=3):
    """Train on detectron2's loader; return the total loss of every step."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 - detectron2's sampler and augmentations draw from the global generator
    loader = build_detection_train_loader(cfg)
    trainer = kind(model, loader, build_optimizer(cfg, model))
    losses = []
    with EventStorage() as trainer.storage:
        for trainer.iter in range(steps):
            trainer.run_step()
            losses.append(trainer.storage.latest()["total_loss"][0])
    return losses


def test_simple_trainer_trains_ours_as_it_trains_detectron2s(squares, tmp_path):
    settings = overrides(squares, tmp_path)
    cfg = make_cfg(**settings)
    ours, theirs = make_pair(**settings)
    our_losses, their_losses = (train(cfg, x) for x in (ours, theirs))
    assert our_losses == pytest.approx(their_losses, rel=1e-3)
    weights = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-2, atol=1e-3)


def test_coco_evaluator_gives_ours_the_ap_of_detectron2s(squares, tmp_path):
    settings = {**overrides(squares, tmp_path), "SOLVER__BASE_LR": 0.03, "MODEL__FPN__NORM": "GN"}
    cfg = make_cfg(**settings)
    pair = make_pair(**settings)
    train(cfg, pair[0], steps=40)
    pair[1].load_state_dict(pair[0].state_dict(), strict=False)
    results = []
    for model in pair:
        evaluator = COCOEvaluator(squares.name, output_dir=str(tmp_path))
        loader = build_detection_test_loader(cfg, squares.name)
        results.append(inference_on_dataset(model, loader, evaluator)["bbox"])
    assert results[0]["AP50"] > 1
    assert results[0] == pytest.approx(results[1], abs=0.1, nan_ok=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="AMPTrainer goes on where there is a GPU")
def test_amp_trainer_needs_a_gpu(squares, tmp_path):
    cfg = make_cfg(**overrides(squares, tmp_path))
    with pytest.raises(AssertionError, match="CUDA is required"):
        train(cfg, build_model(cfg), AMPTrainer)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_amp_trainer_trains(squares, tmp_path):
    cfg = make_cfg(**{**overrides(squares, tmp_path), "MODEL__DEVICE": "cuda"})
    losses = train(cfg, build_model(cfg), AMPTrainer, steps=20)
    assert losses[-1] < losses[0]


def test_amp_trainers_step_without_a_gpu(squares, tmp_path, monkeypatch):
    """All of AMPTrainer's step but what CUDA alone does: scaler and autocast are there, and switched off."""
    cfg = make_cfg(**overrides(squares, tmp_path))
    model = build_model(cfg)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    expected = train(cfg, model)
    model.load_state_dict(state)
    scaler = torch.amp.GradScaler("cuda", enabled=False)

    class Trainer(AMPTrainer):
        def __init__(self, *args):
            super().__init__(*args, grad_scaler=scaler)

        def run_step(self):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_available", lambda: True)
                patch.setattr(torch.cuda.amp, "autocast", lambda dtype: torch.autocast("cpu", enabled=False))
                super().run_step()

    assert train(cfg, model, Trainer) == pytest.approx(expected, rel=1e-5)


def test_default_predictor_gives_the_models_detections(squares, tmp_path):
    settings = overrides(squares, tmp_path)
    ours, _ = make_pair(**settings)
    DetectionCheckpointer(ours, str(tmp_path)).save("model")
    cfg = make_cfg(**{**settings, "MODEL__WEIGHTS": str(tmp_path / "model.pth"), "INPUT__MIN_SIZE_TEST": 128})
    item = next(iter(build_detection_test_loader(cfg, squares.name)))
    actual = DefaultPredictor(cfg)(cv2.imread(item[0]["file_name"]))["instances"]
    with torch.no_grad():
        expected = ours.eval()(item)[0]["instances"]
    assert len(actual) == len(expected) > 10
    torch.testing.assert_close(actual.scores, expected.scores)
    torch.testing.assert_close(actual.pred_boxes.tensor, expected.pred_boxes.tensor)
