#!/usr/bin/env python
"""Run a study: a base config × a grid of settings × seeds, each an ordinary train_net.py run.

The same command goes on with a study that was stopped. Results so far are in OUTPUT: table.md, results.csv,
results.png, losses.png, and a folder a run.
"""

import argparse
import json
import sys
from pathlib import Path

from focal_d2.analysis import Result, Run, load_grid, run_study, write_report
from focal_d2.engine import check_job, command_line
from focal_d2.errors import UserError

TRAIN_NET = Path(__file__).resolve().parent.parent / "train_net.py"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="BASE", help="what all cells start from")
    parser.add_argument("--grid", required=True, type=Path, help="YAML of cells and seeds (configs/grids/)")
    parser.add_argument("--output", required=True, type=Path, help="the study's folder")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="instead of the grid's")
    parser.add_argument("--num-gpus", type=int, default=1, help="of each run, as train_net.py has it")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config overrides for all cells, KEY VALUE …")
    args = parser.parse_args()

    grid = load_grid(args.grid)
    configs = []
    for cell in grid.cells:
        # A mistake in the last cell must not show after a night.
        try:
            configs.append(check_job(args.config_file, [*args.opts, *cell.overrides]))
        except UserError as error:
            raise UserError(f"cell {cell.name}: {error}") from error
    runs = []
    # All cells of a seed first: a study that is cut short has a whole table.
    for seed in args.seeds or grid.seeds:
        for cell, config in zip(grid.cells, configs, strict=True):
            folder = args.output / cell.folder / f"seed_{seed}"
            command = [sys.executable, str(TRAIN_NET), "--config-file", args.config_file, "--resume"]
            command += ["--num-gpus", str(args.num_gpus), *args.opts, *cell.overrides]
            command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
            runs.append(Run(cell, seed, folder, command, config))

    def after(results: list[Result]) -> None:
        write_report(runs, results, args.output)
        print(f"[{len(results)}/{len(runs)}] {results[-1].line}", file=sys.stderr, flush=True)

    try:
        results = run_study(runs, args.output, after)
    except KeyboardInterrupt:
        raise UserError("stopped; the same command goes on") from None
    if args.json:
        print(json.dumps([result._asdict() for result in results], indent=1))
    else:
        print((args.output / "table.md").read_text())
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise UserError(f"{len(failed)} of {len(results)} runs failed; the same command tries them again")


if __name__ == "__main__":
    with command_line():
        main()
