"""Shared parts of the commands: the parser, options, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from focal_d2.console import give_up_unwritten, prepare_output, reader_is_gone, tell
from focal_d2.errors import UserError, escaped, user_message
from focal_d2.storage.configs import check_config_file, find_config
from focal_d2.storage.files import check_regular


def run_command(name: str, arguments: Sequence[str] | None = None, *, program: str | None = None) -> int:
    """Parse a command's arguments and run it.

    Args:
        name: of a module of this package, which has `add_options(parser)` and `run(args)`.
        arguments: of the command; None: those of this process.
        program: the program's name in messages; None: `focal-d2 NAME`.

    Returns:
        The exit status: 0, or what the command returns.
    """
    parser = command_parser(name, program=program)
    with command_line(parser.prog):
        parse = parser.parse_intermixed_args if parser.intermixed else parser.parse_args
        args = parse(arguments)
        if getattr(args, "config_file", None):
            # Before imports that take seconds.
            check_config_file(find_config(args.config_file), args.config_file)
        if getattr(args, "imports", None):
            from focal_d2.engine.user_modules import import_modules  # takes seconds

            import_modules(args.imports)
        return _module(name).run(args) or 0


def command_parser(name: str, *, program: str | None = None) -> Parser:
    """Return the parser of a command; see `run_command`."""
    parser = Parser(prog=program or f"focal-d2 {name}", description=_module(name).__doc__)
    _module(name).add_options(parser)
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f"focal_d2.commands.{name.replace('-', '_')}")


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Turn a user's mistake into one line on standard error and exit status 2; Ctrl-C into one, and 130.

    Args:
        program: the beginning of the line.
    """
    prepare_output(program)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        tell(f"{program}: stopped")
        raise SystemExit(130) from None
    except Exception as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            raise SystemExit(0) from None  # the reader of the output has ended (`| head`)
        message = user_message(error)
        if message is None:
            raise
        tell(f"{program}: error: {message}")
        raise SystemExit(2) from None
    finally:
        give_up_unwritten()


class Parser(argparse.ArgumentParser):
    """The parser of the commands: Python's, with three differences.

    Attributes:
        intermixed: options may stand between and after the other arguments.

    A description keeps its line breaks. The error about an option among the KEY VALUE pairs names the option.
    `~` becomes the user's folder in `--config-file` and in options of the type `Path`, because a shell does
    not replace it in `--output=~/x`.
    """

    intermixed = False

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

    def _print_message(self, message: str, file: Any = None) -> None:
        # All that argparse writes, arguments that it quotes included.
        super()._print_message(escaped(message, keep="\t\n"), file)


def add_config_options(parser: argparse.ArgumentParser, help: str = "a YAML file", **options: Any) -> None:
    """Add `--config-file`, `--import` and the KEY VALUE pairs after all options, which override the config.

    Args:
        parser: of a command.
        help: of `--config-file`.
        options: of `--config-file` for argparse; without any, it is required.
    """
    parser.add_argument("--config-file", metavar="CFG", help=help, **(options or {"required": True}))
    add_import_flag(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE …")


def add_import_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag that imports a user's modules; see `focal_d2.engine.user_modules`."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="import your own module, which registers a loss, backbone, dataset …; may be given again",
    )


def add_trust_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flags that trust files and addresses. No config has such keys, because it may be hostile."""
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
    """Check that a file can be written, before the work whose result it will contain.

    Args:
        path: of the file.
        config_file: the config, which the file must not replace.

    Raises:
        UserError: if the file cannot be written.
    """
    if path.exists() and os.path.exists(config_file) and path.samefile(config_file):
        raise UserError(f"{path} is the config itself: choose another file")
    try:
        check_regular(path)
    except OSError as error:
        raise UserError(f"{path} can't be written: {error.strerror}") from error
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} can't be written: not permitted, or in no folder that exists")
