from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from focal_d2 import UserError
from focal_d2.commands.cli import Parser, check_writable
from tests.conftest import REPOSITORY

PROGRAM = "from focal_d2.commands.cli import command_line\nwith command_line('-c'):\n    "


def run(code: str, shell: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line under `command_line`, its output piped to a shell command."""
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {shell}; exit ${{PIPESTATUS[0]}}', sys.executable, PROGRAM + code],
        capture_output=True, text=True, cwd=REPOSITORY, check=False, env={**os.environ, **variables},
    )  # fmt: skip


def test_ctrl_c_is_one_line():
    result = run("raise KeyboardInterrupt")
    assert (result.returncode, result.stderr.splitlines()[-1]) == (130, "-c: stopped")
    assert "Traceback" not in result.stderr


def test_full_disk_is_one_line():
    result = run(f"raise OSError({errno.ENOSPC}, 'No space left on device', 'a.json')")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "-c: error: a.json: No space left on device"
    assert "Traceback" not in result.stderr


def test_other_faults_keep_their_traceback():
    assert "Traceback" in run("raise OSError(13, 'Permission denied', 'a.json')").stderr


def test_terminal_without_unicode_gets_escapes():
    result = run("print('·')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "\\xb7\n")


def test_reader_that_has_seen_enough_is_no_fault():
    result = run("print('a\\n' * 1000000)", "| head -1")
    assert (result.returncode, result.stdout) == (0, "a\n")
    assert "BrokenPipe" not in result.stderr


def test_output_must_not_be_the_config(tmp_path: Path):
    config = tmp_path / "a.yaml"
    config.write_text("VERSION: 2")
    (tmp_path / "link.yaml").symlink_to(config)
    for path in (config, tmp_path / "link.yaml"):
        with pytest.raises(UserError, match="is the config itself"):
            check_writable(path, str(config))
    check_writable(tmp_path / "b.yaml", str(config))
    with pytest.raises(UserError, match="can't be written"):
        check_writable(tmp_path / "no" / "b.yaml", str(config))


def test_parser_names_a_needed_option_out_of_place(monkeypatch, capsys):
    parser = Parser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("opts", nargs="...")
    arguments = ["SEED", "1", "--output", "out"]
    monkeypatch.setattr(sys, "argv", ["focal-d2", *arguments])
    with pytest.raises(SystemExit):
        parser.parse_args(arguments)
    assert "--output must come before the KEY VALUE pairs" in capsys.readouterr().err


def test_parser_knows_the_users_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--output", type=Path)
    parser.add_argument("--config-file")
    values = parser.parse_args(["--output=~/out", "--config-file=~/a.yaml"])
    assert (values.output, values.config_file) == (tmp_path / "out", f"{tmp_path}/a.yaml")
    assert parser.parse_args([]).config_file is None
