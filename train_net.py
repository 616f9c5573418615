#!/usr/bin/env python
"""Train or evaluate a detector: detectron2's own arguments, any config with focal_d2's names in it."""

import sys

from focal_d2.commands.cli import run_command


def main() -> int:
    return run_command("train", program="train_net.py")


if __name__ == "__main__":
    sys.exit(main())
