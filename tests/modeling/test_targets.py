from __future__ import annotations

from unittest.mock import Mock

import torch

from focal_d2.modeling.targets import _count
from tests.waits import PretendedGPU


def test_positives_are_read_when_the_copys_own_stream_has_made_it(monkeypatch):
    streams, event = {torch.device("cuda:0"): "stream of 0", torch.device("cuda:1"): "stream of 1"}, Mock()
    with PretendedGPU() as gpu:
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device="cuda:0": streams[torch.device(device)]
        )
        monkeypatch.setattr(torch.cuda, "Event", lambda: event)
        positive = torch.eye(3, dtype=torch.bool).to("cuda:1")
        gpu.clear()
        number = _count(positive)
        event.record.assert_called_once_with("stream of 1")
        event.synchronize.assert_not_called()
        assert number() == 3
        event.synchronize.assert_called_once_with()
        monkeypatch.undo()
    assert not gpu.waits
