from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from focal_d2.data.pixels import from_array
from focal_d2.engine import FocalTrainer, load_config
from focal_d2.engine.hooks.pictures import TrainingPictures, draw_example
from focal_d2.inference.draw import COLOURS, TRUTH
from tests.conftest import make_cfg


def train(config, out, *overrides):
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    trainer = FocalTrainer(load_config(str(config), ["OUTPUT_DIR", str(out), *overrides]))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer


def test_training_is_the_same_bit_by_bit_with_figures_and_pictures(job, tmp_path, monkeypatch):
    config, _ = job
    options = ("SOLVER.MAX_ITER", "22", "SOLVER.CHECKPOINT_PERIOD", "100")
    watched = train(config, tmp_path / "watched", *options, "VIS_PERIOD", "3")
    numpy_state, torch_state = np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
    monkeypatch.setattr("focal_d2.modeling.retinanet.put_metrics", lambda *args, **kwargs: None)
    plain = train(config, tmp_path / "plain", *options)
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(torch_state, torch.get_rng_state())
    ours, theirs = watched.model.state_dict(), plain.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())

    lines = [json.loads(x) for x in (tmp_path / "watched/metrics.json").read_text().splitlines()]
    (line,) = (x for x in lines if x["iteration"] == 19)
    names = {f"level/P{n}" for n in range(3, 8)} | {"lr", "num_pos_anchors", "num_ignored_anchors"}
    assert names | {"loss_cls", "examples/positive_hard", "weight/negative_hard"} <= line.keys()
    events = EventAccumulator(str(tmp_path / "watched"), size_guidance={"images": 0}).Reload()
    assert names <= set(events.Tags()["scalars"])
    images = events.Images("ground_truth_and_detections")
    assert [x.step for x in images] == [2, 5, 8, 11, 14, 17, 20]
    assert "weight/" not in (tmp_path / "plain/metrics.json").read_text()


@pytest.mark.parametrize("input_format", ["BGR", "RGB", "HSV", "YCbCr", "YUV-BT.601"])
def test_draw_example_has_truth_on_the_left_and_detections_on_the_right(input_format):
    class Detector(torch.nn.Module):
        def forward(self, inputs):
            assert not self.training
            boxes = torch.tensor([[20.0, 20, 40, 30], *[[50.0, 2, 60, 8]] * 30])
            others = {"scores": torch.full((31,), 0.5), "pred_classes": torch.zeros(31, dtype=torch.long)}
            return [{"instances": Instances((40, 64), pred_boxes=Boxes(boxes), **others)}]

    pixels = from_array(np.full((40, 64, 3), [10, 20, 200], np.uint8), input_format)
    instances = Instances((40, 64), gt_boxes=Boxes(torch.tensor([[4.0, 6, 30, 36]])))
    example = {"image": torch.from_numpy(pixels.transpose(2, 0, 1).copy()), "instances": instances}
    model = Detector().train()
    picture = draw_example(model, example, input_format)
    assert model.training
    assert picture.shape == (3, 40, 64 + 8 + 64)
    # The image, red; formats of 8 bits round colours.
    assert np.abs(picture[:, 1, 1].astype(int) - [200, 20, 10]).max() <= (
        2 if input_format in "HSV YCbCr" else 0
    )
    # Lines are smoothed, so they keep a little of the image's red.
    assert np.abs(picture[:, 20, 4] - np.array(TRUTH)).max() < 40
    assert np.abs(picture[:, 20, 64 + 8 + 30] - np.array(COLOURS[0])).max() < 40
    assert np.array_equal(picture[:, 20, 64 + 8 + 4], picture[:, 1, 1])


def test_pictures_are_off_unless_asked_for_and_left_to_models_that_draw(job, tmp_path):
    (tmp_path / "out").mkdir()

    def hooks(*overrides):
        return [type(h) for h in FocalTrainer(load_config(str(job[0]), overrides))._hooks]

    assert TrainingPictures not in hooks()
    assert TrainingPictures in hooks("VIS_PERIOD", "5")
    assert TrainingPictures not in hooks("VIS_PERIOD", "5", "MODEL.META_ARCHITECTURE", "RetinaNet")


def test_an_image_without_boxes_is_drawn():
    model = build_model(make_cfg())
    example = {
        "image": torch.zeros(3, 64, 96, dtype=torch.uint8),
        "instances": Instances((64, 96), gt_boxes=Boxes(torch.zeros(0, 4))),
    }
    assert draw_example(model, example, "BGR").shape == (3, 64, 200)
