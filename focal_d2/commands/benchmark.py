"""Compare time and memory with detectron2's RetinaNet, in one process and in alternating order.

Each number comes with a limit: the time of a part of the work that no implementation can leave out. On a busy
machine only the ratios are meaningful, not the seconds. docs/benchmarks.md has results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from focal_d2.commands.cli import Parser, add_config_options, positive
from focal_d2.console import tell, write

# The benchmarks of `focal_d2.analysis.benchmark`, which takes seconds to import.
BENCHMARKS = {
    "loss": "the classification loss, from the head's output to its gradient",
    "assign": "labels of all anchors, and the boxes that they are matched to",
    "step": "a training step without the optimizer",
    "inference": "from the head's output to detections, and the whole way from images",
    "export": "from images to detections with the files of focal-d2 export, on a CPU",
    "postprocessing": "from the head's output to detections, at several thresholds",
    "input": "from a file to the model's input, in one worker",
    "memory": "most memory of a training step beyond weights and buffers",
    "evaluation": "from a list of predictions to AP",
}
PRECISIONS = ("fp32", "bf16", "fp16")


def add_options(parser: Parser) -> None:
    """Add a subcommand for each benchmark, all with the same options."""
    subcommands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, summary in BENCHMARKS.items():
        _add_setting(subcommands.add_parser(name, help=summary))
    sweep = subcommands.add_parser("sweep", help="a step's time and memory over size, batch, classes, boxes")
    sweep.add_argument("--plot", type=Path, required=True, help="where the picture goes (PNG)")
    _add_setting(sweep)


def _add_setting(parser: argparse.ArgumentParser) -> None:
    config = "focal_retinanet_R_50_FPN_1x.yaml"
    add_config_options(parser, help="a RetinaNet (default: the paper's)", default=config)
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: CUDA where there is a device")
    parser.add_argument("--size", type=positive, default=512, help="pixels, height and width (512)")
    parser.add_argument("--batch", type=positive, default=2, help="images (2)")
    parser.add_argument("--classes", type=positive, default=80, help="(80)")
    parser.add_argument("--boxes", type=positive, default=20, help="an image (20)")
    parser.add_argument("--repeats", type=positive, default=7, help="rounds after one that warms up (7)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="(fp32)")
    parser.add_argument("--warm-memory", action="store_true", help="of a CPU: keep what is freed")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Measure, and print the figures."""
    from focal_d2.analysis import benchmark
    from focal_d2.analysis.benchmark.report import as_text, plot_sweep
    from focal_d2.analysis.benchmark.sweep import sweep_fields
    from focal_d2.engine import load_config

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
            tell(f"{row['field']} {row['value']}")
            result["rows"].append(row)
    else:
        result["rows"] = [row.as_dict() for row in benchmark.BENCHMARKS[args.what](cfg, setting)]
    write(json.dumps(result, indent=2) if args.json else as_text(result))
    if args.what == "sweep":  # after the results are printed, in case the path can't be written
        plot_sweep(result["rows"], args.plot)
