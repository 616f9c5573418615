from __future__ import annotations

import json
import struct

import pytest
import timm
import torch
from detectron2.modeling import build_backbone, build_model
from torch import nn

from focal_d2 import UserError
from focal_d2.engine.optimizer import build_optimizer
from focal_d2.modeling.backbones.timm_fpn import pixel_values, resolve_pixel_values
from focal_d2.storage import pretrained
from focal_d2.storage.checkpoint import FocalCheckpointer, check_file
from tests.conftest import make_cfg

NAME = "MODEL.FOCAL.TIMM.NAME is"


def make_timm_cfg(name: str, **overrides: object):
    settings = {
        "MODEL__BACKBONE__NAME": "build_focal_timm_fpn_backbone",
        "MODEL__FOCAL__TIMM__NAME": name,
        "MODEL__PIXEL_MEAN": [120.0, 120.0, 120.0],
        "MODEL__PIXEL_STD": [60.0, 60.0, 60.0],
        "INPUT__FORMAT": "RGB",
    }
    return make_cfg(**{**settings, **overrides})


@pytest.mark.parametrize("levels, first", [("p3-p7", 3), ("p2-p6", 2)])
@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout"])  # the second one's features are NHWC
def test_backbone_levels(name, levels, first):
    backbone = build_backbone(make_timm_cfg(name, MODEL__FOCAL__FPN__LEVELS=levels))
    with torch.no_grad():
        features = backbone(torch.randn(1, 3, 64, 128))
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        f"p{i}": (32, 2**i) for i in range(first, first + 5)
    }
    assert {n: tuple(x.shape) for n, x in features.items()} == {
        f"p{i}": (1, 32, -(-64 // 2**i), 128 // 2**i) for i in range(first, first + 5)
    }


def test_outputs_are_timms_features():
    backbone = build_backbone(make_timm_cfg("test_mambaout")).eval()
    net = timm.create_model("test_mambaout", features_only=True).eval()
    net.load_state_dict(backbone.bottom_up.net.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = net(image)[1:]
        outputs = backbone.bottom_up(image)
    for (name, x), y in zip(outputs.items(), expected, strict=True):
        torch.testing.assert_close(x, y.permute(0, 3, 1, 2))
        assert backbone.bottom_up.output_shape()[name].channels == x.shape[1]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"name": ""}, f'{NAME} ""; timm has no such model'),
        ({"name": "resnet81"}, f'{NAME} "resnet81"; timm has no such model; did you mean resnet'),
        ({"name": "hf-hub:timm/resnet18"}, "timm has no such model"),
        ({"name": "resnet18.mine"}, f"{NAME} resnet18.mine; legal values: resnet18, resnet18.a1_in1k"),
        ({"name": "test_vit"}, f"{NAME} test_vit, whose features have strides 16, not 8, 32"),
        ({"name": "test_maxvit"}, f"{NAME} test_maxvit, which takes images of 160 × 160 only"),
        ({"name": "test_resnet", "INPUT__FORMAT": "BGR"}, "INPUT.FORMAT is BGR; networks of timm take RGB"),
        (
            {"name": "test_resnet", "MODEL__PIXEL_STD": [1.0, 1.0, 1.0]},
            r"test_resnet needs \[127.5, 127.5, 127.5\] and \[127.5, 127.5, 127.5\]",
        ),
        (
            {"name": "test_resnet", "MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675]},
            r"PIXEL_MEAN is \[103.53, 116.28, 123.675\] and .* least one is of detectron2's ResNets",
        ),
        ({"name": "test_resnet", "MODEL__FOCAL__TIMM__BATCH_NORM": "BN"}, "legal values: frozen, trained"),
        ({"name": "test_resnet", "MODEL__FOCAL__FPN__LEVELS": "p2"}, "legal values: p3-p7, p2-p6"),
    ],
)
def test_what_does_not_fit_is_one_line(settings, words):
    with pytest.raises(UserError, match=words) as caught:
        build_backbone(make_timm_cfg(**settings))
    assert "\n" not in str(caught.value)


