"""Run a study: a base config × a grid of settings × seeds, each an ordinary `focal-d2 train`.

The same command continues a study that was stopped. The results so far are in OUTPUT: table.md, results.csv,
results.png, losses.png, and a folder for each run.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from focal_d2.commands.cli import Parser, add_config_options
from focal_d2.console import tell, write
from focal_d2.errors import UserError

if TYPE_CHECKING:
    from focal_d2.analysis.study import Result


def add_options(parser: Parser) -> None:
    """Add the options."""
    add_config_options(parser, help="what all cells start from")
    parser.add_argument("--grid", required=True, type=Path, help="YAML of cells and seeds (configs/grids/)")
    parser.add_argument("--output", required=True, type=Path, help="the study's folder")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="CSV",
        help="a results.csv whose runs are not repeated; it may be OUTPUT's",
    )
    parser.add_argument("--seeds", metavar="SEED,SEED,…", help="seeds that replace the grid's")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="processes of each run (1)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the runs without a result, and print all results."""
    from focal_d2.analysis.study import (
        as_json,
        check_seeds,
        load_grid,
        plan,
        read_results,
        run_study,
        write_report,
    )
    from focal_d2.engine import check_job
    from focal_d2.storage.configs import find_config
    from focal_d2.storage.yaml_text import parse_yaml

    # detectron2's warnings are in the log of each run.
    logging.getLogger("detectron2").addHandler(logging.NullHandler())
    grid = load_grid(Path(find_config(str(args.grid))))
    seeds = grid.seeds
    if args.seeds is not None:
        seeds = check_seeds(parse_yaml(f"[{args.seeds}]", "--seeds"), "--seeds")

    def check(overrides: list[str]) -> str:
        return check_job(args.config_file, [*args.opts, *overrides], num_gpus=args.num_gpus)

    def after(results: list[Result], newest: Result | None) -> None:
        write_report(runs, results, args.output, grid.baseline)
        if newest:
            tell(f"[{len(results)}/{len(runs)}] {newest.line}")

    try:
        runs = plan(grid, seeds, args.output, _training_command(args), check)
        known = read_results(args.results, runs) if args.results else {}
        results = run_study(runs, args.output, after, known)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command continues the study") from None
    except OSError as error:
        raise UserError(f"{args.output}: {error}") from error
    write(as_json(results) if args.json else (args.output / "table.md").read_text(encoding="utf-8"))
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(results)} runs failed; the same command tries them again")


def _training_command(args: argparse.Namespace) -> list[str]:
    # Its modules are those of this process: `-m` would look in the working folder first, for any module.
    start = f"import sys; sys.path[:] = {sys.path!r}; from focal_d2.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "train", "--config-file", args.config_file, "--resume"]
    command += [f"--import={module}" for module in args.imports]
    return [*command, "--num-gpus", str(args.num_gpus), *args.opts]
