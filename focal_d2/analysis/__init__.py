"""Studies of many training runs."""

from focal_d2.analysis.grid import Cell, Grid, load_grid
from focal_d2.analysis.report import write_report
from focal_d2.analysis.study import Result, Run, run_study

__all__ = ["Cell", "Grid", "Result", "Run", "load_grid", "run_study", "write_report"]
