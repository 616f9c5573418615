"""`train_net.py` and the tools, run in the test's process, and small disks."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from train_net import command_line, main


def run_main(monkeypatch, *argv: object) -> int:
    """Run the command in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, argv)])
    try:
        with command_line():
            main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def run_tool(monkeypatch, name: str, *argv: object) -> int:
    """Run a command of tools/ in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, argv)])
    try:
        runpy.run_path(str(REPOSITORY / "tools" / name), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """Make a folder that is a file system of its own, of a size as mount writes it."""
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    # Lazily: a job's log files may still be open.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
