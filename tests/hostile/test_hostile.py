from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.hostile", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_a_sample_of_the_hostile_inputs_does_nothing():
    result = run("--every", "400")
    assert result.returncode == 0, result.stderr
    assert "| good files | 7 | 0 | 7 | 0 |" in result.stdout


@pytest.mark.slow
def test_what_trusted_files_do_is_seen():
    result = run("--trusted")
    assert result.returncode == 1, result.stderr
    assert "| trusted files | 2 | 2 | 0 | 2 |" in result.stdout
    assert "started: touch planted" in result.stderr
    assert "outside: home/planted" in result.stderr