def test_features_of_other_sizes_than_their_strides_say_are_one_line():
    backbone = build_backbone(make_timm_cfg("mobilevitv2_050"))  # it resizes C5 to whole patches
    with pytest.raises(UserError, match="features of stride 32 have 4 × 2 cells in images of 96 × 64 pixels"):
        backbone(torch.randn(1, 3, 96, 64))


def test_without_timm_a_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="build_focal_timm_fpn_backbone needs timm .*: pip install timm"):
        build_backbone(make_timm_cfg("test_resnet"))


def test_pixel_values_are_timms_unless_they_are_set():
    assert pixel_values("resnet18.a1_in1k") == ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
    for inherited in ([1.0, 1.0, 1.0], [57.375, 57.12, 58.395]):
        cfg = make_timm_cfg(
            "tf_efficientnet_lite0", MODEL__PIXEL_MEAN=[103.53, 116.28, 123.675], MODEL__PIXEL_STD=inherited
        )
        resolve_pixel_values(cfg)
        assert cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_STD == [127.5] * 3
    for cfg in (make_timm_cfg("test_resnet"), make_cfg()):
        before = cfg.clone()
        resolve_pixel_values(cfg)
        assert cfg == before


def modes(backbone: nn.Module) -> dict[str, bool]:
    return {
        name: module.training
        for name, module in backbone.bottom_up.net.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }


@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_batch_norms_are_frozen_or_trained(batch_norm):
    cfg = make_timm_cfg("test_resnet", MODEL__FOCAL__TIMM__BATCH_NORM=batch_norm)
    backbone = build_backbone(cfg).train()
    norm, is_trained = backbone.bottom_up.net.bn1, batch_norm == "trained"
    assert set(modes(backbone).values()) == {is_trained}
    before = norm.running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))["p3"].sum().backward()
    assert (not torch.equal(norm.running_mean, before)) == is_trained
    assert (norm.weight.grad is not None) == is_trained
    assert backbone.bottom_up.net.conv1[0].weight.grad is not None
    assert not any(modes(backbone.eval()).values())


@pytest.mark.parametrize(
    "name, freeze_at, trained",
    [
        ("test_resnet", 0, ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]),
        ("test_resnet", 1, ["layer1", "layer2", "layer3", "layer4"]),
        ("test_resnet", 4, ["layer4"]),
        ("test_convnext", 1, ["stem_0", "stem_1", "stages_0", "stages_1", "stages_2", "stages_3"]),
        ("test_convnext", 2, ["stages_1", "stages_2", "stages_3"]),
        ("test_convnext", 5, []),
    ],
)
def test_freeze_at_counts_stages_by_their_strides(name, freeze_at, trained):
    cfg = make_timm_cfg(name, MODEL__BACKBONE__FREEZE_AT=freeze_at, MODEL__FOCAL__TIMM__BATCH_NORM="trained")
    backbone = build_backbone(cfg).train()
    net = backbone.bottom_up.net
    parts = {n.split(".")[0] for n, p in net.named_parameters() if p.requires_grad}
    assert [n for n, _ in net.named_children() if n in parts] == trained
    # The batch norms of frozen stages keep their statistics.
    assert {n.split(".")[0] for n, training in modes(backbone).items() if training} <= parts


def test_freeze_at_needs_stages_that_timm_names():
    words = "hrnet_w18_small, whose stages are not known: MODEL.BACKBONE.FREEZE_AT must be 0"
    with torch.device("meta"), pytest.raises(UserError, match=words):
        build_backbone(make_timm_cfg("hrnet_w18_small", MODEL__BACKBONE__FREEZE_AT=2))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_layer_decay_lowers_learning_rates_towards_the_image(optimizer):
    cfg = make_timm_cfg(
        "test_resnet",
        SOLVER__FOCAL__OPTIMIZER=optimizer,
        SOLVER__FOCAL__LAYER_DECAY=0.5,
        SOLVER__BASE_LR=0.64,
    )
    model = build_model(cfg)
    names = {p: n for n, p in model.named_parameters()}
    built = build_optimizer(cfg, model)
    rates = {names[p]: group["lr"] for group in built.param_groups for p in group["params"]}
    net = "backbone.bottom_up.net."
    expected = {"conv1.0": 0.02, "layer1.0.conv1": 0.04, "layer2.0.conv1": 0.08, "layer4.0.conv1": 0.32}
    for name, rate in expected.items():
        assert rates[f"{net}{name}.weight"] == pytest.approx(rate)
    assert {rate for name, rate in rates.items() if not name.startswith(net)} == {0.64}
    assert type(built).__name__.startswith(optimizer)


