"""What can lie where a file is expected."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path


def _sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**42)


def _socket(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as it:
        it.bind(f"/proc/self/fd/{folder}/{path.name}")  # the name of a socket has 107 bytes at most
    os.close(folder)


# How to make it, and what a program says of it.
SPECIAL = {
    "pipe": (os.mkfifo, "a named pipe, where a file is needed"),
    "link to a pipe": (
        lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
        "a named pipe",
    ),
    "socket": (_socket, "a socket, where a file is needed"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "a device, where a file is needed"),
    "terminal": (lambda path: path.symlink_to("/dev/ptmx"), "a device, where a file is needed"),
    "folder": (Path.mkdir, "a folder, where a file is needed"),
    "sparse file": (_sparse, "it has 4398046511104 bytes, more than"),
    "file that the system makes up": (
        lambda path: path.symlink_to("/proc/self/maps"),
        "a file of the kernel, where a file is needed",
    ),
}


def put(path: str | Path, kind: str) -> str:
    """Put one in the place of a file; returns what is said of it."""
    path = Path(path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    make, says = SPECIAL[kind]
    make(path)
    return says
