from __future__ import annotations

import yaml

from focal_d2.engine import load_config
from focal_d2.storage.configs import find_config, packaged_config, packaged_configs
from tests.conftest import REPOSITORY

NAME = "focal_retinanet_R_50_FPN_1x.yaml"
CPU = ["MODEL.DEVICE", "cpu"]


def test_packaged_configs_are_all_of_the_repository():
    folder = REPOSITORY / "configs"
    assert packaged_configs() == sorted(str(p.relative_to(folder)) for p in folder.rglob("*.yaml"))


def test_find_config_prefers_the_file_at_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(NAME) == find_config(f"configs/{NAME}") == packaged_config(NAME)
    (tmp_path / NAME).touch()
    assert find_config(NAME) == NAME
    assert find_config("nowhere.yaml") == "nowhere.yaml"
    assert packaged_config("../setup.cfg") is None


def test_a_packaged_config_loads_by_name_and_as_a_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = load_config(str(REPOSITORY / "configs" / NAME), CPU)
    assert load_config(NAME, CPU) == by_path
    child = tmp_path / "deep" / "mine.yaml"
    child.parent.mkdir()
    for base in (NAME, f"configs/{NAME}"):
        child.write_text(yaml.safe_dump({"_BASE_": base, "SEED": 7}))
        cfg = load_config(str(child), CPU).clone()
        assert cfg.SEED == 7
        cfg.defrost()
        cfg.SEED = by_path.SEED
        assert cfg == by_path


def test_a_base_is_not_looked_for_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.yaml").write_text(f"_BASE_: {NAME}")
    (tmp_path / NAME).write_text("SEED: 5")
    monkeypatch.chdir(tmp_path)
    assert load_config("deep/mine.yaml", CPU).SEED != 5
