from __future__ import annotations

import socket
import sys

import pytest
import torch
import yaml
from detectron2.modeling import build_model

from tests.conftest import make_cfg
from tests.engine.runs import run_command

pytest.importorskip("uvicorn")


@pytest.fixture
def config(tmp_path):
    cfg = make_cfg(MODEL__WEIGHTS=str(tmp_path / "model.pth"))
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(cfg.dump())))
    return tmp_path / "config.yaml"


def test_a_port_in_use_is_one_line(config, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert run_command(monkeypatch, "serve", "--config-file", config, "--port", port) == 2
    assert f"cannot listen on --host 127.0.0.1 --port {port}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "given, message",
    [
        (["--host", "192.0.2.1"], "cannot listen on --host 192.0.2.1 --port 8000"),
        (["--port", 99999], "cannot listen on --host 127.0.0.1 --port 99999"),
        (["--megabytes", 0], "--megabytes and --megapixels must be above 0"),
        (["--megapixels", "nan"], "--megabytes and --megapixels must be above 0"),
    ],
)
def test_values_that_cannot_be_are_named(config, monkeypatch, capsys, given, message):
    assert run_command(monkeypatch, "serve", "--config-file", config, *given) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert message in line


def test_without_fastapi_a_line_says_what_to_install(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_command(monkeypatch, "serve", "--config-file", config) == 2
    assert "pip install 'focal_d2[serve]'" in capsys.readouterr().err
