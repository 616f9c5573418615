"""How the processes of a job notice each other's end."""

from __future__ import annotations

import pytest

from focal_d2.engine.launch.collectives import peer_is_lost


@pytest.mark.parametrize(
    "text, lost",
    [
        ("[/pytorch/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4021", True),
        ("Socket Timeout", True),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_lost_processes_are_recognised(monkeypatch, text, lost):
    assert not peer_is_lost(RuntimeError(text))  # a single process has no peers
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    assert peer_is_lost(RuntimeError(text)) == lost