def weights_file(path, name, *, skip="no part", again="no part") -> str:
    """Write random weights of a model in the safetensors format, as timm's hub has them.

    One part of the model may be left out, and one may be followed by a second of the same shapes.
    """
    torch.manual_seed(3)
    whole = timm.create_model(name).state_dict()
    whole |= {n.replace(".0.", ".1.", 1): x for n, x in whole.items() if n.startswith(again)}
    tensors = {n: torch.rand_like(x) if x.is_floating_point() else x for n, x in whole.items()}
    kinds, data, header = {torch.float32: "F32", torch.int64: "I64"}, b"", {}
    for name, x in tensors.items():
        if not name.startswith(skip):
            blob = x.numpy().tobytes()
            where = [len(data), len(data) + len(blob)]
            header[name] = {"dtype": kinds[x.dtype], "shape": list(x.shape), "data_offsets": where}
            data += blob
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("ending", ["safetensors", "pth", "pth.tar"])
def test_a_file_of_timm_fills_the_network(tmp_path, name, ending):
    path = weights_file(tmp_path / "weights.safetensors", name)
    whole = timm.create_model(name, checkpoint_path=path).eval()
    if ending != "safetensors":
        path = str(tmp_path / f"weights.{ending}")
        state = whole.state_dict()
        torch.save(state if ending == "pth" else {"state_dict": state, "epoch": 3}, path)
    model = build_model(make_timm_cfg(name)).eval()
    FocalCheckpointer(model, partial=True).load(path)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = whole.forward_intermediates(image, indices=1, intermediates_only=True)
        torch.testing.assert_close(model.backbone.bottom_up(image)["res5"], expected)


@pytest.mark.parametrize(
    "weights, parts, words",
    [
        ("test_resnet", {"skip": "layer3.0."}, "they lack backbone.bottom_up.net.layer3.0."),
        ("test_resnet", {"again": "layer1.0."}, "they have backbone.bottom_up.net.layer1.1."),
        ("test_efficientnet", {}, "they lack backbone.bottom_up.net"),
    ],
)
def test_a_file_of_another_network_is_refused(tmp_path, weights, parts, words):
    path = weights_file(tmp_path / "weights.safetensors", weights, **parts)
    with pytest.raises(UserError, match=f"weights.safetensors do not fit this model: .*{words}"):
        FocalCheckpointer(build_model(make_timm_cfg("test_resnet")), partial=True).load(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, struct.pack("<Q", 2) + b"[]"])
def test_a_damaged_safetensors_file_is_one_line(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot load weights .*weights.safetensors"):
        FocalCheckpointer(build_model(make_timm_cfg("test_resnet")), partial=True).load(str(path))


def test_weights_of_timms_hub_are_downloaded_by_its_library(tmp_path, monkeypatch):
    path = weights_file(tmp_path / "model.safetensors", "test_resnet")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: asked.append(args) or path)
    model = build_model(make_timm_cfg("test_resnet"))
    FocalCheckpointer(model, partial=True).load("timm://test_resnet.r160_in1k")
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
    expected = timm.create_model("test_resnet", checkpoint_path=path).conv1[0].weight
    assert torch.equal(model.backbone.bottom_up.net.conv1[0].weight, expected)


def test_a_hub_that_is_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    words = "timm://resnet18: model.safetensors of timm/resnet18.a1_in1k can't be fetched"
    with pytest.raises(UserError, match=words) as caught:
        pretrained.fetch_pretrained("timm://resnet18")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["resnet18.a1_in2k", "", "../resnet18", "hf-hub:somebody/model"])
def test_only_weights_that_timm_knows_have_an_address(name):
    with pytest.raises(UserError, match=f"timm://{name}: timm has no pretrained weights of that name"):
        check_file(f"timm://{name}")
