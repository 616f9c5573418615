"""Every YAML builds; every key of ours is read and does what it says."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from focal_d2 import FocalRetinaNet, add_focal_config
from focal_d2.config import leaves
from focal_d2.engine import load_config
from focal_d2.modeling.losses import LOSSES
from tests.conftest import REPOSITORY

# configs/grids has studies of configs: tests/analysis/test_grid.py.
CONFIGS = sorted(p for p in (REPOSITORY / "configs").rglob("*.yaml") if p.parent.name != "grids")
EXAMPLES = sorted((REPOSITORY / "examples").rglob("*.yaml"))


def name_of(path: Path) -> str:
    return path.stem


@pytest.mark.parametrize("path", CONFIGS + EXAMPLES, ids=name_of)
def test_yaml_is_plain_and_builds(path):
    yaml.safe_load(path.read_text())
    model = build_model(load_config(str(path), ["MODEL.DEVICE", "cpu"]))
    assert isinstance(model, FocalRetinaNet)


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_floats_are_written_as_floats(path):
    def walk(node):
        for value in node.values() if isinstance(node, dict) else node:
            if isinstance(value, (dict, list)):
                walk(value)
            elif isinstance(value, str):
                # PyYAML reads 1e-3 as a string; yacs would then guess.
                assert not re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", value, re.I), value

    walk(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", [p for p in CONFIGS if "Base" not in p.name], ids=name_of)
def test_header_has_command_hardware_time_and_ap(path):
    header = "".join(x for x in path.read_text().splitlines(True) if x.startswith("#"))
    for word in ("Command:", "Hardware", "time", "AP"):
        assert word in header
    assert str(path.relative_to(REPOSITORY)) in header


def our_keys() -> list[str]:
    plain, ours = get_cfg(), get_cfg()
    add_focal_config(ours)
    return sorted(set(leaves(ours)) - set(leaves(plain)))


@pytest.mark.parametrize("key", our_keys())
def test_every_key_has_a_reader_and_a_test(key):
    name = key.split(".")[-1]
    tests = [p.read_text() for p in (REPOSITORY / "tests").rglob("test_*.py") if p != Path(__file__)]
    if key.startswith("MODEL.FOCAL.LOSS.") and name not in ("NAME", "NORMALIZER", "IMPLEMENTATION"):
        # Parameters of the losses: constructors read them.
        assert any(name.lower() in inspect.signature(x.__init__).parameters for x in LOSSES.values())
        assert any(re.search(rf"\b{name}\b", text) for text in tests)
        return
    section, _, rest = key.removeprefix("MODEL.").partition("FOCAL")
    # As the code spells it: focal.AMP.ENABLED, focal_config(cfg).FPN.INIT, inputs.CONTRAST, DATASETS.FOCAL.
    readers = {
        "": rf"\bfocal(_config\(cfg\))?{re.escape(rest)}\b",
        "INPUT.": rf"\binputs{re.escape(rest)}\b",
        "DATASETS.": r"\bcfg\.DATASETS\.FOCAL\b",
        "DATASETS.VAL": r"\bcfg\.DATASETS\.VAL\b",
        "DATALOADER.": rf"\bcfg\.DATALOADER\.FOCAL{re.escape(rest)}\b",
        "SOLVER.": rf"\b(_?cfg\.SOLVER\.FOCAL|solver){re.escape(rest)}\b",
        "TEST.": rf"\btest{re.escape(rest)}\b",
    }
    sources = [p for p in (REPOSITORY / "focal_d2").rglob("*.py") if p.name != "keys.py"]
    assert any(re.search(readers[section], p.read_text()) for p in sources)
    spelled = "|".join((re.escape(key), key.replace(".", "__"), rf'"{name}"'))
    assert any(re.search(spelled, text) for text in tests)
