#!/usr/bin/env python
"""Train or evaluate a detector: detectron2's own arguments, any config with focal_d2's names in it."""

from focal_d2.engine import argument_parser, command_line, launch_job


def main() -> None:
    launch_job(argument_parser().parse_args())


if __name__ == "__main__":
    with command_line():
        main()
