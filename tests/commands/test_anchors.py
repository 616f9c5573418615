from __future__ import annotations

import json

import pytest
import yaml

from focal_d2.analysis.anchors import fit
from focal_d2.engine import load_config
from tests.engine.runs import run_command


@pytest.fixture
def run(job, monkeypatch, capsys):
    monkeypatch.setattr(fit, "_GENERATIONS", 3)
    monkeypatch.setattr(fit, "_POPULATION", 5)

    def run(*argv):
        return run_command(monkeypatch, "anchors", "--config-file", job[0], *argv), *capsys.readouterr()

    return run


def test_table_and_yaml_are_printed(run, job):
    code, out, _ = run("--sizes", 1, "--ratios", 2)
    assert code == 0
    assert f"{job[1].name}, 18 boxes" in out
    assert "now 9 (3 sizes × 3 ratios), proposed 2 (1 sizes × 2 ratios)" in out
    made = yaml.safe_load(out.split("\n\n")[-1])["MODEL"]["ANCHOR_GENERATOR"]
    assert [len(level) for level in made["SIZES"]] == [1] * 5
    assert len(made["ASPECT_RATIOS"][0]) == 2


def test_output_is_a_config_that_trains_with_them(run, job, tmp_path):
    target = tmp_path / "deeper" / "anchors.yaml"
    target.parent.mkdir()
    code, out, _ = run("--json", "--output", target)
    assert code == 0
    result = json.loads(out)
    cfg = load_config(str(target))
    assert result["chosen"]["sizes"] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert [result["chosen"]["ratios"]] == cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
    assert (job[1].name,) == cfg.DATASETS.TRAIN
    assert result["after"]["fitted"]["recall"][0] <= 1
    assert result["thresholds"] == [0.5, 0.6, 0.7]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sizes", "0"], "--sizes: 0 is not a whole number above 0"),
        (["--ratios", "x"], "--ratios: x is not a whole number above 0"),
        (["--seed", "-1"], "--seed is [-1]"),
        (["--output", "missing/anchors.yaml"], "missing/anchors.yaml can't be written"),
        (["--output", "."], "can't be written"),
        (["DATASETS.TRAIN", "('nowhere',)"], 'dataset "nowhere" is not registered'),
        (["MODEL.ANCHOR_GENERATOR.SIZES", "[[8.0],[16.0]]"], "cannot build the anchors"),
    ],
)
def test_mistakes_are_one_line(run, argv, message, monkeypatch):
    monkeypatch.setattr(fit, "differential_evolution", None)  # said before the work is done
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_training_set_without_boxes_is_refused(run, job):
    content = json.loads(job[1].annotations.read_text())
    job[1].annotations.write_text(json.dumps({**content, "annotations": []}))
    code, _, err = run("DATASETS.TEST", "()")
    assert code == 2
    assert err.splitlines()[-1].endswith(
        "DATASETS.TRAIN has no box that could be fitted: none, or all ignored or empty"
    )
