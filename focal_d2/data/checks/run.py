"""The checks of annotations that a run and the doctor make; no image is opened.

The doctor reports all findings; a training prints the errors and warnings before it trains. 100,000 boxes
take less than a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from detectron2.config import CfgNode

from focal_d2.annotations import Table
from focal_d2.config import key_value
from focal_d2.config.architectures import class_key, is_retinanet
from focal_d2.data.checks.boxes import check_boxes
from focal_d2.data.checks.classes import check_classes
from focal_d2.data.checks.examples import MOST_EXAMPLES
from focal_d2.data.checks.findings import Finding
from focal_d2.data.checks.images import check_items, check_negatives
from focal_d2.data.checks.kinds import NOTE
from focal_d2.data.checks.limits import check_crops, check_limits, check_pixels
from focal_d2.data.checks.overlap import check_repeats, check_sides, check_validation
from focal_d2.data.dataset_checks import held_out
from focal_d2.data.datasets import load_known_tables
from focal_d2.data.resolution import large_windows
from focal_d2.errors import first_few

# What reading a dataset warns of already.
_ANNOUNCED = ("box-degenerate", "box-outside")

# Lines and examples that a training run prints.
_MOST_LINES, _EXAMPLES_IN_A_LINE = 8, 2


def annotation_warnings(cfg: CfgNode, *, training: bool) -> list[str]:
    """Say what is wrong with the annotations of a run: a line a kind, with counts and the first examples.

    Datasets are left out that detectron2 or a program registered as records: to read them takes time. Boxes
    without area and boxes outside their image are left out, too: `announce` counts them.

    Args:
        cfg: full config.
        training: whether `DATASETS.TRAIN` and `DATASETS.VAL` are used, besides `DATASETS.TEST`.
    """
    sides = (cfg.DATASETS.TRAIN, held_out(cfg)) if training else ((), cfg.DATASETS.TEST)
    tables = load_known_tables([name for names in sides for name in names])
    train, test = ({name: tables[name] for name in names if name in tables} for names in sides)
    findings = [finding for name, table in tables.items() for finding in check_dataset(name, table)]
    findings += check_against_config(cfg, train, test)
    if all(name in tables for names in sides for name in names):
        findings += check_together(cfg, train, test)
    of_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.severity != NOTE and finding.code not in _ANNOUNCED:
            of_kind[finding.code].append(finding)
    lines = [_line(code, findings) for code, findings in of_kind.items()]
    if len(lines) > _MOST_LINES:
        others = [*of_kind][_MOST_LINES:]
        lines[_MOST_LINES:] = [f"and {len(others)} other kinds: {', '.join(others)}"]
    if lines:
        lines.append("focal-d2 doctor says more about these, and checks the images (docs/doctor.md)")
    return lines


def _line(code: str, findings: Sequence[Finding]) -> str:
    parts = [f"{f.dataset}: {f.message}" if f.dataset else f.message for f in findings]
    examples = [str(example) for f in findings for example in f.examples][:_EXAMPLES_IN_A_LINE]
    shown = f" (first: {'; '.join(examples)})" if examples else ""
    return f"{code}: {first_few(parts, MOST_EXAMPLES, '; ')}{shown}"


def check_dataset(name: str, table: Table) -> list[Finding]:
    """Run all checks of one dataset.

    Args:
        name: the dataset's.
        table: its annotations.
    """
    notes = [Finding("annotations-read", note, name) for note in (*table.warnings, *table.notes)]
    return [*check_items(name, table), *check_boxes(name, table), *notes]


def check_against_config(
    cfg: CfgNode, train: Mapping[str, Table], test: Mapping[str, Table]
) -> list[Finding]:
    """Run all checks of what the config makes of the boxes.

    Args:
        cfg: full config.
        train: the datasets to train on, by name.
        test: those to test on.

    Raises:
        UserError: see `large_windows`.
    """
    limits = {"TEST.DETECTIONS_PER_IMAGE": cfg.TEST.DETECTIONS_PER_IMAGE}
    if is_retinanet(cfg):
        limits["MODEL.RETINANET.TOPK_CANDIDATES_TEST"] = cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST
    # A training image that is cropped is never seen with all of its boxes.
    whole = {} if cfg.INPUT.CROP.ENABLED or cfg.INPUT.FOCAL.BOX_CROP.SIZE else train
    # Of a picture that is detected in tiles, the limits count for each tile.
    in_tiles = cfg.TEST.FOCAL.TILES.ENABLED
    findings = check_limits({**whole, **({} if in_tiles else test)}, limits)
    findings += check_pixels({**train, **test}, cfg.INPUT.FOCAL.MAX_PIXELS)
    for name, table in train.items():
        findings += check_crops(name, table, large_windows(cfg, table.sizes))
    return findings


def check_together(
    cfg: CfgNode,
    train: Mapping[str, Table],
    test: Mapping[str, Table],
    digests: Mapping[str, bytes] | None = None,
) -> list[Finding]:
    """Run all checks of the datasets against each other and against the config.

    Args:
        cfg: full config.
        train: the datasets to train on, by name.
        test: those to validate and to test on.
        digests: see `check_repeats`.
    """
    digests = digests or {}
    counted_by = class_key(cfg)
    num_classes = key_value(cfg, counted_by) if counted_by else None
    readable = [{name: t for name, t in side.items() if not t.problems} for side in (train, test)]
    return [
        *check_negatives(*readable, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS),
        *check_classes(train, test, counted_by=counted_by or "", num_classes=num_classes),
        *check_sides(train, test),
        *check_repeats(train, test, digests),
        *check_validation(test, cfg.DATASETS.VAL, cfg.DATASETS.TEST, digests),
    ]
