"""TorchScript files: the detector as `torch.jit.trace` records it, with its metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from focal_d2.export.graph import Graph, example, recording
from focal_d2.storage.files import write_aside

# The entry of the file that holds the metadata.
_METADATA = "metadata.json"


def write_torchscript(graph: Graph, path: Path, metadata: dict[str, Any], *, channels: int) -> None:
    """Record the detector and write it; the file's extra entry `metadata.json` has the metadata."""
    with recording():
        traced = torch.jit.trace(graph, (example(channels),), check_trace=False)
    content = {_METADATA: json.dumps(metadata)}
    with recording():
        write_aside(str(path), lambda file: torch.jit.save(traced, file, _extra_files=content))


def load_torchscript(path: Path) -> Callable[[np.ndarray], Sequence[np.ndarray]]:
    """Load a file that `write_torchscript` has written, as a function on arrays."""
    with recording():
        model = torch.jit.load(str(path))

    @torch.no_grad()
    def detect(images: np.ndarray) -> Sequence[np.ndarray]:
        return [x.numpy() for x in model(torch.from_numpy(images))]

    return detect
