"""What every command line shares."""

from __future__ import annotations

import argparse
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from detectron2.engine import default_argument_parser

from focal_d2.errors import UserError, user_message


def quiet() -> None:
    """Keep from a process's output what its reader can't mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without Unicode gets escapes
    warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    logging.raiseExceptions = False  # a log file on a full disk; what else can't be written is told
    # detectron2's trainer logs a traceback of whatever stops it before it lets it through.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_not_user_error)


@contextmanager
def command_line() -> Iterator[None]:
    """Turn a user's mistake into one line on standard error and exit status 2; Ctrl-C into one, and 130."""
    quiet()
    program = os.path.basename(sys.argv[0])
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Who read the output has seen enough (`| head`); Python must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_not_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and record.exc_info[1] and user_message(record.exc_info[1]))


class Parser(argparse.ArgumentParser):
    """The parser of the tools: Python's, with three differences.

    A description keeps its lines. An option among the KEY VALUE pairs is named as that. `~` becomes the
    user's folder in `--config-file` and options of the type `Path`: a shell leaves `--output=~/x` as it is.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """See `argparse.ArgumentParser`."""
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """See `argparse.ArgumentParser.parse_known_args`."""
        values, rest = super().parse_known_args(*args, **kwargs)
        if getattr(values, "config_file", None):
            values.config_file = os.path.expanduser(values.config_file)
        return values, rest

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        given = [x for x in re.findall(r"--[\w-]+", message) if x in sys.argv]
        if "required" in message and given:
            message = f"{given[0]} must come before the KEY VALUE pairs"
        super().error(message)


def argument_parser() -> argparse.ArgumentParser:
    """Return detectron2's parser with our flags beside its own."""
    parser = default_argument_parser()
    add_trust_flag(parser)
    return parser


def add_trust_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flags that trust files and addresses. No config has such keys: it may itself be hostile."""
    parser.add_argument(
        "--trust-files",
        action="store_true",
        help="let the config and the checkpoint run code, as detectron2 does (default: refused)",
    )
    parser.add_argument(
        "--allow-download",
        action="store_true",
        help="let MODEL.WEIGHTS and _BASE_ be addresses outside detectron2's stores (default: refused)",
    )


def positive(text: str) -> int:
    """Read an option's value, a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def check_writable(path: Path, config_file: str) -> None:
    """See that a file can be written, before the work whose result it shall hold.

    Args:
        path: of the file.
        config_file: which it must not replace.

    Raises:
        UserError: if not.
    """
    if path.exists() and os.path.exists(config_file) and path.samefile(config_file):
        raise UserError(f"{path} is the config itself: choose another file")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} can't be written: a folder, not permitted, or in no folder that exists")
