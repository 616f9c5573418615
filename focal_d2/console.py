"""What a process prints: escapes instead of letters that a terminal lacks, and no warnings without a cure."""

from __future__ import annotations

import io
import logging
import sys
import warnings

from focal_d2.errors import user_message


def quiet() -> None:
    """Keep from a process's output what its reader cannot change."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode gets escapes
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    logging.raiseExceptions = False  # a log file on a full disk: other files that fail raise errors
    # detectron2's trainer logs the traceback of each error that stops it, before the error leaves it.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_user_error)


def _is_not_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[1] and user_message(record.exc_info[1]))
