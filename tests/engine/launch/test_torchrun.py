"""What torchrun's options mean for a training; test_start.py runs torchrun itself."""

from __future__ import annotations

import pytest

from focal_d2 import UserError
from focal_d2.engine.launch.torchrun import check_restarts


def test_restarts_without_resume_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    check_restarts(resume=False)  # a variable that another job left; torchrun sets its id as well
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    check_restarts(resume=True)
    with pytest.raises(
        UserError, match="--max-restarts 3 of torchrun needs --resume: .* start from the beginning"
    ):
        check_restarts(resume=False)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    check_restarts(resume=False)
