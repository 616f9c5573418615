"""The grid of a study: a YAML file of cells. Each cell changes a few keys of the base config.

SEEDS: [0, 1, 2]
BASELINE: CE                                          # optional: the cell that the others are compared with
CELLS:
  - NAME: CE
    SET: {MODEL.FOCAL.LOSS.NAME: ce}
  - NAME: balanced CE
    SET: {MODEL.FOCAL.LOSS.NAME: balanced_ce}
  - NAME: FL, γ {GAMMA}                               # one cell for each value of a sweep
    SET: {MODEL.FOCAL.LOSS.NAME: focal}
    SWEEP: {MODEL.FOCAL.LOSS.GAMMA: [0.5, 1.0, 2.0]}  # several keys: their product, the last fastest
    PAPER: [32.9, 33.7, 34.0]                         # the paper's COCO AP of each, if it has one
"""

from __future__ import annotations

import itertools
import math
import re
import string
from pathlib import Path
from typing import Any, NamedTuple

from focal_d2.errors import UserError, first_few
from focal_d2.storage.yaml_text import read_yaml

MOST_CELLS = 10_000

_CELL_KEYS = {"NAME", "SET", "SWEEP", "PAPER"}
_STYLE = re.compile(r"\d{0,2}(\.\d{1,2})?[a-z%]?")
_GREEK = {"α": "alpha", "β": "beta", "γ": "gamma", "π": "pi"}


class Cell(NamedTuple):
    """One row of the study."""

    name: str
    settings: dict[str, Any]  # config key -> value
    paper: float | None  # COCO AP, per cent

    @property
    def folder(self) -> str:
        """The name as a folder: letters, digits, dots and underscores."""
        text = "".join(_GREEK.get(c, c) for c in self.name.lower())
        text = re.sub(r"-(?=[0-9.])", "minus_", text)
        return re.sub(r"[^a-z0-9.]+", "_", text).strip("._")

    @property
    def overrides(self) -> list[str]:
        """The settings as KEY VALUE … of a command line."""
        return [str(x) for pair in self.settings.items() for x in pair]


class Grid(NamedTuple):
    """The cells of a study, each to be run with every seed."""

    seeds: list[int]
    cells: list[Cell]
    baseline: str | None = None  # the cell that the others are compared with, seed by seed


def load_grid(path: Path) -> Grid:
    """Read a grid.

    Raises:
        UserError: if the file is no grid, or two cells would share a folder.
    """
    content = read_yaml(str(path), name=f"grid {path}")
    if not isinstance(content, dict) or set(content) - {"BASELINE"} != {"SEEDS", "CELLS"}:
        raise UserError(f"grid {path}: it needs the keys SEEDS and CELLS, may have BASELINE, and no other")
    seeds = check_seeds(content["SEEDS"], f"grid {path}: SEEDS")
    if not _list_of(content["CELLS"], dict):
        raise UserError(f"grid {path}: CELLS must be a list of mappings")
    cells = [
        cell for i, entry in enumerate(content["CELLS"]) for cell in _expand(entry, f"{path}: CELLS[{i}]")
    ]
    folders: dict[str, str] = {}
    for cell in cells:
        if folders.setdefault(cell.folder, cell.name) != cell.name or not cell.folder:
            names = f'"{cell.name}" and "{folders[cell.folder]}"'
            raise UserError(f'grid {path}: {names} would share the folder "{cell.folder}"')
    if len(folders) < len(cells):
        raise UserError(f"grid {path}: two cells have the same NAME; a sweep's NAME needs its key in braces")
    baseline = content.get("BASELINE")
    if baseline is not None and baseline not in list(folders.values()):
        names = first_few([f'"{cell.name}"' for cell in cells])
        raise UserError(f"grid {path}: BASELINE is {baseline!r}; it must be one of the cells: {names}")
    return Grid(seeds, cells, baseline)


def check_seeds(seeds: Any, source: str) -> list[int]:
    """Return `seeds` as a list if they are different numbers that detectron2 can use as seeds.

    Raises:
        UserError: if they are not; it names the source.
    """
    # A bool is an int; a negative seed is a random one.
    whole = _list_of(seeds, int) and not _list_of(seeds, bool) and all(0 <= seed < 2**31 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise UserError(
            f"{source} is {seeds!r}; it must be a list of different whole numbers from 0 to 2^31 - 1"
        )
    return list(seeds)


def _expand(entry: dict[str, Any], where: str) -> list[Cell]:
    if not set(entry) <= _CELL_KEYS or not isinstance(entry.get("NAME"), str):
        keys = ", ".join(map(str, entry))
        raise UserError(f"grid {where} has {keys}; it needs a text NAME and may have SET, SWEEP, PAPER")
    if re.search(r"[|$\\\n]", entry["NAME"]):
        raise UserError(f"grid {where}: NAME {entry['NAME']!r} must be one line without |, $ and \\")
    fixed, sweep = entry.get("SET", {}), entry.get("SWEEP", {})
    if not all(isinstance(x, dict) and all(isinstance(key, str) for key in x) for x in (fixed, sweep)):
        raise UserError(f"grid {where}: SET and SWEEP must be mappings from config keys")
    for key in ("SEED", "OUTPUT_DIR"):
        if key in {*fixed, *sweep}:
            raise UserError(f"grid {where} sets {key}, which a study sets itself (SEEDS, --output)")
    if not all(_list_of(values, object) for values in sweep.values()):
        raise UserError(f"grid {where}: each key of SWEEP needs a list of values")
    if math.prod(len(values) for values in sweep.values()) > MOST_CELLS:
        raise UserError(f"grid {where}: SWEEP makes more than {MOST_CELLS:,} cells")
    points = [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]
    paper = entry.get("PAPER", [None] * len(points))
    paper = paper if isinstance(paper, list) else [paper]
    if len(paper) != len(points):
        raise UserError(f"grid {where}: PAPER has {len(paper)} values for {len(points)} cells")
    if not all(x is None or type(x) in (int, float) for x in paper):
        raise UserError(f"grid {where}: PAPER is {paper}; it must be numbers, or null")
    cells = []
    for point, value in zip(points, paper, strict=True):
        short = {key.rsplit(".", 1)[-1]: x for key, x in point.items()}
        try:
            # A format string may ask for a width of any size, or for attributes of a value: both are refused.
            for _, field, style, _ in string.Formatter().parse(entry["NAME"]):
                if field is not None and not (field in short and _STYLE.fullmatch(style or "")):
                    raise ValueError(f"{{{field}:{style}}}" if style else f"{{{field}}}")
            name = entry["NAME"].format(**short)
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"grid {where}: NAME may name only keys of SWEEP in braces: {error}") from error
        cells.append(Cell(name, {**fixed, **point}, value))
    return cells


def _list_of(value: object, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, kind) for x in value)
