"""The command's options, messages and exit status, without the work of a part."""

from __future__ import annotations

import json
import os
import signal

import pytest

from focal_d2.analysis.gpu_check import report, run
from focal_d2.analysis.gpu_check.lines import Line
from tests.engine.runs import run_command

FIGURE = Line("seconds", 1.5, "ms")


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--minutes", "0"], "0 is not a number of minutes above 0"),
        (["--minutes", "x"], "x is not a number of minutes above 0"),
        (["--minutes", "nan"], "nan is not a number of minutes above 0"),
        (["--minutes", "10000"], "10000 is not a number of minutes above 0 and below 10,000"),
        (["--minutes", "1", "--parts", "a"], "a is not a list of numbers"),
        (["--minutes", "1", "--parts", "99"], "there is no part 99"),
    ],
)
def test_mistakes_are_named(arguments, match, monkeypatch, capsys, tmp_path):
    status = run_command(monkeypatch, "gpu-check", "--device", "cpu", "--output", tmp_path, *arguments)
    assert status == 2
    assert match in capsys.readouterr().err


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "stream", lambda *_, **__: iter([None]))
    assert run_command(monkeypatch, "gpu-check", "--minutes", "1", "--output", tmp_path) == 2
    assert "--device cpu rehearses" in capsys.readouterr().err


@pytest.mark.parametrize("lines, status", [([FIGURE], 0), ([Line("a", problem="failed")], 1), ([], 1)])
def test_exit_status_says_whether_a_part_gave_nothing(lines, status, monkeypatch, capsys, tmp_path):
    def stream(function, *_, **__):
        return iter(["a CPU"] if function is run.name_device else lines)

    monkeypatch.setattr(run, "stream", stream)
    arguments = ["--device", "cpu", "--minutes", "1", "--parts", "1", "--output", tmp_path / "new"]
    assert run_command(monkeypatch, "gpu-check", *arguments) == status
    out, err = capsys.readouterr()
    assert "device: a CPU" in out
    assert "rehearsal on a CPU" in err
    assert (tmp_path / "new/gpu_check.json").is_file()


def test_no_time_for_any_part_is_no_success(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "stream", lambda *_, **__: iter(["a CPU"]))
    arguments = ["--device", "cpu", "--minutes", "0.01", "--output", tmp_path]
    assert run_command(monkeypatch, "gpu-check", *arguments) == 1
    assert "not started: 1 s are left, and it needs 5" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_named_before_the_device_is_asked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "stream", None)
    (tmp_path / "file").write_text("")
    arguments = ["--device", "cpu", "--minutes", "1", "--output"]
    assert run_command(monkeypatch, "gpu-check", *arguments, tmp_path / "file") == 2
    assert f"{tmp_path}/file: " in capsys.readouterr().err
    (tmp_path / "gpu_check.json").write_text("{}")
    assert run_command(monkeypatch, "gpu-check", *arguments, tmp_path) == 2
    assert "gpu_check.json has the results of another check" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert run_command(monkeypatch, "gpu-check", *arguments, tmp_path / "new") == 2
    assert "new cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("full, status", [({1}, 0), ({1, 2, 3, 4}, 2)])
def test_a_full_disk_ends_no_part(full, status, monkeypatch, capsys, tmp_path):
    """The results are written after the first, second and third line, and at the end."""
    lines = [FIGURE, FIGURE._replace(value=float("nan")), Line("last", 3)]
    streams = {run.name_device: ["a CPU"], run.measure: lines}
    monkeypatch.setattr(run, "stream", lambda function, *_, **__: iter(streams[function]))
    attempts, write_results = [], report.write_results

    def write(*arguments):
        attempts.append(arguments)
        if len(attempts) in full:
            raise OSError(28, "No space left on device")
        write_results(*arguments)

    monkeypatch.setattr(report, "write_results", write)
    arguments = ["--device", "cpu", "--minutes", "1", "--parts", "1", "--output", tmp_path]
    assert run_command(monkeypatch, "gpu-check", *arguments) == status
    out, err = capsys.readouterr()
    assert "| last | 3 |" in out
    assert ("No space left on device" in err) == (status == 2)
    if status == 0:
        content = json.loads((tmp_path / "gpu_check.json").read_text(), parse_constant=pytest.fail)
        assert [line["value"] for line in content["parts"][0]["lines"]] == [1.5, "nan", 3]


def test_sigterm_ends_the_check_and_its_part(monkeypatch, tmp_path):
    ended = []

    def stream(function, *_, **__):
        if function is run.name_device:
            yield "a CPU"
            return
        try:
            yield FIGURE
            os.kill(os.getpid(), signal.SIGTERM)
            yield FIGURE
        finally:
            ended.append(True)

    monkeypatch.setattr(run, "stream", stream)
    before = signal.getsignal(signal.SIGTERM)
    arguments = ["--device", "cpu", "--minutes", "1", "--output", tmp_path]
    assert run_command(monkeypatch, "gpu-check", *arguments) == 128 + signal.SIGTERM
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) == before
    assert len(json.loads((tmp_path / "gpu_check.json").read_text())["parts"][0]["lines"]) == 1
