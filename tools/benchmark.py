#!/usr/bin/env python
"""Time and memory beside detectron2's RetinaNet, in one process, turn by turn.

Each figure has a limit beside it: work that no implementation can do without. Ratios mean something on a busy
machine, seconds do not. docs/benchmarks.md has the results of a real run.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from focal_d2.analysis import benchmark
from focal_d2.engine import command_line, load_config

CONFIG = Path(__file__).resolve().parent.parent / "configs" / "focal_retinanet_R_50_FPN_1x.yaml"
SWEEP = {
    "size": [128, 256, 384, 512],
    "batch": [1, 2, 4, 8],
    "classes": [1, 20, 80, 365, 1203],
    "boxes": [1, 10, 100, 1000],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subcommands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, run in benchmark.BENCHMARKS.items():
        _add_options(subcommands.add_parser(name, help=(run.__doc__ or "").splitlines()[0]))
    sweep = subcommands.add_parser("sweep", help="A step's time and memory over size, batch, classes, boxes.")
    sweep.add_argument("--plot", type=Path, required=True, help="where the picture goes (PNG)")
    _add_options(sweep)
    args = parser.parse_args()

    overrides = ["MODEL.DEVICE", args.device, "MODEL.WEIGHTS", "", *args.opts]
    cfg = load_config(args.config_file, overrides)
    setting = benchmark.Setting(
        device=cfg.MODEL.DEVICE,
        size=args.size,
        batch=args.batch,
        classes=args.classes,
        boxes=args.boxes,
        repeats=args.repeats,
        precision=args.precision,
    )
    warm = args.warm_memory and benchmark.keep_memory()
    result: dict[str, Any] = {
        "benchmark": args.what,
        "setting": {**setting._asdict(), "warm_allocator": warm},
        "hardware": benchmark.hardware(cfg.MODEL.DEVICE),
    }
    if args.what == "sweep":
        result["rows"] = []
        for row in benchmark.sweep(cfg, setting, SWEEP):
            print(f"{row['field']} {row['value']}", file=sys.stderr, flush=True)
            result["rows"].append(row)
        benchmark.plot_sweep(result["rows"], args.plot)
    else:
        result["rows"] = [row.as_dict() for row in benchmark.BENCHMARKS[args.what](cfg, setting)]
    print(json.dumps(result, indent=2) if args.json else benchmark.as_text(result))


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config-file", default=str(CONFIG), help="a RetinaNet (default: the paper's)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA where there is a device")
    parser.add_argument("--size", type=_positive, default=512, help="pixels, height and width (512)")
    parser.add_argument("--batch", type=_positive, default=2, help="images (2)")
    parser.add_argument("--classes", type=_positive, default=80, help="(80)")
    parser.add_argument("--boxes", type=_positive, default=20, help="an image (20)")
    parser.add_argument("--repeats", type=_positive, default=7, help="rounds after one that warms up (7)")
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], default="fp32", help="ours; on CUDA detectron2's too"
    )
    parser.add_argument(
        "--warm-memory",
        action="store_true",
        help="on a CPU, keep freed memory instead of giving it back to the system, which then clears it anew",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides, KEY VALUE …")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


if __name__ == "__main__":
    with command_line():
        main()
