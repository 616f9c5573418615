"""The whole examination: a config, its datasets, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from focal_d2.analysis.doctor.images import check_images, decode_all
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
from focal_d2.data.dataset_checks import check_annotations
from focal_d2.data.datasets import load_table
from focal_d2.data.mapper import build_reader
from focal_d2.engine.checks import run_checks
from focal_d2.errors import UserError
from focal_d2.modeling import FocalRetinaNet


@dataclass(frozen=True)
class DatasetFacts:
    """What there is of a dataset."""

    name: str
    use: str  # "train", "test" or "train, test"
    images: int
    without_boxes: int
    boxes: int
    ignored: int
    classes: dict[str, int]  # boxes of each, without ignored ones


@dataclass(frozen=True)
class Report:
    """What an examination found.

    Attributes:
        findings: errors first, notes last.
        datasets: those that could be read.
        anchors: None without a box to train on, or for another model than a RetinaNet.
        memory: None without an image to train on, or for another model than `FocalRetinaNet`.
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
        """Return it for JSON."""
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
    """Examine the datasets of a config, and what training would make of them. Nothing is changed.

    Args:
        cfg: full config.
        model: of `build_without_memory`.
        decode: whether to open every image; with many, that takes most of the time.

    Raises:
        UserError: for a mistake in the config.
    """
    # Mistakes that stop a job, except for those in the data, which become findings.
    run_checks(cfg, "config", "input")
    found: list[Finding] = []
    for name, times in Counter(cfg.DATASETS.TRAIN).items():
        if times > 1:
            found.append(Finding("dataset-repeated", f"each image is trained {times} times as often", name))
    tables: dict[str, Table] = {}
    # A dataset of both is read once.
    keys = dict.fromkeys(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    for name in cfg.DATASETS.TEST:
        keys.setdefault(name, "DATASETS.TEST")
    for name, key in keys.items():
        try:
            check_annotations(key, name)
            tables[name] = load_table(name)
        except UserError as error:
            found.append(Finding("dataset-unreadable", str(error), name))
    if len(tables) == len(keys):
        run_checks(cfg, "metrics")
    train = {name: tables[name] for name in cfg.DATASETS.TRAIN if name in tables}
    test = {name: tables[name] for name in cfg.DATASETS.TEST if name in tables}

    for name, table in tables.items():
        found += check_dataset(name, table)
    known = {}
    if decode:
        names = [file_name for table in tables.values() for file_name in table.file_names]
        known = decode_all(names, build_reader(cfg).read)
        for name, table in tables.items():
            found += check_images(name, table, known)
    else:
        found.append(Finding("images-unchecked", "no image was opened; leave out --no-images to check them"))
    found += check_against_config(cfg, train, test)
    digests = {file_name: image.digest for file_name, image in known.items() if image.size}
    found += check_together(cfg, train, test, digests)
    # Boxes that were read wrongly would say nothing of anchors.
    misread = {x.dataset for x in found if x.code in ("box-format", "item-unreadable")}
    anchors, wrong = anchor_facts(cfg, {name: table for name, table in train.items() if name not in misread})
    found += wrong
    found += _check_architecture(cfg, model)
    found += check_learning_rate(
        architecture=known_architecture(cfg),
        optimizer=cfg.SOLVER.FOCAL.OPTIMIZER,
        base_lr=cfg.SOLVER.BASE_LR,
        images=cfg.SOLVER.IMS_PER_BATCH,
    )
    found += [Finding("key-unread", line) for line in unread_keys(cfg)]
    return Report(
        findings=sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)),
        datasets=[_facts(name, table, name in train, name in test) for name, table in tables.items()],
        anchors=anchors,
        memory=memory_facts(cfg, model, train),
    )


def _check_architecture(cfg: CfgNode, model: nn.Module) -> list[Finding]:
    """Say what cannot be examined of the config's meta-architecture."""
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


def _facts(name: str, table: Table, in_train: bool, in_test: bool) -> DatasetFacts:
    return DatasetFacts(
        name=name,
        use=", ".join(["train"] * in_train + ["test"] * in_test),
        images=len(table),
        without_boxes=without_boxes(table),
        boxes=table.labels.size,
        ignored=int(table.ignored.sum()),
        classes=dict(class_counts({name: table})),
    )
