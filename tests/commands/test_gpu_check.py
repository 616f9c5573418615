"""The command's options, messages and exit status, without the work of a part."""

from __future__ import annotations

import pytest

from focal_d2.analysis.gpu_check import run
from focal_d2.analysis.gpu_check.lines import Line
from tests.engine.runs import run_command

FIGURE = Line("seconds", 1.5, "ms")


@pytest.mark.parametrize(
    "arguments, match",
    [
        (["--minutes", "0"], "0 is not a number of minutes above 0"),
        (["--minutes", "x"], "x is not a number of minutes above 0"),
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


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run, "stream", lambda *_, **__: iter(["a CPU"]))
    (tmp_path / "file").write_text("")
    arguments = ["--device", "cpu", "--minutes", "1", "--output", tmp_path / "file"]
    assert run_command(monkeypatch, "gpu-check", *arguments) == 2
    assert f"{tmp_path}/file" in capsys.readouterr().err
