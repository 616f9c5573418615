"""Write a trained detector as ONNX or TorchScript, and check that it detects the same.

focal-d2 export --config-file output/config.yaml MODEL.WEIGHTS output/model_final.pth

It writes model.onnx and run.py, a program that runs it with NumPy, OpenCV and ONNX Runtime only. Exit status:
0 if each file detects the same as the model in Python on real pictures; 1 if not. See docs/export.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from focal_d2.commands.cli import Parser, add_config_options, add_trust_flag, positive
from focal_d2.console import tell, write
from focal_d2.errors import escaped


def add_options(parser: Parser) -> None:
    """Add the options."""
    add_config_options(parser)
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="folder for the files (default: OUTPUT_DIR/export)"
    )
    parser.add_argument(
        "--format",
        action="append",
        choices=("onnx", "torchscript", "int8"),
        help="what to write; may be given again (default: onnx)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score that run.py returns (default: the checkpoint's operating point, or 0.3)",
    )
    parser.add_argument(
        "--images",
        type=Path,
        metavar="IMAGES",
        help="an image or a folder of images to compare on (default: DATASETS.VAL, or DATASETS.TRAIN)",
    )
    parser.add_argument(
        "--pictures", type=positive, default=16, metavar="N", help="how many are compared (default: 16)"
    )
    parser.add_argument(
        "--calibration",
        type=positive,
        default=64,
        metavar="N",
        help="images of DATASETS.TRAIN that int8 is calibrated on (default: 64)",
    )
    parser.add_argument(
        "--max-loss",
        type=float,
        default=1.0,
        metavar="AP",
        help="int8 may lose so many points of AP on DATASETS.VAL (default: 1.0)",
    )
    add_trust_flag(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files, and compare them."""
    from focal_d2.engine import load_config
    from focal_d2.export import Exporter, check_validation_sets, choose_pictures, training_pictures

    trust = {"trust_files": args.trust_files, "allow_download": args.allow_download}
    cfg = load_config(args.config_file, args.opts, **trust)
    formats = list(dict.fromkeys(args.format or ["onnx"]))
    pictures = choose_pictures(cfg, args.pictures, args.images)
    calibration = []
    if "int8" in formats:
        calibration = training_pictures(cfg, args.calibration)
        check_validation_sets(cfg)
    folder = args.output or Path(cfg.OUTPUT_DIR) / "export"
    exporter = Exporter(cfg, folder, threshold=args.threshold, **trust)
    tell(f"in float32; the threshold of run.py is {exporter.threshold:.3g}")
    if cfg.TEST.AUG.ENABLED or cfg.TEST.FOCAL.TILES.ENABLED:
        tell("TEST.AUG and TEST.FOCAL.TILES are left out: the files detect in whole pictures, once")
    failed = 0
    for name in formats:
        path = exporter.write(name, calibration)
        result = (
            exporter.measure_loss(path, args.max_loss) if name == "int8" else exporter.compare(path, pictures)
        )
        write(escaped(f"{path}: {result}"))
        failed += not result.agrees
    return 1 if failed else 0
