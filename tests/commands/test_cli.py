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

# The package without what its __init__ imports: PyTorch and detectron2, which take seconds.
PROGRAM = """import sys, types
sys.modules["focal_d2"] = package = types.ModuleType("focal_d2")
package.__path__ = ["focal_d2"]
from focal_d2.commands.cli import command_line
from focal_d2.errors import UserError
with command_line("-c"):
    """


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


def shell(command: str, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a line under `command_line`, as `"$@"` of a shell command."""
    return subprocess.run(
        ["bash", "-c", command, "-", sys.executable, "-c", PROGRAM + code],
        capture_output=True, text=True, cwd=REPOSITORY, check=False, env={**os.environ, **variables},
    )  # fmt: skip


def test_closed_output_is_one_line_and_goes_into_no_file(tmp_path):
    code = f"f = open('{tmp_path}/a', 'w'); print('x'); import os; os.system('echo y'); f.write('z')"
    result = shell('"$@" >&-', code)
    assert (result.returncode, result.stderr) == (
        0,
        "-c: standard output is closed: what is printed there is lost\n",
    )
    assert (tmp_path / "a").read_text() == "z"
    result = shell('"$@" >&- 2>&- <&-', code)
    assert (result.returncode, (tmp_path / "a").read_text()) == (0, "z")
    result = shell('"$@" 2>&-', "print('a'); raise UserError('b')")
    assert (result.returncode, result.stdout, result.stderr) == (2, "a\n", "")


def test_error_whose_reader_is_gone_keeps_its_status():
    code = "import time; time.sleep(1); raise UserError('b')"
    result = shell('"$@" 2>&1 | true; exit ${PIPESTATUS[0]}', code)
    assert (result.returncode, result.stderr) == (2, "")


def test_full_output_is_one_line():
    result = shell('"$@" > /dev/full', "print('a')")
    assert (result.returncode, result.stderr) == (2, "-c: error: output: No space left on device\n")


def test_another_broken_pipe_is_a_fault():
    """Of a data worker, for instance; it was taken for the reader of the output."""
    result = shell('"$@"', "import os; r, w = os.pipe(); os.close(r); os.write(w, b'x')")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "BrokenPipeError: [Errno 32] Broken pipe"


def test_traceback_has_no_control_characters():
    result = shell('"$@"', r"raise KeyError('a') from OSError('\x1b]0;t\x07\nFAKE')")
    assert result.returncode == 1
    assert "OSError: \\x1b]0;t\\x07" in result.stderr
    assert "\x1b" not in result.stderr


def test_locale_of_ascii(tmp_path):
    """Files are read and written as UTF-8 all the same; a name that can't be opened is told."""
    code = (
        f"open('{tmp_path}/b', 'w').write('\\xe9'); print('\\xfc', open('{tmp_path}/b').read()); "
        f"open('{tmp_path}/\\xe4')"
    )
    result = shell('"$@"', code, LC_ALL="C", PYTHONUTF8="0")
    assert (tmp_path / "b").read_bytes() == "é".encode()
    assert (result.returncode, result.stdout) == (2, "\\xfc \\xe9\n")
    first, last = result.stderr.splitlines()
    assert first.endswith("files whose names have other letters are not found; set PYTHONUTF8=1")
    assert last.endswith("\\xe4' can't be written in this system's encoding ascii: set PYTHONUTF8=1")
