#!/usr/bin/env python
"""Run a study: a base config × a grid of settings × seeds, each an ordinary train_net.py run.

The same command goes on with a study that was stopped. Results so far are in OUTPUT: table.md, results.csv,
results.png, losses.png, and a folder a run.
"""

import argparse
import logging
import sys
from pathlib import Path

from focal_d2.analysis.study import Result, as_json, check_seeds, load_grid, plan, run_study, write_report
from focal_d2.engine import Parser, check_job, command_line
from focal_d2.errors import UserError
from focal_d2.storage.yaml_text import parse_yaml

TRAIN_NET = Path(__file__).resolve().parent.parent / "train_net.py"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--config-file", required=True, metavar="BASE", help="what all cells start from")
    parser.add_argument("--grid", required=True, type=Path, help="YAML of cells and seeds (configs/grids/)")
    parser.add_argument("--output", required=True, type=Path, help="the study's folder")
    parser.add_argument("--seeds", metavar="SEED,SEED,…", help="instead of the grid's")
    parser.add_argument("--num-gpus", type=int, default=1, help="of each run, as train_net.py has it")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides for all cells, KEY VALUE …")
    args = parser.parse_args()

    # What detectron2 warns of stands in each run's own log.
    logging.getLogger("detectron2").addHandler(logging.NullHandler())
    grid = load_grid(args.grid)
    seeds = grid.seeds
    if args.seeds is not None:
        seeds = check_seeds(parse_yaml(f"[{args.seeds}]", "--seeds"), "--seeds")
    command = [sys.executable, str(TRAIN_NET), "--config-file", args.config_file, "--resume"]
    command += ["--num-gpus", str(args.num_gpus), *args.opts]

    def check(overrides: list[str]) -> str:
        return check_job(args.config_file, [*args.opts, *overrides], num_gpus=args.num_gpus)

    def after(results: list[Result], newest: Result | None) -> None:
        write_report(runs, results, args.output)
        if newest:
            print(f"[{len(results)}/{len(runs)}] {newest.line}", file=sys.stderr, flush=True)

    try:
        runs = plan(grid, seeds, args.output, command, check)
        results = run_study(runs, args.output, after)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on") from None
    except OSError as error:
        raise UserError(f"{args.output}: {error}") from error
    print(as_json(results) if args.json else (args.output / "table.md").read_text())
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(results)} runs failed; the same command tries them again")


if __name__ == "__main__":
    with command_line():
        main()
