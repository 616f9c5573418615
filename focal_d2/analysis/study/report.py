"""A study's results as a Markdown table, a CSV file and plots."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.special import stdtrit
from tabulate import tabulate

from focal_d2.analysis.study.grid import Cell
from focal_d2.analysis.study.runs import Result, Run, read_metrics
from focal_d2.errors import escaped_rows
from focal_d2.storage.files import create_file

_IN_TABLE = re.compile(r"(^|/)bbox/(AP|AP50|AP75|AR@\d+)$")


def write_report(
    runs: Sequence[Run], results: Sequence[Result], output: Path, baseline: str | None = None
) -> None:
    """Write table.md, results.csv, results.png and losses.png of the runs that have ended.

    Args:
        runs: all of the study.
        results: of the runs that have ended.
        output: the study's folder.
        baseline: the cell that the others are compared with.
    """
    ended = {(result.cell, result.seed) for result in results}
    done = [run for run in runs if (run.cell.name, run.seed) in ended]
    cells = list({run.cell.name: run.cell for run in runs}.values())
    with create_file(output / "table.md") as file:
        file.write(f"{markdown_table(cells, results, baseline)}\n".encode())
    _write_csv(done, results, output / "results.csv")
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        _plot_metrics(cells, results, output / "results.png")
        _plot_losses(cells, done, output / "losses.png")


def as_json(results: Sequence[Result]) -> str:
    """Return the results as a JSON list. A metric that is NaN (AP of a size that no box has) is null."""
    plain = [
        {**r._asdict(), "metrics": {k: x if math.isfinite(x) else None for k, x in r.metrics.items()}}
        for r in results
    ]
    return json.dumps(plain, indent=1)


def markdown_table(cells: Sequence[Cell], results: Sequence[Result], baseline: str | None = None) -> str:
    """Return a table in Markdown with a row for each cell.

    A row has the number of finished runs, and the mean ± sample standard deviation of each metric over them.
    Runs that diverged are not in the mean; the row names the iterations at which they diverged. With a
    baseline, a row also has the difference of AP and AP50 (`paired_difference`).
    """
    names = _table_metrics(results)
    compared = [name for name in names if name.endswith(("/AP", "/AP50"))] if baseline else []
    with_paper = any(cell.paper is not None for cell in cells)
    rows = []
    for cell in cells:
        of_cell = [r for r in results if r.cell == cell.name]
        row: list[str] = [cell.name, _ended(of_cell)]
        row += [_mean_and_spread(list(_values(of_cell, name).values())) for name in names]
        row += [_difference(results, cell.name, baseline, name) for name in compared]
        if with_paper:
            row.append("" if cell.paper is None else f"{cell.paper:.1f}")
        rows.append(row)
    headers = ["", "runs", *(name.replace("bbox/", "") for name in names)]
    headers += [f"{name.replace('bbox/', '')} − baseline" for name in compared]
    headers += ["paper, COCO AP"] * with_paper
    return tabulate(escaped_rows(rows), *escaped_rows([headers]), tablefmt="github", disable_numparse=True)


def _table_metrics(results: Sequence[Result]) -> list[str]:
    names = list(dict.fromkeys(name for r in results for name in r.metrics if _IN_TABLE.search(name)))
    # Of each dataset's recalls, only the last one is shown: it allows the most detections in an image.
    recalls = {name.split("@")[0]: name for name in names if "AR@" in name}
    return [name for name in names if "AR@" not in name or name in recalls.values()]


def paired_difference(
    values: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Return the mean difference over the seeds that both have, and its interval.

    The interval is that of Student's t for the mean of the differences of pairs, which are taken as drawn
    from a normal distribution.

    Args:
        values: of a cell, by seed.
        baseline: of the cell that it is compared with, by seed.
        confidence: of the interval.

    Returns:
        Mean, lower and upper end. The ends are NaN with one seed, all three with none.
    """
    differences = [x - baseline[seed] for seed, x in values.items() if seed in baseline]
    if len(differences) < 2:
        return (differences[0] if differences else math.nan), math.nan, math.nan
    mean, freedom = statistics.fmean(differences), len(differences) - 1
    quantile = float(stdtrit(freedom, (1 + confidence) / 2))
    half = quantile * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def _difference(results: Sequence[Result], cell: str, baseline: str | None, metric: str) -> str:
    if cell == baseline:
        return ""
    values, base = (_values([r for r in results if r.cell == name], metric) for name in (cell, baseline))
    mean, low, high = paired_difference(values, base)
    if math.isnan(mean):
        return ""
    return f"{mean:+.1f}" if math.isnan(low) else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def _values(results: Sequence[Result], metric: str) -> dict[int, float]:
    return {r.seed: r.metrics[metric] for r in results if metric in r.metrics}


