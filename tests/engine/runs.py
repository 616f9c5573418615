"""`train_net.py`, run in the test's process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

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


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
