"""Studies, over commands that only pretend to train."""

from __future__ import annotations

import csv
import fcntl
import json
import sys

import pytest

from focal_d2 import UserError
from focal_d2.analysis import Cell, Run, run_study, write_report
from focal_d2.analysis.study import last_metrics, read_metrics

# argv: folder, AP, what happens. Each run leaves a mark in calls.txt.
PRETEND = """
import json, pathlib, sys
folder, ap, what = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
with (folder / "calls.txt").open("a") as calls:
    calls.write(what + " ")
lines = [{"iteration": i, "loss_cls": 1.0 / (i + 1)} for i in range(3)]
if what == "nan":
    sys.exit("FloatingPointError: Loss became infinite or NaN at iteration=2!\\nloss_dict = {}")
if what == "crash":
    sys.exit("Killed, it seems")
lines.append({"iteration": 3, "bbox/AP": ap, "bbox/AP50": 2 * ap})
lines[-1].update({"bbox/APs": 0.0, "bbox/AR@1": 1.0, "bbox/AR@100": 50.0})
(folder / "metrics.json").write_text("".join(json.dumps(x) + "\\n" for x in lines))
"""


def make_run(folder, name="a", seed=0, ap=10.0, what="train", config="x", paper=None) -> Run:
    cell = Cell(name, {"K": name}, paper)
    where = folder / cell.folder / f"seed_{seed}"
    return Run(cell, seed, where, [sys.executable, "-c", PRETEND, str(where), str(ap), what], config)


def calls(run: Run) -> str:
    return (run.folder / "calls.txt").read_text().strip()


def study(tmp_path, *runs):
    return run_study(runs, tmp_path, lambda results: None)


def test_finished_and_diverged_runs_are_not_repeated_and_failed_ones_are(tmp_path):
    runs = [make_run(tmp_path, w, what=w) for w in ("nan", "crash", "train")]
    first = study(tmp_path, *runs)
    assert [r.status for r in first] == ["diverged", "failed", "finished"]
    assert [r.iteration for r in first] == [2, None, None]
    assert first[1].message == f"exit status 1: Killed, it seems ({runs[1].folder / 'console.txt'})"
    assert first[2].metrics == {
        "bbox/AP": 10.0,
        "bbox/AP50": 20.0,
        "bbox/APs": 0.0,
        "bbox/AR@1": 1.0,
        "bbox/AR@100": 50.0,
    }
    assert study(tmp_path, *runs) == first
    assert [calls(r) for r in runs] == ["nan", "crash crash", "train"]
    assert first[0].line == "nan, seed 0: diverged: loss infinite or NaN at iteration 2"
    assert first[2].line == "train, seed 0: finished: bbox/AP 10.0, bbox/AP50 20.0"


def test_a_run_that_was_cut_off_is_run_again(tmp_path):
    run = make_run(tmp_path)
    study(tmp_path, run)
    record = json.loads((run.folder / "run.json").read_text())
    assert record["settings"] == {"K": "a"}
    (run.folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    study(tmp_path, run)
    assert calls(run) == "train train"


def test_a_run_with_another_config_is_refused_before_anything_runs(tmp_path):
    study(tmp_path, make_run(tmp_path))
    new = make_run(tmp_path, "new")
    with pytest.raises(UserError, match="a/seed_0 was run with another config"):
        study(tmp_path, new, make_run(tmp_path, config="y"))
    assert not new.folder.exists()


def test_a_folder_in_use_is_refused(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"):
            study(tmp_path, make_run(tmp_path))
    study(tmp_path, make_run(tmp_path))


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: "):
        run_study([], tmp_path / "file", lambda results: None)


def test_metrics_survive_half_a_line_and_a_resumption(tmp_path):
    lines = [
        '{"iteration": 2, "loss_cls": 1.0}',
        '{"iteration": 5, "other/bbox/AP": 1.0}',
        '{"iteration": 3, "bb',
        '{"iteration": 3, "loss_cls": 2.0}',
        '{"iteration": 9, "other/bbox/AP": 3.0}',
    ]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert [m["iteration"] for m in read_metrics(tmp_path)] == [2, 3, 5, 9]
    assert last_metrics(tmp_path) == {"other/bbox/AP": 3.0}
    assert last_metrics(tmp_path / "none") == {}


def test_report(tmp_path):
    # Means and sample deviations by hand: 10, 14 -> 12 ± √8; APs and AR@1 have no column.
    runs = [
        make_run(tmp_path, "FL", 0, 10.0, paper=34.0),
        make_run(tmp_path, "CE", 0, what="nan"),
        make_run(tmp_path, "FL", 1, 14.0, paper=34.0),
        make_run(tmp_path, "CE", 1, 3.0),
        make_run(tmp_path, "crash", 1, what="crash"),
        make_run(tmp_path, "to come", 1),
    ]
    run_study(runs[:-1], tmp_path, lambda results: write_report(runs, results, tmp_path))
    table = (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0] == ["", "runs", "AP", "AP50", "AR@100", "paper, COCO AP"]
    assert rows[2] == ["FL", "2", "12.0 ± 2.8", "24.0 ± 5.7", "50.0 ± 0.0", "34.0"]
    assert rows[3] == ["CE", "1, diverged at 2 (seed 0)", "3.0", "6.0", "50.0", ""]
    assert rows[4] == ["crash", "failed (seed 1)", "", "", "", ""]
    assert rows[5] == ["to come", "0", "", "", "", ""]
    with (tmp_path / "results.csv").open() as stream:
        records = list(csv.DictReader(stream))
    assert len(records) == 5
    assert records[0]["cell"] == records[0]["K"] == "FL"
    assert records[0]["bbox/APs"] == "0.0"
    assert records[1]["diverged at"] == "2"
    for name in ("results.png", "losses.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_study_that_only_diverged_has_a_table_and_no_plot_of_results(tmp_path):
    runs = [make_run(tmp_path, what="nan")]
    run_study(runs, tmp_path, lambda results: write_report(runs, results, tmp_path))
    assert "diverged at 2" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "results.png").exists()
