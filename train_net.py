#!/usr/bin/env python
"""Train or evaluate a detector: detectron2's own arguments, any config with focal_d2's names in it."""

from focal_d2.engine import command_line, default_argument_parser, launch_job


def main() -> None:
    launch_job(default_argument_parser().parse_args())


if __name__ == "__main__":
    with command_line():
        main()
