"""Studies, over commands that only pretend to train."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest

from focal_d2 import UserError
from focal_d2.analysis.study import Cell, Grid, Run, as_json, plan, read_results, run_study, write_report
from focal_d2.analysis.study.report import paired_difference
from focal_d2.analysis.study.runs import last_metrics, read_metrics

# argv: folder, AP, what happens. Each run leaves a mark in calls.txt.
PRETEND = """
import json, pathlib, sys
folder, ap, what = pathlib.Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
with (folder / "calls.txt").open("a") as calls:
    calls.write(what + " ")
lines = [{"iteration": i, "loss_cls": 1.0 / (i + 1)} for i in range(3)]
if what == "nan":
    sys.exit("train_net.py: error: the loss or gradient became infinite or NaN at iteration 2: bad box")
if what == "crash":
    sys.exit("Killed, it seems")
lines.append({"iteration": 3, "bbox/AP": ap, "bbox/AP50": 2 * ap})
lines[-1].update({"bbox/APs": 0.0, "bbox/AR@1": 1.0, "bbox/AR@100": 50.0})
(folder / "metrics.json").write_text("".join(json.dumps(x) + "\\n" for x in lines))
"""


def make_run(folder, name="a", seed=0, ap=10.0, what="train", config="A: {B: 1}", paper=None) -> Run:
    cell = Cell(name, {"K": name}, paper)
    where = folder / cell.folder / f"seed_{seed}"
    return Run(cell, seed, where, [sys.executable, "-c", PRETEND, str(where), str(ap), what], config)


def calls(run: Run) -> str:
    return (run.folder / "calls.txt").read_text().strip()


def study(tmp_path, *runs):
    return run_study(runs, tmp_path, lambda results, newest: None)


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


@pytest.mark.parametrize(
    "config, message", [("A: {B: 2}", "was run with A.B 1, not 2"), ("C: 2", "was run with A.B 1, not None")]
)
def test_a_run_with_another_config_is_refused_before_anything_runs(tmp_path, config, message):
    study(tmp_path, make_run(tmp_path))
    new = make_run(tmp_path, "new")
    with pytest.raises(UserError, match=f"a/seed_0 {message}: choose another"):
        study(tmp_path, new, make_run(tmp_path, config=config))
    assert not new.folder.exists()


def test_checkpoints_of_unknown_origin_are_refused(tmp_path):
    run = make_run(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(UserError, match="seed_0 has checkpoints but no run.json"):
        study(tmp_path, run)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"cell'])
def test_a_damaged_record_is_named(tmp_path, content):
    run = make_run(tmp_path)
    study(tmp_path, run)
    (run.folder / "run.json").write_text(content)
    with pytest.raises(UserError, match="run.json is damaged: delete the folder"):
        study(tmp_path, run)


@pytest.mark.parametrize(
    "field, value", [("status", ["x"]), ("iteration", "1"), ("metrics", {"bbox/AP": "1"}), ("metrics", [])]
)
def test_a_record_of_other_types_is_named(tmp_path, field, value):
    run = make_run(tmp_path)
    study(tmp_path, run)
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, field: value}))
    with pytest.raises(UserError, match="run.json is damaged: delete the folder"):
        study(tmp_path, run)


@pytest.mark.parametrize(
    "config, is_same", [("A: {B: 1} # mine", True), ("[1]", False), ("{1: 2, a: 3}", False)]
)
def test_configs_are_compared_by_their_values(tmp_path, config, is_same):
    run = make_run(tmp_path)
    study(tmp_path, run)
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "config": config}))
    if is_same:
        study(tmp_path, run)
    else:
        with pytest.raises(UserError, match="choose another output folder"):
            study(tmp_path, run)


def test_lines_of_metrics_that_no_run_wrote_are_passed_over(tmp_path):
    lines = ['{"iteration": 2}', "1", "[]", "{}", '{"iteration": "1"}', '{"iteration": null}', "[" * 100_000]
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert read_metrics(tmp_path) == [{"iteration": 2}]


def test_what_is_stored_is_reported_at_once_and_what_is_missing_where_it_belongs(tmp_path):
    runs = [make_run(tmp_path, "crash", what="crash"), make_run(tmp_path)]
    study(tmp_path, *runs)
    seen = []
    run_study(runs, tmp_path, lambda results, newest: seen.append([[r.cell for r in results], newest]))
    assert [cells for cells, _ in seen] == [["a"], ["crash", "a"]]
    assert seen[0][1] is None
    assert seen[1][1].cell == "crash"


def test_a_training_run_holds_the_folder_after_the_study_was_killed(tmp_path):
    run = make_run(tmp_path)
    started = tmp_path / "started"
    waits = f"import pathlib, time; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    run = run._replace(command=[sys.executable, "-c", waits])
    child = os.fork()
    if child == 0:
        study(tmp_path, run)
        os._exit(0)
    while not started.exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        with pytest.raises(UserError, match="in use: a study, or a training run"):
            study(tmp_path, run)
    finally:
        subprocess.run(["pkill", "-f", str(started)], check=True)


def test_plan_has_all_cells_of_a_seed_first_and_names_a_wrong_cell(tmp_path):
    grid = Grid([0], [Cell("a", {"K": 1}, None), Cell("b", {"K": 2}, None)])
    runs = plan(grid, [3, 5], tmp_path, ["train"], " ".join)
    assert [(r.cell.name, r.seed) for r in runs] == [("a", 3), ("b", 3), ("a", 5), ("b", 5)]
    folder = tmp_path / "b" / "seed_5"
    assert runs[3].folder == folder
    assert runs[3].command == ["train", "K", "2", "SEED", "5", "OUTPUT_DIR", str(folder)]
    assert runs[3].config == "K 2"

    def refuse(overrides):
        if overrides == ["K", "2"]:
            raise UserError("no")
        return ""

    with pytest.raises(UserError, match="cell b: no"):
        plan(grid, [0], tmp_path, [], refuse)


def test_a_folder_in_use_is_refused(tmp_path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"):
            study(tmp_path, make_run(tmp_path))
    study(tmp_path, make_run(tmp_path))


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: "):
        run_study([], tmp_path / "file", lambda results, newest: None)


def test_metrics_survive_half_a_line_and_a_resumption(tmp_path):
    lines = [
        '{"iteration": 2, "loss_cls": 1.0}',
        '{"iteration": 5, "other/bbox/AP": 1.0}',
        '{"iteration": 3, "bb{"iteration": 3, "loss_cls": 2.0}',
        '{"iteration": 9, "other/bbox/AP": 3.0}',
        '{"iteration": 10, "oth',
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
    run_study(runs[:-1], tmp_path, lambda results, newest: write_report(runs, results, tmp_path))
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


def test_each_dataset_has_a_column_of_its_own(tmp_path):
    metrics = {f"{d}/bbox/{m}": 1.0 for d in ("x", "y") for m in ("AP", "AR@1", "AR@100")}
    run = make_run(tmp_path)
    (result,) = study(tmp_path, run)
    write_report([run], [result._replace(metrics=metrics)], tmp_path)
    header = (tmp_path / "table.md").read_text().splitlines()[0]
    assert [c.strip() for c in header.split("|")[2:-1]] == ["runs", "x/AP", "x/AR@100", "y/AP", "y/AR@100"]


def test_paired_difference_by_hand():
    # Differences 1, 2, 3 of the seeds that both have: mean 2, deviation 1; Student's t for 2 degrees of
    # freedom is 4.3027 at 97.5 %.
    values, baseline = {0: 11.0, 1: 22.0, 2: 33.0, 5: 99.0}, {0: 10.0, 1: 20.0, 2: 30.0, 7: 0.0}
    half = 4.302652729696142 / math.sqrt(3)
    assert paired_difference(values, baseline) == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-9)
    mean, low, high = paired_difference({0: 3.0}, baseline)
    assert mean == -7.0
    assert math.isnan(low)
    assert math.isnan(high)
    assert all(map(math.isnan, paired_difference({9: 1.0}, baseline)))


def test_a_baseline_adds_differences(tmp_path):
    cells = [("CE", 0, 10.0), ("FL", 0, 11.0), ("CE", 1, 10.0), ("FL", 1, 13.0), ("GHM", 0, 9.0)]
    runs = [make_run(tmp_path, name, seed, ap) for name, seed, ap in cells]
    run_study(runs, tmp_path, lambda results, newest: write_report(runs, results, tmp_path, "CE"))
    rows = [
        [x.strip() for x in line.strip("|").split("|")]
        for line in (tmp_path / "table.md").read_text().splitlines()
    ]
    assert rows[0] == ["", "runs", "AP", "AP50", "AR@100", "AP − baseline", "AP50 − baseline"]
    # Differences 1 and 3: mean 2, deviation √2; t for 1 degree of freedom is 12.7062.
    assert [row[5] for row in rows[2:]] == ["", "+2.0 (-10.7 to +14.7)", "-1.0"]


def test_runs_of_a_results_file_are_not_repeated(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    cells = [("a", 0, "train"), ("a", 1, "nan"), ("b", 0, "crash")]
    earlier = [make_run(there, name, seed, what=what) for name, seed, what in cells]
    first = run_study(earlier, there, lambda results, newest: write_report(earlier, results, there))
    runs = [make_run(here, name, seed) for name, seed, _ in [*cells, ("c", 0, "")]]
    known = read_results(there / "results.csv", runs)
    assert known == {("a", 0): first[0], ("a", 1): first[1]}
    results = run_study(runs, here, lambda results, newest: write_report(runs, results, here), known)
    assert results[:2] == first[:2]
    assert not runs[0].folder.exists()
    assert not runs[1].folder.exists()
    assert [calls(run) for run in runs[2:]] == ["train", "train"]
    again = read_results(here / "results.csv", runs)
    assert [again[run.cell.name, run.seed] for run in runs] == results


def test_results_of_another_config_and_other_files_are_named(tmp_path):
    run = make_run(tmp_path / "a")
    run_study([run], tmp_path / "a", lambda results, newest: write_report([run], results, tmp_path / "a"))
    other = make_run(tmp_path / "b", config="A: {B: 2}")
    with pytest.raises(UserError, match="results.csv: a, seed 0, was run with another config"):
        read_results(tmp_path / "a" / "results.csv", [other])
    file = tmp_path / "x.csv"
    for text in (
        "cell,seed\na,0\n",
        "\0",
        "cell,seed,status,diverged at,config,bbox/AP\na,x,finished,,1,2\n",
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=r"x.csv is no results.csv"):
            read_results(file, [run])


def test_fingerprint_is_of_the_values_that_are_not_defaults(tmp_path):
    def fingerprint(config):
        return make_run(tmp_path, config=config).fingerprint

    short = fingerprint("SOLVER: {BASE_LR: 0.5}")
    assert short == fingerprint("SOLVER: {BASE_LR: 0.5, GAMMA: 0.1}\nMODEL: {FOCAL: {LOSS: {NAME: focal}}}")
    assert short != fingerprint("SOLVER: {BASE_LR: 0.5, GAMMA: 0.2}")
    assert short != fingerprint("SOLVER: {BASE_LR: 0.25}")


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    (result,) = study(tmp_path, make_run(tmp_path))
    (read,) = json.loads(as_json([result._replace(metrics={"bbox/APl": float("nan"), "bbox/AP": 1.0})]))
    assert read["metrics"] == {"bbox/APl": None, "bbox/AP": 1.0}


def test_a_study_that_only_diverged_has_a_table_and_no_plot_of_results(tmp_path):
    runs = [make_run(tmp_path, what="nan")]
    run_study(runs, tmp_path, lambda results, newest: write_report(runs, results, tmp_path))
    assert "diverged at 2" in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "results.png").exists()
