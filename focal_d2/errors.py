"""The one exception for a user's mistake: one line that names the file or key, the value and the choices."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable

_PREFIX = "UserError: "
# Ends the line that refuses a file: the flag is that of focal_d2.commands.cli.add_trust_flag.
UNLESS_TRUSTED = " (unless you trust the file: --trust-files of train, eval and predict)"


class UserError(ValueError):
    """A mistake in the user's input; entry points print it as one line and exit with status 2."""


def user_message(error: BaseException) -> str | None:
    """Find the user's line in `error`, or None if it is a fault of the program.

    A disk that is full or read-only is the user's as well. Data loader workers and spawned ranks re-raise
    with a formatted traceback as the message; its last line then carries the original error.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"{error.filename or 'output'}: {error.strerror}"
    text = str(error).strip()
    last = text.rsplit("\n", 1)[-1]
    if _PREFIX in last and "\n" in text:
        return last.split(_PREFIX, 1)[1]
    return " ".join(text.split()) if isinstance(error, UserError) else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name that is nearest, upper and lower case alike, or ""."""
    by_case = {x.lower(): x for x in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return f"; did you mean {by_case[near[0]]}?" if near else ""
