"""Propose anchor sizes and aspect ratios that fit a config's training set.

The search uses half of the training images. The proposal is compared with the config's anchors on the other
half and on the test sets, all at training resolution. Only a training shows the effect on AP.
"""

import argparse
import json
import os
from pathlib import Path

from focal_d2.commands.cli import Parser, add_config_options, check_writable, positive
from focal_d2.console import write
from focal_d2.storage.files import create_file


def add_options(parser: Parser) -> None:
    """Add the options."""
    add_config_options(parser)
    parser.add_argument("--sizes", type=positive, metavar="N", help="on each level (default: the config's)")
    parser.add_argument("--ratios", type=positive, metavar="N", help="of each size (default: the config's)")
    parser.add_argument("--seed", type=int, default=0, help="of the halves and the search (0)")
    parser.add_argument("--output", type=Path, metavar="FILE.yaml", help="write a child of CFG that has them")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Search, compare, and print the proposal."""
    from focal_d2.analysis.anchors.fit import compare_anchors
    from focal_d2.analysis.study import check_seeds
    from focal_d2.config.architectures import require_retinanet
    from focal_d2.data.dataset_checks import check_datasets, held_out
    from focal_d2.data.datasets import load_table
    from focal_d2.engine import load_config
    from focal_d2.modeling.anchors import build_layout
    from focal_d2.modeling.build import building

    if args.output is not None:
        check_writable(args.output, args.config_file)
    (seed,) = check_seeds([args.seed], "--seed")
    cfg = load_config(args.config_file, ["MODEL.DEVICE", "cpu", *args.opts])
    require_retinanet(cfg, "the anchors that this command proposes")
    check_datasets(cfg, training=True)
    with building("anchors"):
        layout = build_layout(cfg)
    result = compare_anchors(
        cfg,
        layout,
        [load_table(name) for name in cfg.DATASETS.TRAIN],
        {name: load_table(name) for name in held_out(cfg)},
        num_sizes=args.sizes,
        num_ratios=args.ratios,
        seed=seed,
    )
    write(json.dumps(result.as_dict(), indent=2) if args.json else result.as_text())
    if args.output is not None:
        base = args.config_file
        if os.path.exists(base):  # else it is a config of this package, which every folder finds by its name
            base = os.path.relpath(base, args.output.parent)
        with create_file(args.output) as file:
            file.write(f"_BASE_: {json.dumps(base)}\n{result.chosen.as_yaml()}".encode())
