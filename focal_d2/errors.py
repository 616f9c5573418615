"""The exception for a user's mistake, and texts that messages are made of.

A message is one line that names the file or key, the value and the choices.
"""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

# How a traceback's last line begins; a message that quotes a file may have several lines.
_RAISED = re.compile(r"^[\w.]*UserError: ", re.MULTILINE)
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: "  # of PyTorch
_LONGEST = 2000  # characters of a line that is printed
# Ends the line that refuses a file: the flag is that of focal_d2.commands.cli.add_trust_flag.
UNLESS_TRUSTED = " (unless you trust the file: --trust-files of train, eval and predict)"

# What moves a terminal's cursor, sets its colours, title or clipboard, or changes the order of letters; and
# what no encoding has.
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class UserError(ValueError):
    """A mistake in the user's input; entry points print it as one line and exit with status 2."""


def user_message(error: BaseException) -> str | None:
    """Find the user's line in `error`, or None if it is a fault of the program.

    A disk that is full or read-only, and memory that is too small, are the user's as well. Data loader
    workers and spawned ranks re-raise with a formatted traceback as the message; its end then carries the
    original error. The line is cut in the middle if it is long: a hostile file may have a name of a megabyte
    in it.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"{error.filename or 'output'}: {error.strerror}"
    if isinstance(error, UnicodeEncodeError) and error.encoding == sys.getfilesystemencoding() != "utf-8":
        return (
            f"{error.object!a} can't be written in this system's encoding {error.encoding}: set PYTHONUTF8=1"
        )
    text = str(error).strip()
    if isinstance(error, RuntimeError) and _NO_MEMORY in text:
        return f"out of memory: {text.split(_NO_MEMORY, 1)[1]}"
    raised = [*_RAISED.finditer(text)] if "\n" in text else []
    if raised and "\nTraceback" not in text[raised[-1].end() :]:
        return one_line(text[raised[-1].end() :], _LONGEST)
    return one_line(text, _LONGEST) if isinstance(error, UserError) else None


def escaped(text: str, *, keep: str = "\t") -> str:
    """Write control characters as Python does (`\\x1b`), so that they do nothing to a terminal.

    Args:
        text: of any characters. One that was escaped stays as it is.
        keep: characters that stay; "\\n" for a text that was put together of lines.
    """
    return _CONTROL.sub(
        lambda match: match[0] if match[0] in keep else match[0].encode("unicode_escape").decode(), text
    )


def escaped_rows(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Escape the texts in a table's rows, where a line break would begin another row."""
    return [[escaped(cell) if isinstance(cell, str) else cell for cell in row] for row in rows]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name that is nearest, upper and lower case alike, or ""."""
    by_case = {x.lower(): x for x in known}
    near = difflib.get_close_matches(name.lower(), by_case, n=1)
    return f"; did you mean {by_case[near[0]]}?" if near else ""


def first_few(texts: Iterable[object], most: int = 5, separator: str = ", ") -> str:
    """List the first texts, and count the others.

    Args:
        texts: of any type that `str` takes.
        most: how many are listed.
        separator: between two texts.

    Examples:
        >>> first_few("abcde", 3), first_few("ab", 3)
        ('a, b, c, and 2 more', 'a, b')
    """
    parts = [str(text) for text in texts]
    others = [f"and {len(parts) - most} more"] if len(parts) > most else []
    return separator.join(parts[:most] + others)


def one_line(text: object, most: int = 300) -> str:
    """Write a text, or the message of an error, in one line. The middle of a long text is left out.

    Args:
        text: of any number of lines.
        most: number of characters to keep: two thirds from the beginning, one third from the end.
    """
    line = " ".join(str(text).split())
    end = most // 3
    return line if len(line) <= most else f"{line[: most - end]} … {line[-end:]}"


def reason(error: BaseException) -> str:
    """Return the cause of an error in one line, without the file's name, which messages give themselves."""
    return getattr(error, "strerror", None) or one_line(error) or type(error).__name__


def describe_error(error: BaseException, *, lines: int | None = None) -> str:
    """Return the type of an error and its message in one line.

    Args:
        error: one that others raise; its message alone may say too little.
        lines: how many lines of the message to keep; None: all.
    """
    message = "\n".join(str(error).strip().split("\n")[:lines])
    return one_line(f"{type(error).__name__}: {message}" if message else type(error).__name__)
