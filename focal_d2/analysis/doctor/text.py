"""The doctor's report for the terminal, and the config lines that correct what a config can correct."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from tabulate import tabulate

from focal_d2.analysis.doctor.examination import USES, DatasetFacts, Report
from focal_d2.analysis.doctor.training import AnchorFacts, MemoryFacts, Share, odds
from focal_d2.data.checks.findings import Finding, Fix
from focal_d2.data.checks.kinds import NOTE, SEVERITIES
from focal_d2.errors import escaped, escaped_rows, first_few

# Classes that a terminal lists.
_MOST_CLASSES = 20


def as_text(report: Report) -> str:
    """Write the report for a terminal: first the errors and warnings, then the facts."""
    parts = [findings_text(report), _datasets(report), _classes(report)]
    if report.anchors:
        parts.append(_anchors(report.anchors))
    if report.memory:
        parts.append(memory_line(report.memory))
    parts.append("\n".join(["Notes", *(f"- {note}" for note in notes(report))]) if notes(report) else "")
    return "\n\n".join(part for part in parts if part)


def findings_text(report: Report) -> str:
    """Write the errors and warnings, and how many there are."""
    found = [_finding(finding) for finding in report.findings if finding.severity != NOTE]
    return "\n\n".join([summary(report), *found])


def summary(report: Report) -> str:
    """Count the errors and warnings in words."""
    counts = [(report.count(severity), severity) for severity in SEVERITIES if severity != NOTE]
    return ", ".join(f"{n} {severity}{'' if n == 1 else 's'}" for n, severity in counts)


def notes(report: Report) -> list[str]:
    """List the notes."""
    return [_sentence(finding) for finding in report.findings if finding.severity == NOTE]


def _sentence(finding: Finding) -> str:
    return escaped(f"{finding.dataset}: {finding.message}" if finding.dataset else finding.message)


def _finding(finding: Finding) -> str:
    lines = [f"{finding.severity} {finding.code}", f"  {_sentence(finding)}"]
    lines += [f"    {escaped(str(example))}" for example in finding.examples]
    if finding.count > len(finding.examples) > 0:
        lines.append("    …")
    lines.append(f"  What to do: {finding.remedy}.")
    return "\n".join(lines)


def _datasets(report: Report) -> str:
    rows = [[d.name, d.use, d.images, d.without_boxes, d.boxes, d.ignored] for d in report.datasets]
    headers = ["dataset", "use", "images", "without boxes", "boxes", "ignored"]
    return tabulate(escaped_rows(rows), headers) if rows else ""


def _classes(report: Report) -> str:
    columns = use_counts(report.datasets)
    names = list(dict.fromkeys(name for counts in columns.values() for name in counts))
    names.sort(key=lambda name: -max(counts.get(name, 0) for counts in columns.values()))
    rows = [[name, *(counts.get(name, 0) for counts in columns.values())] for name in names[:_MOST_CLASSES]]
    if not rows:
        return ""
    hidden = len(names) - len(rows)
    table = tabulate(escaped_rows(rows), ["class", *(f"boxes to {use}" for use in columns)])
    return table + (f"\n… and {hidden} more, in --json and --html" if hidden else "")


def use_counts(datasets: Sequence[DatasetFacts]) -> Mapping[str, dict[str, int]]:
    """Add up the boxes of each class over the datasets of each use."""
    sums: dict[str, dict[str, int]] = {}
    for use in USES:
        members = [d for d in datasets if use in d.use]
        if members:
            sums[use] = {}
            for name, count in (pair for d in members for pair in d.classes.items()):
                sums[use][name] = sums[use].get(name, 0) + count
    return sums


def _anchors(facts: AnchorFacts) -> str:
    low, median, high = facts.side
    flat, square, tall = facts.aspect
    lines = [
        "Boxes at training resolution (5 %, median, 95 %): "
        f"side √(width · height) {low:.0f}, {median:.0f}, {high:.0f} pixels; "
        f"height / width {flat:.2f}, {square:.2f}, {tall:.2f}",
        f"With an anchor of IoU ≥ {facts.threshold:g}: {percent(facts.with_anchor, facts.boxes)} of "
        f"{facts.boxes} boxes",
        "",
        tabulate(
            share_rows(facts.by_size),
            ["side, pixels", "boxes", "with anchor"],
            colalign=("left", "right", "right"),
        ),
        "",
        tabulate(
            level_rows(facts),
            ["stride", "anchors", "best for boxes", "positive", "negative", "ratio"],
            colalign=("right", "left", "right", "right", "right", "right"),
        ),
    ]
    return "\n".join(lines)


def share_rows(shares: Sequence[Share]) -> list[tuple[str, int, str]]:
    """List names, boxes and the share with an anchor, for a table."""
    return [(s.name, s.boxes, percent(s.with_anchor, s.boxes)) for s in shares]


def level_rows(facts: AnchorFacts) -> list[tuple[Any, ...]]:
    """List the levels, for a table."""
    return [
        (
            level.stride,
            first_few([f"{w:.0f}×{h:.0f}" for w, h in level.anchors], 3),
            sum(level.best_for),
            level.positives,
            level.negatives,
            odds(level.negatives / level.positives) if level.positives else "",
        )
        for level in facts.levels
    ]


def percent(part: int, whole: int) -> str:
    """Write a share in per cent; "–" if the whole is 0."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def memory_line(facts: MemoryFacts) -> str:
    """Write the memory of a training step and of each of its parts."""
    return (
        f"Memory of a training step, estimated: {megabytes(facts.total)} for {facts.images} images of "
        f"{facts.width} × {facts.height} on one device: weights {megabytes(facts.weights)}, gradients "
        f"{megabytes(facts.gradients)}, optimizer {megabytes(facts.optimizer)}, activations "
        f"{megabytes(facts.activations)}"
    )


def megabytes(size: int) -> str:
    """Write bytes in MiB, or in GiB if it is at least 1 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def as_fix_list(report: Report, *, base: str) -> str:
    """Write a child config with the corrections, each line below its reason; "" if there are none.

    If two findings set the same key, the first one counts.

    Args:
        report: the doctor's.
        base: the config that was examined.
    """
    fixes = list(
        dict.fromkeys(fix.why for finding in report.findings for fix in finding.fixes if not fix.key)
    )
    tree: dict[str, Any] = {}
    for fix in (fix for finding in report.findings for fix in finding.fixes if fix.key):
        *parents, leaf = fix.key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node.setdefault(leaf, fix)
    # A child config: lines that a user pastes into the config itself may repeat the name of a section, and
    # YAML would then drop the earlier section.
    head = [f"_BASE_: {json.dumps(os.path.abspath(base))}"] if tree else []
    return "\n".join([*(f"# {escaped(why)}" for why in fixes), *head, *_yaml_lines(tree, "")])


def _yaml_lines(tree: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, Fix):
            written = yaml.safe_dump(value.value, default_flow_style=True).splitlines()[0]
            lines += [f"{indent}# {escaped(value.why)}", f"{indent}{key}: {written}"]
        else:
            lines += [f"{indent}{key}:", *_yaml_lines(value, indent + "  ")]
    return lines
