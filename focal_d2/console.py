"""What a program prints and logs: it reaches its reader, and what comes from files does nothing there."""

from __future__ import annotations

import codecs
import functools
import io
import locale
import logging
import os
import re
import select
import sys
import traceback
import warnings
from contextlib import suppress
from types import TracebackType

from focal_d2.errors import escaped, user_message

# The sequences by which detectron2, fvcore and Pygments colour what they log.
_COLOUR = re.compile(r"\x1b\[(?:0?[0-57]|[39][0-7]|39|49|[34]8;5;\d{1,3})(?:;0?[0-57]|;[39][0-7]|;39|;49)*m")
_COLOURED = ("detectron2", "fvcore")
# Where they stay: in the config, which is read and has no control characters by then. Elsewhere names of
# classes or weights stand beside them, which may have such sequences of their own.
_STAYS_COLOURED = "detectron2.engine.defaults"


def prepare_output(program: str = "") -> None:
    """Prepare a process's output: every program calls this first, in each of its processes.

    What its reader can't mend is kept from it. What comes from files shows itself and does nothing: control
    characters in records of any logger, in warnings and in tracebacks are escaped here; `write` and `tell`
    escape what a program prints.

    Args:
        program: the beginning of lines on an output that is closed, and on a locale; "": there are none.
    """
    if program and sys.stdout is None:
        _open_closed_streams()
        tell(f"{program}: standard output is closed: what is printed there is lost")
    _open_closed_streams()
    if _encoding_is_ascii(locale.getpreferredencoding(False)):
        with suppress(locale.Error):  # files that are opened without an encoding: log.txt, the config
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode gets escapes
    sys.excepthook = _show_fault
    warnings.formatwarning = _format_warning
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
    warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    logging.raiseExceptions = False  # a log file on a full disk; what else can't be written is told
    logging.setLogRecordFactory(_Record)
    # detectron2's trainer logs a traceback of whatever stops it before it lets it through.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_user_error)
    if program and _encoding_is_ascii(sys.getfilesystemencoding()):
        _tell_once(
            f"{program}: this locale has ASCII only: files whose names have other letters are not found; "
            "set PYTHONUTF8=1"
        )


def write(text: str) -> None:
    """Print a result, of one line or several; what of a line comes from files must be `escaped` before."""
    print(escaped(text, keep="\t\n"), flush=True)


def tell(line: str) -> None:
    """Print one line on standard error, if anyone reads it."""
    with suppress(OSError):
        print(escaped(line), file=sys.stderr, flush=True)


def reader_is_gone() -> bool:
    """Return whether standard output or error is a pipe that nobody reads any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a test's stream has no number
            poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def give_up_unwritten() -> None:
    """Drop what can't be written: Python would try again at its end, and fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@functools.cache
def _tell_once(line: str) -> None:
    tell(line)


class _Record(logging.LogRecord):
    """A record whose text is escaped, whichever handler writes it.

    Line breaks in our own records are escaped as well, unless `extra` has `lines`; records of other loggers
    have lines by design. The colours of the config that detectron2 logs stay; others of its are left out.
    """

    def getMessage(self) -> str:
        """Return the text."""
        text = super().getMessage()
        if not self.name.startswith(_COLOURED):
            is_line = self.name.startswith("focal_d2") and not hasattr(self, "lines")
            return escaped(text, keep="\t" if is_line else "\t\n")
        if self.name != _STAYS_COLOURED:
            return escaped(_COLOUR.sub("", text), keep="\t\n")
        parts = [escaped(part, keep="\t\n") for part in _COLOUR.split(text)]
        return "".join(x + colour for x, colour in zip(parts, [*_COLOUR.findall(text), ""], strict=True))

    @property
    def exc_text(self) -> str | None:
        """The traceback, which the first handler formats."""
        return self._exc_text

    @exc_text.setter
    def exc_text(self, text: str | None) -> None:
        self._exc_text = text and escaped(text, keep="\t\n")


def _is_not_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[1] and user_message(record.exc_info[1]))


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"{escaped(f'{filename}:{lineno}: {category.__name__}: {message}')}\n"


def _show_fault(kind: type[BaseException], error: BaseException, place: TracebackType | None) -> None:
    lines = "".join(traceback.format_exception(kind, error, place))
    with suppress(OSError):
        print(escaped(lines, keep="\t\n"), file=sys.stderr, end="", flush=True)


def _open_closed_streams() -> None:
    """Open what the caller closed (`>&-`): else the next file that is opened gets what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest free number
        if getattr(sys, name) is None:
            file = io.FileIO(os.devnull, "w" if number else "r")
            buffer = io.BufferedWriter(file) if number else io.BufferedReader(file)
            setattr(sys, name, io.TextIOWrapper(buffer, "utf-8", line_buffering=True))


def _encoding_is_ascii(name: str) -> bool:
    return codecs.lookup(name).name == "ascii"
