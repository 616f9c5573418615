from __future__ import annotations

import pickle

import pytest
import torch

from focal_d2.engine import load_config
from tests.engine.runs import run_command
from tests.storage.test_torchvision_weights import make_retinanet, narrow_resnet


@pytest.fixture
def half_a_retinanet(tmp_path):
    """A file of a RetinaNet, in half precision to be small."""
    path = tmp_path / "retinanet.pth"
    torch.save({"model": make_retinanet(1).half().state_dict(), "epoch": 3}, path)
    return path


def test_convert_writes_weights_and_the_config_that_fits_them(half_a_retinanet, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "out"
    command = ["convert", half_a_retinanet, "--output", folder, "--classes", "1,2,3,4"]
    assert run_command(monkeypatch, *command) == 0
    assert f"config in {folder / 'config.yaml'}" in capfd.readouterr().out
    cfg = load_config(str(folder / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    assert str(folder / "weights.pth") == cfg.MODEL.WEIGHTS
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 4
    assert (folder / "config.yaml").read_text().startswith("# Weights of torchvision, converted from ret")
    assert run_command(monkeypatch, *command) == 2
    assert "weights.pth exists; choose another --output" in capfd.readouterr().err


@pytest.mark.parametrize(
    "content, options, words",
    [
        (None, [], "cannot read"),
        (b"", [], "cannot read"),
        (pickle.dumps(print), [], "print"),
        ("list", [], "has a list, not a dictionary of weights"),
        ("resnet", ["--classes", "coco"], "no detector's head"),
        ("resnet", ["--classes", "tree"], "--classes is tree; it must be all, coco, or labels such as 1,2,3"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, monkeypatch, capfd, content, options, words):
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    elif content == "resnet":
        torch.save(narrow_resnet().half().state_dict(), path)
    assert run_command(monkeypatch, "convert", path, "--output", tmp_path / "out", *options) == 2
    error = capfd.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
