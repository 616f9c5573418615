"""Examine a config, its datasets and how they fit the model, before a training costs hours.

It reads images and annotations and does not change them. Exit status: 0 if there is no error, 1 if there is
one, 2 for a mistake in the config or the command. docs/doctor.md lists all findings.
"""

import argparse
import json
import logging
from pathlib import Path

from focal_d2.commands.cli import Parser, add_config_options, check_writable
from focal_d2.console import write
from focal_d2.storage.files import create_file


def add_options(parser: Parser) -> None:
    """Add the options."""
    add_config_options(parser, help="the config that will be trained")
    parser.add_argument("--json", action="store_true", help="print all findings and facts as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots and thumbnails")
    parser.add_argument(
        "--fix-list", action="store_true", help="print a child of CFG that corrects what a config can"
    )
    parser.add_argument(
        "--no-images", action="store_true", help="check the annotations only: no file is opened"
    )


def run(args: argparse.Namespace) -> int:
    """Examine, and print the report."""
    from focal_d2.analysis.doctor import as_fix_list, as_page, as_text, examine
    from focal_d2.engine import load_config
    from focal_d2.modeling.build import build_without_memory, building

    # detectron2's log records are not part of the report.
    logging.getLogger("detectron2").addHandler(logging.NullHandler())
    if args.html:
        check_writable(args.html, args.config_file)
    # Nothing is computed, so the config's device need not exist.
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    with building("model"):
        model = build_without_memory(cfg)
    report = examine(cfg, model, decode=not args.no_images)
    if args.html:
        most = None if args.no_images else cfg.INPUT.FOCAL.MAX_PIXELS
        page = as_page(report, title=args.config_file, max_pixels=most)
        with create_file(args.html) as file:
            file.write(page.encode(errors="replace"))
    if args.json:
        write(json.dumps(report.as_dict(), indent=1))
    elif args.fix_list:
        write(as_fix_list(report, base=args.config_file))
    else:
        write(as_text(report))
    return 0 if report.healthy else 1
