from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.engine.checkpoint import FocalCheckpointer
from tests.conftest import make_cfg


@pytest.fixture
def model():
    return build_model(make_cfg())


def save(model_or_state, path, drop=()) -> str:
    state = getattr(model_or_state, "state_dict", lambda: model_or_state)()
    state = {k: v for k, v in state.items() if not k.startswith(tuple(drop))}
    torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("partial", [True, False])
def test_same_architecture_loads(model, tmp_path, partial):
    path = save(build_model(make_cfg()), tmp_path / "a.pth")
    FocalCheckpointer(model, partial=partial).load(path)
    saved = torch.load(path)["model"]
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("partial", [True, False])
def test_detectron2_checkpoint_loads_without_the_normaliser(model, tmp_path, partial):
    theirs = build_model(make_cfg(MODEL__META_ARCHITECTURE="RetinaNet"))
    FocalCheckpointer(model, partial=partial).load(save(theirs, tmp_path / "d2.pth"))
    assert torch.equal(model.head.cls_score.weight, theirs.head.cls_score.weight)
    assert model.loss_normalizer.ema.item() == 100


def test_backbone_alone_starts_training_but_does_not_evaluate(model, tmp_path):
    path = save(model, tmp_path / "a.pth", drop=("head.", "backbone.fpn", "backbone.top_block"))
    FocalCheckpointer(model, partial=True).load(path)
    with pytest.raises(UserError, match="lack backbone.fpn_lateral3.bias.* and .* more"):
        FocalCheckpointer(model, partial=False).load(path)


def test_other_number_of_classes_starts_training_but_does_not_evaluate(model, tmp_path):
    path = save(build_model(make_cfg(MODEL__RETINANET__NUM_CLASSES=5)), tmp_path / "a.pth")
    FocalCheckpointer(model, partial=True).load(path)
    with pytest.raises(UserError, match=r"head.cls_score.bias, \(45,\) in the file, \(27,\) in the"):
        FocalCheckpointer(model, partial=False).load(path)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("theirs, ours, match", [
    (18, 34, "lack backbone.bottom_up.res2.2.conv1"),
    (34, 18, "have backbone.bottom_up.res2.2.conv1.*, which the model has not"),
])  # fmt: skip
def test_another_depth_is_refused(tmp_path, partial, theirs, ours, match):
    path = save(build_model(make_cfg(MODEL__RESNETS__DEPTH=theirs)), tmp_path / "a.pth")
    model = build_model(make_cfg(MODEL__RESNETS__DEPTH=ours))
    with pytest.raises(UserError, match=match):
        FocalCheckpointer(model, partial=partial).load(path)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"MODEL__RETINANET__NUM_CONVS": 3}, {}),
        ({"MODEL__RETINANET__NORM": "GN", "MODEL__RETINANET__NUM_CONVS": 2}, {}),
        ({}, {"MODEL__RESNETS__NORM": "BN"}),  # running statistics are missing
        ({"MODEL__RESNETS__NORM": "BN"}, {}),
    ],
)
def test_another_head_or_norm_does_not_evaluate(tmp_path, theirs, ours):
    path = save(build_model(make_cfg(**theirs)), tmp_path / "a.pth")
    with pytest.raises(UserError, match="do not fit this model"):
        FocalCheckpointer(build_model(make_cfg(**ours)), partial=False).load(path)


def test_our_checkpoint_loads_into_detectron2s_retinanet(model, tmp_path):
    theirs = build_model(make_cfg(MODEL__META_ARCHITECTURE="RetinaNet"))
    FocalCheckpointer(theirs, partial=False).load(save(model, tmp_path / "a.pth"))
    assert torch.equal(model.head.cls_score.weight, theirs.head.cls_score.weight)


@pytest.mark.parametrize("partial", [True, False])
def test_foreign_weights_are_refused(model, tmp_path, partial):
    path = save({"layer.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth do not fit this model: they lack"):
        FocalCheckpointer(model, partial=partial).load(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", [1, 2], {"model": None}])
def test_damaged_file_is_named_in_one_line(model, tmp_path, content):
    path = tmp_path / "a.pth"
    if content == "truncated":
        save(model, path)
        content = path.read_bytes()[:10000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"cannot load weights .*a\.pth") as error:
        FocalCheckpointer(model, partial=True).load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["no/such.pth", "foo://bar.pth"])
def test_missing_file_is_named(model, path):
    with pytest.raises(UserError, match=path):
        FocalCheckpointer(model, partial=True).load(path)


def test_resuming_accepts_no_partial_fit(model, tmp_path):
    other = build_model(make_cfg(MODEL__RETINANET__NUM_CLASSES=5))
    FocalCheckpointer(other, str(tmp_path), partial=True).save("model_0000001")
    with pytest.raises(UserError, match="have another shape"):
        FocalCheckpointer(model, str(tmp_path), partial=True).resume_or_load("", resume=True)