def _ended(results: Sequence[Result]) -> str:
    finished = sum(r.status == "finished" for r in results)
    text = [str(finished)] if finished or not results else []
    text += [f"diverged at {r.iteration} (seed {r.seed})" for r in results if r.status == "diverged"]
    text += [f"failed (seed {r.seed})" for r in results if r.status == "failed"]
    return ", ".join(text)


def _mean_and_spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def _write_csv(runs: Sequence[Run], results: Sequence[Result], path: Path) -> None:
    metrics = list(dict.fromkeys(name for r in results for name in r.metrics))
    keys = list(dict.fromkeys(key for run in runs for key in run.cell.settings))
    with create_file(path) as file, io.TextIOWrapper(file, "utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["cell", "seed", "status", "diverged at", "config", *keys, *metrics])
        for run, result in zip(runs, results, strict=True):
            row = [result.cell, result.seed, result.status, result.iteration, run.fingerprint]
            row += [run.cell.settings.get(key) for key in keys]
            writer.writerow([*row, *(result.metrics.get(name) for name in metrics)])


def _plot_metrics(cells: Sequence[Cell], results: Sequence[Result], path: Path) -> None:
    """Plot a panel for each metric: a line for each cell, a dot for each seed, and a mark at their mean."""
    names = [n for n in _table_metrics(results) if not n.endswith("AP75")]
    if not names:
        return
    figure = Figure(figsize=(2.2 + 2.6 * len(names), 0.8 + 0.3 * len(cells)), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for y, cell in enumerate(cells):
            of_cell = [r for r in results if r.cell == cell.name]
            values = list(_values(of_cell, name).values())
            if values:
                axes.plot(values, [y] * len(values), "o", color="tab:blue", alpha=0.5, markersize=4)
                axes.plot(statistics.fmean(values), y, "|", color="black", markersize=12)
            diverged = sum(r.status == "diverged" for r in of_cell)
            if diverged:
                axes.text(0, y, f" {diverged} diverged", color="tab:red", va="center")
        axes.set_yticks(range(len(cells)), [cell.name for cell in cells])
        axes.set_ylim(len(cells) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel(f"{name.replace('bbox/', '')}, per cent")
        axes.grid(axis="x", alpha=0.3)
    with create_file(path) as file:
        figure.savefig(file, dpi=120)


def _plot_losses(cells: Sequence[Cell], runs: Sequence[Run], path: Path) -> None:
    """Plot the classification loss of each run over iterations, a panel for each cell: scales may differ."""
    shown = [cell for cell in cells if any(run.cell.name == cell.name for run in runs)]
    if not shown:
        return
    columns = min(4, len(shown))
    figure = Figure(figsize=(2.6 * columns, 1.9 * math.ceil(len(shown) / columns)), layout="constrained")
    panels: list[Axes] = list(
        figure.subplots(math.ceil(len(shown) / columns), columns, sharex=True, squeeze=False).flat
    )
    for axes, cell in zip(panels, shown, strict=False):
        for run in runs:
            if run.cell.name == cell.name:
                lines = [m for m in read_metrics(run.folder) if "loss_cls" in m]
                axes.plot([m["iteration"] for m in lines], [m["loss_cls"] for m in lines], linewidth=1)
        axes.set_ylim(bottom=0)
        axes.set_title(cell.name, fontsize=9)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    figure.supxlabel("iteration")
    figure.supylabel("classification loss")
    with create_file(path) as file:
        figure.savefig(file, dpi=120)
