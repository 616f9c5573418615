"""List the configs that come with this package.

--config-file and _BASE_ accept these names in any folder, and --grid of a study those under grids/. If a file
with such a path exists, it is used instead.
"""

import argparse

from focal_d2.commands.cli import Parser
from focal_d2.console import write
from focal_d2.storage.configs import packaged_configs, packaged_folder


def add_options(parser: Parser) -> None:
    """Add the option."""
    parser.add_argument("--folder", action="store_true", help="print the folder that they are in")


def run(args: argparse.Namespace) -> None:
    """Print each name, with the first line of its header."""
    folder = packaged_folder()
    if args.folder:
        write(str(folder))
        return
    names = packaged_configs()
    width = max(map(len, names), default=0)
    for name in names:
        with (folder / name).open(encoding="utf-8") as file:
            write(f"{name:{width}}  {file.readline().removeprefix('#').strip()}")
