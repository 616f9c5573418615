"""The checkpoints in a run's folder: their names, the last one, and which can be resumed from."""

from __future__ import annotations

import glob
import logging
import os
import re

from focal_d2.errors import reason
from focal_d2.storage.files import ASIDE, read_file

LAST = "last_checkpoint"  # the file that names the last checkpoint
# A checkpoint of the schedule, by the number of its last iteration.
_NUMBERED = re.compile(r"model_(\d+)\.pth")
_UNNUMBERED = ("model_final.pth", "model_best.pth")

logger = logging.getLogger(__name__)


class CheckpointFolder:
    """A folder of checkpoints, which need not exist. Every call reads the list of files again."""

    def __init__(self, path: str) -> None:
        self.path = path

    def last(self) -> str:
        """Return the path of the file that `last_checkpoint` names; "" if it names none of this folder."""
        try:
            name = read_file(os.path.join(self.path, LAST), limit=1000).decode().strip()
        except (OSError, UnicodeDecodeError):
            return ""
        plain = name == os.path.basename(name) and name.endswith(".pth") and name.isprintable()
        return os.path.join(self.path, name) if plain else ""

    def is_used(self) -> bool:
        """Return whether there is a run to resume: `last_checkpoint`, or a checkpoint that it could name."""
        names = (LAST, *_UNNUMBERED)
        return any(os.path.exists(os.path.join(self.path, x)) for x in names) or bool(self._numbered())

    def candidates(self) -> tuple[list[str], list[str]]:
        """Return the files to resume from, best first, and what is wrong already, as lines."""
        last = self.last()
        number = _number(os.path.basename(last))
        names = [name for n, name in self._numbered() if number is None or n < number]
        paths = [os.path.join(self.path, name) for name in names]
        if last:
            return [last, *paths], []
        # The checkpoint at the end of a run has no number. It may be of an earlier run, so it comes last.
        paths += filter(os.path.isfile, (os.path.join(self.path, x) for x in _UNNUMBERED))
        last = os.path.join(self.path, LAST)
        return paths, [f"{last} is missing or names no checkpoint of this folder"]

    def delete_old(self, written: str, *, keep: int) -> None:
        """Delete all but the newest checkpoints up to the one just written; later ones are of another run.

        Args:
            written: name of the checkpoint. If it has no number, nothing is deleted.
            keep: how many to keep; 0: all.
        """
        number = _number(written)
        if not keep or number is None:
            return
        for _, name in [x for x in self._numbered() if x[0] <= number][keep:]:
            _remove(os.path.join(self.path, name))

    def delete_unfinished(self) -> None:
        """Delete the files that a killed run left half written."""
        for pattern in ("*.pth", LAST):
            for path in glob.glob(os.path.join(glob.escape(self.path), pattern + ASIDE)):
                _remove(path)

    def _numbered(self) -> list[tuple[int, str]]:
        """Return the checkpoints that are named by their iteration, newest first: iteration and name."""
        try:
            names = os.listdir(self.path or os.curdir)
        except OSError:
            return []
        return sorted([(n, name) for name in names if (n := _number(name)) is not None], reverse=True)


def _number(name: str) -> int | None:
    match = _NUMBERED.fullmatch(name)
    return int(match.group(1)) if match else None


def _remove(path: str) -> None:
    try:
        os.remove(path)
    except OSError as error:
        logger.warning(f"cannot delete {path}: {reason(error)}")
