"""The tests marked gpu: how they are found, and what is said of their run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import time
from types import SimpleNamespace

import pytest

from focal_d2.analysis.gpu_check import kernels
from focal_d2.analysis.gpu_check.lines import Check, Line
from focal_d2.analysis.gpu_check.sizes import GPU, REHEARSAL
from tests.conftest import REPOSITORY


def test_files_with_mark_are_those_with_gpu_tests():
    names = {path.name for path in kernels.files_with_mark(REPOSITORY / "tests")}
    assert {"test_kernels.py", "test_retinanet.py"} <= names
    assert "test_errors.py" not in names


def test_without_tests_or_pytest_the_cause_is_given(monkeypatch, tmp_path):
    check = Check("cuda", GPU, tmp_path, time.monotonic() + 100)
    monkeypatch.setattr(kernels, "focal_d2", SimpleNamespace(__file__=str(tmp_path / "focal_d2/__init__.py")))
    (line,) = kernels._run_tests(check)
    assert line.problem == f"not measured: {tmp_path} has no tests/"
    found = Line("tests", 3)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_a.py").write_text("@pytest.mark.gpu")
    monkeypatch.setattr(kernels, "_test_line", lambda files, root, _: found if root == tmp_path else files)
    assert kernels._run_tests(check) == [found]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    (line,) = kernels._run_tests(check)
    assert line.problem == "not measured: pytest is not installed"


def test_too_little_memory_is_a_cause(tmp_path):
    check = Check("cpu", REHEARSAL._replace(most_logits=2**60), tmp_path, time.monotonic() + 100)
    lines = kernels._compute_many_logits(check)
    assert [line.problem[:20] for line in lines] == ["not measured: needs "] * 2


def test_tests_end_with_the_part(tmp_path):
    test = tmp_path / "test_slow.py"
    test.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_slow():\n    time.sleep(60)\n")
    check = Check("cpu", REHEARSAL, tmp_path, time.monotonic() - 1)
    assert kernels._test_line([test], tmp_path, check).problem == (
        "stopped after 1 s; gpu_tests.txt has the output"
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_command_runs_the_marked_tests(processes, tmp_path):
    pytest.importorskip("xdist")
    test = tmp_path / "test_it.py"
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\ndef test_b(): assert False\n")
    result = subprocess.run(
        kernels.pytest_command([test], tmp_path, processes=processes),
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert kernels.summary(result.stdout, result.returncode).value == 1


@pytest.mark.parametrize(
    "output, status, value, met, beside",
    [
        ("...\n3 passed, 2 skipped in 1.0s", 0, 3, True, "2 skipped"),
        ("FAILED a::b - x\n1 failed, 3 passed in 1.0s", 1, 3, False, "1 failed"),
        ("2 skipped in 1.0s", 0, 0, False, "2 skipped"),
    ],
)
def test_summary_counts_tests(output, status, value, met, beside):
    line = kernels.summary(output, status)
    assert (line.value, line.met, line.beside) == (value, met, beside)
    assert line.details == [x for x in output.splitlines() if x.startswith("FAILED")]


def test_summary_of_no_run_is_a_problem():
    assert kernels.summary("no such option", 4).problem.startswith("pytest ended with status 4")
