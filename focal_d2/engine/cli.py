"""What every command line shares."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from focal_d2.errors import UserError, user_message


@contextmanager
def command_line() -> Iterator[None]:
    """Turn a user's mistake into one line on standard error and exit status 2.

    It also hides a warning that only detectron2 can mend.
    """
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    # detectron2's trainer logs a traceback of whatever stops it before it lets it through.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_user_error)
    try:
        yield
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_not_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[1] and user_message(record.exc_info[1]))


def positive(text: str) -> int:
    """Read an option's value, a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def check_writable(path: Path) -> None:
    """See that a file can be written, before the work whose result it shall hold.

    Raises:
        UserError: if not.
    """
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} can't be written: a folder, not permitted, or in no folder that exists")
