"""Grids: what YAML may say, and that the ready ones are runnable."""

from __future__ import annotations

import pytest
import yaml
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.analysis.study import Cell, load_grid
from focal_d2.engine import load_config
from tests.conftest import REPOSITORY

GRIDS = sorted((REPOSITORY / "configs/grids").glob("*.yaml"))


@pytest.fixture
def write(tmp_path):
    def write(content: object):
        path = tmp_path / "grid.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


def test_sweep_is_a_product_with_the_last_key_fastest(write):
    sweep = {"MODEL.X.A": [1, 2], "MODEL.X.B": [[0.5], [0.7]]}
    entry = {"NAME": "a {A}, b {B}", "SET": {"K": "v"}, "SWEEP": sweep, "PAPER": [1.0, 2.0, 3.0, 4.0]}
    grid = load_grid(write({"SEEDS": [3], "CELLS": [{"NAME": "γ 0.5"}, entry]}))
    assert grid.seeds == [3]
    assert grid.baseline is None
    assert [c.name for c in grid.cells] == [
        "γ 0.5",
        "a 1, b [0.5]",
        "a 1, b [0.7]",
        "a 2, b [0.5]",
        "a 2, b [0.7]",
    ]
    assert [c.paper for c in grid.cells] == [None, 1.0, 2.0, 3.0, 4.0]
    assert [c.folder for c in grid.cells[:2]] == ["gamma_0.5", "a_1_b_0.5"]
    assert Cell("α -1.0", {}, None).folder == "alpha_minus_1.0"
    assert grid.cells[1].overrides == ["K", "v", "MODEL.X.A", "1", "MODEL.X.B", "[0.5]"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a: [", "grid .*grid.yaml, line 1: while parsing"),
        ([], "needs the keys SEEDS and CELLS"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a"}], "MORE": 1}, "needs the keys SEEDS and CELLS"),
        (
            {"SEEDS": [1], "CELLS": [{"NAME": "a"}], "BASELINE": "b"},
            "BASELINE is 'b'; it must be one of the cells: \"a\"",
        ),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a"}], "BASELINE": ["a"]}, "BASELINE is \\['a'\\]"),
        ({"SEEDS": [], "CELLS": [{"NAME": "a"}]}, "SEEDS is \\[\\]"),
        ({"SEEDS": [1, 1], "CELLS": [{"NAME": "a"}]}, "different whole numbers"),
        ({"SEEDS": [True], "CELLS": [{"NAME": "a"}]}, "SEEDS is \\[True\\]"),
        ({"SEEDS": [-1], "CELLS": [{"NAME": "a"}]}, "SEEDS is \\[-1\\]"),
        ({"SEEDS": [2**31], "CELLS": [{"NAME": "a"}]}, "from 0 to 2\\^31 - 1"),
        ({"SEEDS": [1], "CELLS": [{1: "a"}]}, "CELLS\\[0\\] has 1; it needs a text NAME"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a|b"}]}, "must be one line without"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a\nb"}]}, "must be one line without"),
        (
            {"SEEDS": [1], "CELLS": [{"NAME": "a", "SET": {"SEED": 1}}]},
            "sets SEED, which a study sets itself",
        ),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "SWEEP": {"OUTPUT_DIR": ["x"]}}]}, "sets OUTPUT_DIR"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "SWEEP": {1: [1]}}]}, "must be mappings from config keys"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "PAPER": "34.0"}]}, "must be numbers, or null"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a {K.x}", "SWEEP": {"K": [1]}}]}, "only keys of SWEEP"),
        ({"SEEDS": [1], "CELLS": [{"NAME": ".."}]}, "share the folder"),
        ({"SEEDS": [1], "CELLS": ["a"]}, "CELLS must be a list of mappings"),
        ({"SEEDS": [1], "CELLS": [{"SET": {}}]}, "CELLS\\[0\\] has SET; it needs a text NAME"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "WHAT": 1}]}, "may have SET, SWEEP, PAPER"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "SWEEP": {"K": 1}}]}, "needs a list of values"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "SET": []}]}, "must be mappings"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "PAPER": [1.0, 2.0]}]}, "PAPER has 2 values for 1 cells"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a {B}"}]}, "only keys of SWEEP"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a", "SWEEP": {"K": [1, 2]}}]}, "same NAME"),
        ({"SEEDS": [1], "CELLS": [{"NAME": "a b"}, {"NAME": "a, B"}]}, 'would share the folder "a_b"'),
        ({"SEEDS": [1], "CELLS": [{"NAME": "!"}]}, "share the folder"),
        # What would take any amount of memory.
        *(
            ({"SEEDS": [1], "CELLS": [{"NAME": name, "SWEEP": {"K": [999999999]}}]}, "only keys of SWEEP")
            for name in ("{K:999999999}", "{K:{K}}", "{K.real}", "{K[0]}", "{K:.999999999f}", "{0}", "{}")
        ),
        (
            {"SEEDS": [1], "CELLS": [{"NAME": "a", "SWEEP": {k: [*range(10)] for k in "ABCDEFGHIJ"}}]},
            "SWEEP makes more than 10,000 cells",
        ),
    ],
)
def test_a_mistake_is_named(write, content, message):
    with pytest.raises(UserError, match=message):
        load_grid(write(content))


def test_a_baseline_is_a_cell(write):
    cells = [{"NAME": "K {K}", "SWEEP": {"K": [1, 2]}}]
    assert load_grid(write({"SEEDS": [1], "CELLS": cells, "BASELINE": "K 2"})).baseline == "K 2"


def test_a_missing_grid_is_named(tmp_path):
    with pytest.raises(UserError, match="none.yaml: No such file"):
        load_grid(tmp_path / "none.yaml")


def commands(path):
    """Grids and base configs of the commands in a grid's header."""
    for line in path.read_text().splitlines():
        words = line.lstrip("# ").removeprefix("Command:").split()
        if words[:2] == ["focal-d2", "study"]:
            yield words[words.index("--grid") + 1], words[words.index("--config-file") + 1]


@pytest.mark.parametrize("path", GRIDS, ids=lambda p: p.stem)
def test_every_ready_grid_builds_over_the_config_its_header_names(path):
    bases = list(commands(path))
    assert bases
    for grid, base in bases:
        assert REPOSITORY / grid == path
        for cell in load_grid(path).cells:
            cfg = load_config(str(REPOSITORY / base), [*cell.overrides, "MODEL.DEVICE", "cpu"]).clone()
            cfg.defrost()
            cfg.MODEL.DEVICE = "meta"  # shapes without numbers
            build_model(cfg)
