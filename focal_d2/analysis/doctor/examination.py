"""Examine a config and its datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from torch import nn

from focal_d2.analysis.doctor.images import Decoded, check_images, decode_all
from focal_d2.analysis.doctor.training import (
    AnchorFacts,
    MemoryFacts,
    anchor_facts,
    check_learning_rate,
    memory_facts,
)
from focal_d2.annotations import Table
from focal_d2.config.architectures import is_retinanet, known_architecture
from focal_d2.config.unread_keys import unread_keys
from focal_d2.data.checks.classes import class_counts
from focal_d2.data.checks.findings import Finding
from focal_d2.data.checks.images import without_boxes
from focal_d2.data.checks.kinds import ERROR, SEVERITIES
from focal_d2.data.checks.run import check_against_config, check_dataset, check_together
from focal_d2.data.dataset_checks import check_annotations, datasets_of, held_out
from focal_d2.data.datasets import load_table
from focal_d2.data.mapper import build_reader
from focal_d2.engine.checks import run_checks
from focal_d2.errors import UserError
from focal_d2.modeling import FocalRetinaNet

# What a dataset is for -> the key of DATASETS that names it.
USES = {"train": "TRAIN", "validate": "VAL", "test": "TEST"}


@dataclass(frozen=True)
class DatasetFacts:
    """The contents of a dataset in numbers."""

    name: str
    use: str  # "train", "validate", "test", or several of them
    images: int
    without_boxes: int
    boxes: int
    ignored: int
    classes: dict[str, int]  # boxes of each, without ignored ones


@dataclass(frozen=True)
class Report:
    """The result of an examination.

    Attributes:
        findings: errors first, notes last.
        datasets: the datasets that could be read.
        anchors: None if there is no box to train on, or if the model is not a RetinaNet.
        memory: None if there is no image to train on, or if the model is not a `FocalRetinaNet`.
    """

    findings: Sequence[Finding]
    datasets: Sequence[DatasetFacts]
    anchors: AnchorFacts | None
    memory: MemoryFacts | None

    def count(self, severity: str) -> int:
        """Count the findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def healthy(self) -> bool:
        """Whether no error was found."""
        return not self.count(ERROR)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        anchors = self.anchors and {k: v for k, v in asdict(self.anchors).items() if k != "extents"}
        if anchors:
            for key in ("by_size", "by_class", "levels"):
                anchors[key] = [x._asdict() for x in anchors[key]]
        return {
            **{f"{severity}s": self.count(severity) for severity in SEVERITIES},
            "findings": [finding.as_dict() for finding in self.findings],
            "datasets": [asdict(dataset) for dataset in self.datasets],
            "anchors": anchors,
            "memory": self.memory and {**asdict(self.memory), "total": self.memory.total},
        }


def examine(cfg: CfgNode, model: nn.Module, *, decode: bool) -> Report:
    """Examine the datasets of a config, and how training would use them. Nothing is changed.

    Args:
        cfg: full config.
        model: of `build_without_memory`.
        decode: whether to open every image, which takes most of the time if there are many.

    Raises:
        UserError: for a mistake in the config.
    """
    # Mistakes that stop a job, except for those in the data, which become findings.
    run_checks(cfg, "config", "input")
    tables, findings = _read_tables(cfg)
    if len(tables) == len(datasets_of(cfg, training=True)):
        run_checks(cfg, "metrics")
    train = {name: tables[name] for name in cfg.DATASETS.TRAIN if name in tables}
    test = {name: tables[name] for name in held_out(cfg) if name in tables}
    for name, table in tables.items():
        findings += check_dataset(name, table)
    images, image_findings = _check_images(cfg, tables, decode=decode)
    findings += image_findings
    findings += check_against_config(cfg, train, test)
    digests = {file_name: image.digest for file_name, image in images.items() if image.size}
    findings += check_together(cfg, train, test, digests)
    # Facts about anchors would be wrong with boxes that were read wrongly.
    misread = {x.dataset for x in findings if x.code in ("box-format", "item-unreadable")}
    # An image above the limit cannot be trained on, and its anchors could fill the memory.
    readable = {
        name: _without_large_images(table, cfg.INPUT.FOCAL.MAX_PIXELS) for name, table in train.items()
    }
    anchors, anchor_findings = anchor_facts(
        cfg, {name: table for name, table in readable.items() if name not in misread}
    )
    findings += anchor_findings
    findings += _check_architecture(cfg, model)
    findings += check_learning_rate(
        architecture=known_architecture(cfg),
        optimizer=cfg.SOLVER.FOCAL.OPTIMIZER,
        base_lr=cfg.SOLVER.BASE_LR,
        images=cfg.SOLVER.IMS_PER_BATCH,
    )
    findings += [Finding("key-unread", line) for line in unread_keys(cfg)]
    return Report(
        findings=sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)),
        datasets=[_facts(cfg, name, table) for name, table in tables.items()],
        anchors=anchors,
        memory=memory_facts(cfg, model, readable),
    )


def _without_large_images(table: Table, max_pixels: int) -> Table:
    kept = np.flatnonzero(table.sizes.astype(float).prod(1) <= max_pixels)
    return table if len(kept) == len(table) else table.of_images(kept.tolist())


def _read_tables(cfg: CfgNode) -> tuple[dict[str, Table], list[Finding]]:
    """Read each dataset once, also one for training and test; return those that can be read, by name."""
    findings = [
        Finding("dataset-repeated", f"each image is trained {times} times as often", name)
        for name, times in Counter(cfg.DATASETS.TRAIN).items()
        if times > 1
    ]
    tables: dict[str, Table] = {}
    for name in datasets_of(cfg, training=True):
        key = next(key for key in USES.values() if name in cfg.DATASETS[key])
        try:
            check_annotations(f"DATASETS.{key}", name)
            tables[name] = load_table(name)
        except UserError as error:
            findings.append(Finding("dataset-unreadable", str(error), name))
    return tables, findings


def _check_images(
    cfg: CfgNode, tables: Mapping[str, Table], *, decode: bool
) -> tuple[dict[str, Decoded], list[Finding]]:
    """Open all images if `decode` is True; return their sizes and hashes, by file name."""
    if not decode:
        message = "no image was opened; leave out --no-images to check them"
        return {}, [Finding("images-unchecked", message)]
    names = [file_name for table in tables.values() for file_name in table.file_names]
    images = decode_all(names, build_reader(cfg).read)
    return images, [x for name, table in tables.items() for x in check_images(name, table, images)]


def _check_architecture(cfg: CfgNode, model: nn.Module) -> list[Finding]:
    """Return a finding that names what cannot be examined with the config's meta-architecture."""
    unexamined = []
    if known_architecture(cfg) is None:
        unexamined.append("number of classes")
    if not is_retinanet(cfg):
        unexamined.append("anchors, and their balance")
    if not isinstance(model, FocalRetinaNet):
        unexamined.append("memory of a training step")
    if not unexamined:
        return []
    message = f"not examined of {cfg.MODEL.META_ARCHITECTURE}: {'; '.join(unexamined)}"
    return [Finding("architecture-unexamined", message)]


def _facts(cfg: CfgNode, name: str, table: Table) -> DatasetFacts:
    return DatasetFacts(
        name=name,
        use=", ".join(use for use, key in USES.items() if name in cfg.DATASETS[key]),
        images=len(table),
        without_boxes=without_boxes(table),
        boxes=table.labels.size,
        ignored=int(table.ignored.sum()),
        classes=dict(class_counts({name: table})),
    )
