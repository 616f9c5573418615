"""Studies of many training runs."""

from focal_d2.analysis.study.grid import Cell, Grid, check_seeds, load_grid
from focal_d2.analysis.study.report import as_json, write_report
from focal_d2.analysis.study.runs import Result, Run, plan, read_results, run_study

__all__ = [
    "Cell",
    "Grid",
    "Result",
    "Run",
    "as_json",
    "check_seeds",
    "load_grid",
    "plan",
    "read_results",
    "run_study",
    "write_report",
]
