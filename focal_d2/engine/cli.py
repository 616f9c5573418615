"""What every command line shares."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from focal_d2.errors import user_message


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
