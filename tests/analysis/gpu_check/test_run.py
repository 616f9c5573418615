"""Budgets, skipped parts, exit status and tables, without a part's work; then a rehearsal of all parts."""

from __future__ import annotations

import importlib
import inspect
import json
import time

import pytest
import torch

from focal_d2.analysis.benchmark.cuda import CpuCalls
from focal_d2.analysis.gpu_check import report, run
from focal_d2.analysis.gpu_check.lines import Check, Line, Measurement
from focal_d2.analysis.gpu_check.parts import PARTS
from focal_d2.analysis.gpu_check.processes import ProcessEnded
from focal_d2.analysis.gpu_check.run import PartResult, measure, run_parts
from focal_d2.analysis.gpu_check.sizes import REHEARSAL
from focal_d2.errors import UserError

FIGURE = Line("seconds", 1.5, "ms", "limit | 1.2 ms", "2", True)


def results_of(monkeypatch, tmp_path, streams, *, seconds=1000.0, numbers=(1, 2)):
    """The results of parts whose processes yield these lines, or raise."""
    checks, reports = [], []

    def stream(function, number, check, **limits):
        checks.append((number, check, limits["seconds"]))
        for item in streams[number]:
            if isinstance(item, Exception):
                raise item
            yield item

    monkeypatch.setattr(run, "stream", stream)
    results = run_parts(
        numbers, device="cpu", seconds=seconds, folder=tmp_path, report=lambda x: reports.append(list(x))
    )
    return results, checks, reports


def test_each_part_has_its_budget_and_lines_are_reported_as_they_come(monkeypatch, tmp_path):
    streams = {1: [FIGURE, FIGURE], 2: [FIGURE]}
    results, checks, reports = results_of(monkeypatch, tmp_path, streams)
    assert [len(r.lines) for r in results] == [2, 1]
    assert len(reports) == 5  # after each line, and at the end of each part
    for number, check, seconds in checks:
        assert check.deadline - time.monotonic() <= PARTS[number].seconds
        assert seconds > PARTS[number].seconds  # a last measurement may take a little longer
    assert all(result.passed and not result.gave_nothing for result in results)


def test_a_part_without_time_is_skipped_with_its_cause(monkeypatch, tmp_path):
    results, checks, _ = results_of(monkeypatch, tmp_path, {}, seconds=2)
    assert checks == []
    assert [r.problem for r in results] == [
        "not started: 2 s are left, and it needs 5",
        "not started: 2 s are left, and it needs 10",
    ]
    assert not any(result.gave_nothing or result.passed for result in results)


def test_a_part_that_ends_early_keeps_its_lines(monkeypatch, tmp_path):
    streams = {1: [FIGURE, ProcessEnded("was stopped")], 2: [ProcessEnded("died")]}
    first, second = results_of(monkeypatch, tmp_path, streams)[0]
    assert (first.lines, first.problem, first.passed, first.gave_nothing) == (
        [FIGURE],
        "was stopped",
        False,
        False,
    )
    assert (second.lines, second.problem, second.gave_nothing) == ([], "died", True)


def test_a_device_that_does_not_answer_is_a_mistake(monkeypatch):
    def stream(*_, **__):
        raise ProcessEnded("stopped after 120 s")
        yield

    monkeypatch.setattr(run, "stream", stream)
    with pytest.raises(UserError, match="the cuda device does not answer: stopped after 120 s"):
        run.find_device("cuda")


def a_part(*measurements):
    """A module of a part."""

    class Module:
        @staticmethod
        def measurements(check):
            yield from measurements

    return Module


def test_a_measurement_that_fails_or_has_no_time_is_a_line(monkeypatch, tmp_path):
    def fail():
        raise RuntimeError("an illegal memory access was encountered")

    part = a_part(
        Measurement("bad", fail),
        Measurement("good", lambda: [FIGURE]),
        Measurement("long", lambda: [FIGURE], seconds=900),
    )
    monkeypatch.setattr(run.importlib, "import_module", lambda name: part)
    check = Check("cpu", REHEARSAL, tmp_path, time.monotonic() + 30)
    bad, good, long = measure(1, check)
    assert bad.problem == "failed: RuntimeError: an illegal memory access was encountered"
    assert "in fail" in bad.details
    assert good == FIGURE
    assert long.problem == "not measured: 30 s of the part are left, and it needs 900"
    over = measure(1, check._replace(deadline=time.monotonic() - 1))
    assert [line.problem[:23] for line in over] == ["not measured: 0 s of th"] * 3


def test_table_and_json_have_every_line(tmp_path):
    bad = Line("waits", 3, aim="0", met=False)
    results = [
        PartResult(1, "First", 20.0, 1.25, [FIGURE], ""),
        PartResult(3, "Third", 30.0, 2.0, [bad, Line("late", problem="not measured")], "was stopped"),
    ]
    report.write_results(tmp_path, {"device": "H100", "rehearsal": False, "minutes": 9}, results)
    text = (tmp_path / "gpu_check.md").read_text()
    assert "| seconds | 1.5 ms | limit / 1.2 ms | 2 | yes |" in text
    assert "| waits | 3 |  | 0 | **no** |" in text
    assert "| late | not measured |  |  |  |" in text
    assert "1: passed, 3: not passed" in text
    assert "rehearsal on a CPU" not in text
    content = json.loads((tmp_path / "gpu_check.json").read_text())
    assert content["device"] == "H100"
    assert [part["passed"] for part in content["parts"]] == [True, False]
    assert content["parts"][1]["lines"][0]["value"] == 3


def test_stand_in_has_the_names_and_arguments_of_torch_cuda():
    for name, call in inspect.getmembers(CpuCalls(), callable):
        if not name.startswith("_"):
            real = getattr(torch.cuda, name)
            required = [
                p.name
                for p in inspect.signature(call).parameters.values()
                if p.default is inspect.Parameter.empty
            ]
            assert set(required) <= inspect.signature(real).parameters.keys(), name


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The results of all parts at small sizes, and the folder of the files."""
    folder = tmp_path_factory.mktemp("rehearsal")
    for part in PARTS.values():  # once, for all forks
        importlib.import_module(f"focal_d2.analysis.gpu_check.{part.module}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_METHOD", "fork")  # this process has imported all; a server would do it again
        # A machine may be busy: no budgets.
        patch.setattr(run, "PARTS", {n: part._replace(seconds=None) for n, part in PARTS.items()})
        assert run.find_device("cpu")
        results = run_parts(list(PARTS), device="cpu", seconds=900, folder=folder, report=lambda _: None)
    return {result.number: result for result in results}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that has used a GPU can't be forked")
@pytest.mark.parametrize("number", PARTS)
def test_rehearsal_gives_every_figure_of_a_part(number, rehearsal):
    result = rehearsal[number]
    assert result.problem == ""
    assert [line.problem for line in result.lines if line.problem] == []
    assert result.lines
    assert not result.gave_nothing
    assert [line.name for line in result.lines if line.met is False] == []
