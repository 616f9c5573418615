#!/usr/bin/env python
"""Time and memory beside detectron2's RetinaNet, in one process, turn by turn.

Each figure has a limit beside it: a part of the work that stays, whatever is done to the rest. Ratios mean
something on a busy machine, seconds do not. docs/benchmarks.md has the results of a real run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from focal_d2.analysis import benchmark
from focal_d2.analysis.benchmark.report import as_text, plot_sweep
from focal_d2.analysis.benchmark.sweep import sweep_fields
from focal_d2.engine import Parser, command_line, load_config, positive

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "focal_retinanet_R_50_FPN_1x.yaml"


def main() -> None:
    parser = Parser(description=__doc__)
    subcommands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, run in benchmark.BENCHMARKS.items():
        add_options(subcommands.add_parser(name, help=(run.__doc__ or "").splitlines()[0]))
    sweep = subcommands.add_parser("sweep", help="A step's time and memory over size, batch, classes, boxes.")
    sweep.add_argument("--plot", type=Path, required=True, help="where the picture goes (PNG)")
    add_options(sweep)
    args = parser.parse_args()

    cfg = load_config(args.config_file, ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", *args.opts])
    given = {key: value for key, value in vars(args).items() if key in benchmark.Setting._fields}
    setting = benchmark.Setting(**{**given, "device": cfg.MODEL.DEVICE})
    result: dict[str, Any] = {
        "benchmark": args.what,
        "setting": {**setting._asdict(), "warm_memory": args.warm_memory and benchmark.keep_memory()},
        "hardware": benchmark.hardware(setting.device),
    }
    if args.what == "sweep":
        result["rows"] = []
        for row in sweep_fields(cfg, setting):
            print(f"{row['field']} {row['value']}", file=sys.stderr, flush=True)
            result["rows"].append(row)
    else:
        result["rows"] = [row.as_dict() for row in benchmark.BENCHMARKS[args.what](cfg, setting)]
    print(json.dumps(result, indent=2) if args.json else as_text(result), flush=True)
    if args.what == "sweep":  # after the figures are out: a path that can't be written loses none
        plot_sweep(result["rows"], args.plot)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", default=str(CONFIG), help="a RetinaNet (default: the paper's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA where there is a device")
    parser.add_argument("--size", type=positive, default=512, help="pixels, height and width (512)")
    parser.add_argument("--batch", type=positive, default=2, help="images (2)")
    parser.add_argument("--classes", type=positive, default=80, help="(80)")
    parser.add_argument("--boxes", type=positive, default=20, help="an image (20)")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds after one that warms up (7)")
    parser.add_argument("--precision", choices=benchmark.PRECISIONS, default="fp32", help="(fp32)")
    parser.add_argument("--warm-memory", action="store_true", help="of a CPU: keep what is freed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE …")


if __name__ == "__main__":
    with command_line():
        main()
