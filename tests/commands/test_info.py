from __future__ import annotations

import json

import detectron2
import torch

from focal_d2.commands import info
from focal_d2.hardware import Gpu
from focal_d2.modeling.precision import bfloat16_support
from tests.engine.runs import run_command


def facts(monkeypatch, capsys) -> dict:
    assert run_command(monkeypatch, "info", "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_versions_are_those_that_python_imports(monkeypatch, capsys):
    packages = facts(monkeypatch, capsys)["packages"]
    assert packages["torch"] == torch.__version__.split("+")[0]
    assert packages["detectron2"] == detectron2.__version__
    assert packages["hotcoco"]


def test_a_package_that_is_not_here_is_named(monkeypatch, capsys):
    monkeypatch.setattr(info, "_OPTIONAL", {"nothing": "focal_d2_nothing"})
    assert facts(monkeypatch, capsys)["packages"]["nothing"] is None
    assert run_command(monkeypatch, "info") == 0
    assert "nothing         not installed" in capsys.readouterr().out


def test_auto_is_what_training_decides(monkeypatch, capsys):
    cpu = facts(monkeypatch, capsys)["cpu"]
    assert (cpu["auto"] == "bfloat16", cpu["reason"]) == bfloat16_support()


def test_gpus_are_listed_with_what_they_can_do(monkeypatch, capsys):
    gpus = [Gpu("NVIDIA H100", "81559 MiB", (9, 0), "550.1"), Gpu("Tesla T4", "15360 MiB", (7, 5), "550.1")]
    monkeypatch.setattr(info, "list_gpus", lambda: gpus)
    assert run_command(monkeypatch, "info") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("GPU")]
    assert lines[0].endswith(
        "NVIDIA H100, 81559 MiB, compute capability 9.0, driver 550.1: bfloat16 and TF32"
    )
    assert lines[1].endswith("compute capability 7.5, driver 550.1: no bfloat16")
