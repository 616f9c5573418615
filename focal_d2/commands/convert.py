"""Convert weights of torchvision's ResNets and RetinaNet.

It writes weights.pth and the config.yaml that fits it, and loads them once to see that they fit each other.
The file is what torch.save(model.state_dict()) writes. See docs/models.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from focal_d2.commands.cli import Parser
from focal_d2.console import write
from focal_d2.errors import UserError, escaped


def add_options(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("file", type=Path, help="a file of torchvision's weights")
    parser.add_argument("--output", type=Path, required=True, help="folder for weights.pth and config.yaml")
    parser.add_argument(
        "--classes",
        metavar="all|coco|1,2,…",
        default="all",
        help="of a RetinaNet: its labels to keep, in the order of our classes; coco: the 80 of 91 that COCO "
        "uses (default: all, with the background as class 0)",
    )
    parser.add_argument(
        "--norm-eps",
        type=float,
        default=1e-5,
        help="ε of its batch norms; 0 for retinanet_resnet50_fpn_coco-eeacb38b.pth (default: 1e-5)",
    )


def run(args: argparse.Namespace) -> None:
    """Convert, write and check."""
    from focal_d2.engine.convert import convert_file

    config, converted = convert_file(
        args.file, args.output, norm_eps=args.norm_eps, classes=_labels(args.classes)
    )
    what = "RetinaNet" if converted.is_detector else "backbone"
    write(escaped(f"{what}: {len(converted.weights)} tensors; config in {config}"))


def _labels(text: str) -> list[int] | None:
    """Read the option `--classes`; None: all."""
    if text == "all":
        return None
    if text == "coco":
        from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

        return [x["id"] for x in COCO_CATEGORIES if x["isthing"]]
    parts = text.split(",")
    if not all(x.strip().isdecimal() for x in parts):
        raise UserError(f"--classes is {text}; it must be all, coco, or labels such as 1,2,3")
    return [int(x) for x in parts]
