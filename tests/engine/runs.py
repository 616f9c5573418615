"""`train_net.py` and the commands, run in the test's process, and small disks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train_net
from focal_d2.__main__ import main


def run_main(monkeypatch, *argv: object) -> int:
    """Run train_net.py in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, argv)])
    return _status(train_net.main)


def run_command(monkeypatch, *argv: object) -> int:
    """Run `focal-d2` with its arguments in this process; returns its exit status."""
    monkeypatch.setattr(sys, "argv", ["focal-d2", *map(str, argv)])
    return _status(main)


def _status(run: Callable[[], int]) -> int:
    try:
        return run()
    except SystemExit as stop:
        return int(stop.code or 0)


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
