"""Signals that end a training."""

from __future__ import annotations

import subprocess
import sys


def test_a_second_signal_ends_at_once():
    program = """
import os, signal, time
from focal_d2.engine.launch.signals import StopRequest
with StopRequest(lambda n: print("first", n, flush=True)) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGTERM)  # the same, passed on
    time.sleep(0.6)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stdout.split("\n") == ["first 2", "still here", ""]
