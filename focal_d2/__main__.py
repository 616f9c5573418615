"""The command `focal-d2`, also as `python -m focal_d2`."""

import argparse
import sys

import focal_d2
from focal_d2.commands import COMMANDS
from focal_d2.commands.cli import Parser, command_line, run_command


def main() -> int:
    """Run the command that the arguments name; returns the exit status."""
    width = max(map(len, COMMANDS))
    summaries = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    parser = Parser(
        prog="focal-d2",
        description="Focal-loss RetinaNet on detectron2.",
        epilog="\n".join(["commands:", *summaries, "", "focal-d2 COMMAND --help says more about one."]),
    )
    parser.add_argument("--version", action="version", version=f"focal-d2 {focal_d2.__version__}")
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="of the command")
    with command_line("focal-d2"):
        args = parser.parse_args()
    return run_command(args.command, args.arguments)


if __name__ == "__main__":
    sys.exit(main())
