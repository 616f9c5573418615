from __future__ import annotations

from pathlib import Path

from focal_d2.storage.configs import packaged_configs
from tests.engine.runs import run_command


def test_configs_are_listed_with_what_they_are(monkeypatch, capsys):
    assert run_command(monkeypatch, "configs") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == packaged_configs()
    assert next(x for x in lines if "R_50_FPN_1x" in x).endswith("  RetinaNet, ResNet-50, 1x schedule.")


def test_folder_is_where_they_are(monkeypatch, capsys):
    assert run_command(monkeypatch, "configs", "--folder") == 0
    assert (Path(capsys.readouterr().out.strip()) / "Base-FocalRetinaNet.yaml").is_file()
