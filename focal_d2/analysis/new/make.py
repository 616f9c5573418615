"""Make a config from a folder: find, divide, measure, choose, check, try, write."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode

from focal_d2.analysis.anchors.fit import Comparison, compare_anchors
from focal_d2.analysis.doctor import Report, examine
from focal_d2.analysis.doctor.training import memory_facts
from focal_d2.analysis.new.choices import (
    COLOURS,
    Choice,
    anchor_shape,
    batches,
    choose_batch,
    choose_flips,
    choose_limits,
    choose_negatives,
    choose_rate,
    choose_resolution,
    choose_schedule,
    choose_tiles,
)
from focal_d2.analysis.new.facts import Facts, direction_of, facts_of
from focal_d2.analysis.new.find import find_sources
from focal_d2.analysis.new.probe import Trial, try_training
from focal_d2.analysis.new.sets import Sets, dataset_name, divide, read_sources, unite_classes
from focal_d2.analysis.new.text import as_yaml
from focal_d2.analysis.new.weights import Start, choose_weights
from focal_d2.annotations import Table
from focal_d2.data.checks.kinds import ERROR
from focal_d2.errors import UserError, first_few
from focal_d2.hardware import available_memory
from focal_d2.load_config import load_config
from focal_d2.modeling.anchors import build_layout
from focal_d2.modeling.build import build_without_memory, building
from focal_d2.storage.files import create_file

_MAX_PIXELS = 100_000_000  # of an image that is looked at: the default of INPUT.FOCAL.MAX_PIXELS
# Classes that the entries list themselves; more are in a file.
_MOST_CLASSES = 20
# The trial takes this share of the training's time, between these seconds.
_TRIAL_SHARE, _TRIAL_SECONDS = 0.05, (5.0, 60.0)
# Findings with which training would stop: there is nothing to try.
_STOPS = (
    "dataset-unreadable",
    "dataset-empty",
    "item-unreadable",
    "image-missing",
    "image-unreadable",
    "image-size",
    "image-too-large",
)


@dataclass
class Made:
    """What was made.

    Attributes:
        config: the file; None if the data must be corrected first, and nothing was written.
        problems: items of the annotations that cannot be read, a line each.
    """

    config: str | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sets: Sets | None = None
    facts: Facts | None = None
    choices: list[Choice] = field(default_factory=list)
    trial: Trial | None = None
    report: Report | None = None
    lists: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether a config was written, and the doctor found no error."""
        return self.config is not None and self.report is not None and self.report.healthy

    @property
    def command(self) -> str:
        """The next command."""
        return f"focal-d2 train --config-file {self.config}"

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        sets = self.sets
        return {
            "config": self.config,
            "lists": self.lists,
            "problems": self.problems,
            "notes": self.notes,
            "split": sets and sets.reason,
            "datasets": [] if sets is None else [_dataset_dict(sets, i) for i in range(len(sets.datasets))],
            "facts": self.facts and self.facts.as_dict(),
            "choices": [x._asdict() for x in self.choices],
            "trial": self.trial and self.trial._asdict(),
            "doctor": self.report and self.report.as_dict(),
            "next": self.command if self.config else None,
        }


def _dataset_dict(sets: Sets, i: int) -> dict[str, Any]:
    use, entry, table, images = sets.datasets[i]
    return {
        "use": use,
        "entry": entry,
        "images": len(table),
        "boxes": int(table.objects.sum()),
        "list": images,
    }


def make_config(
    folder: str,
    output: str,
    *,
    annotations: Sequence[str] = (),
    minutes: float = 60.0,
    seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
    trial: Callable[..., Trial] = try_training,
    start: Callable[[str], Start] = choose_weights,
) -> Made:
    """Make a config and the lists of its split. Nothing in the folder is changed, and no file is replaced.

    Args:
        folder: of images and annotations.
        output: the config's path; lists go to a folder beside it.
        annotations: files or folders of annotations to take; (): all in the folder.
        minutes: that the training may take.
        seed: of the split, the anchors and the training.
        say: is given a line before each step that takes time.
        trial: measures training on this machine.
        start: chooses starting weights for a device.

    Raises:
        UserError: for what the user must correct or decide first.
    """
    files = _Files(output)
    found = find_sources(folder, annotations)
    say(f"reading the annotations of {len(found.images)} images")
    parts, left_out = read_sources(found.sources)
    made = Made(notes=[*found.notes, *left_out])
    made.problems = [problem for part in parts for problem in part.table.problems]
    if made.problems:
        return made
    parts, unused = unite_classes(parts)
    made.notes += unused
    say("looking for images that belong together")
    made.sets = sets = divide(parts, dataset_name(folder), seed=seed, max_pixels=_MAX_PIXELS)
    made.notes += sets.notes
    unnamed = len(found.images) - sum(len(part.table) for part in parts)
    if unnamed > 0 and not annotations:
        made.notes.append(f"{unnamed} images of the folder are in none of the annotations that are taken")
    train = sets.tables("train")
    made.facts = facts_of(Table.joined(list(train.values())))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        made.lists = files.write_lists(sets)
        begin = start(device)
        made.choices = _first_choices(sets, made.facts, files, begin, device, seed)
        cfg = _load(begin, made.choices)
        say("searching anchors")
        made.choices += [_anchors(cfg, sets, made.facts, seed)]
        cfg = _merged(cfg, made.choices[-1])
        with building("model"):
            model = build_without_memory(cfg)
        made.choices.append(_batch(cfg, model, train, device))
        cfg = _merged(cfg, made.choices[-1])
        say("examining the data and the config (focal-d2 doctor)")
        made.report = examine(cfg, model, decode=True)
        if any(x.code in _STOPS and x.severity == ERROR for x in made.report.findings):
            files.remove()
            made.lists = []
            return made
        low, high = _TRIAL_SECONDS
        seconds = min(max(_TRIAL_SHARE * minutes * 60, low), high)
        say(f"trying to train, for about {seconds:.0f} seconds")
        made.trial = measured = trial(cfg, seconds=seconds)
        made.choices += _last_choices(cfg, sets, measured, begin, minutes, device)
        header = _header(folder, output, minutes, made)
        files.write_config(as_yaml(header, begin.recipe.base, made.choices))
        load_config(output)
    except BaseException:
        files.remove()
        raise
    made.config = output
    return made


class _Files:
    """The files that are written; none of them is there before."""

    def __init__(self, output: str) -> None:
        self.config = Path(output)
        self.folder = self.config.parent / f"{self.config.stem}_lists"
        self._written: list[Path] = []
        if self.config.suffix not in (".yaml", ".yml"):
            raise UserError(f"--output is {output}; it must end in .yaml")
        for path in (self.config, self.folder):
            if os.path.lexists(path):
                raise UserError(f"{path} is there already, and is not replaced: choose another --output")
        if not self.config.parent.is_dir() or not os.access(self.config.parent, os.W_OK):
            raise UserError(f"--output {output}: {self.config.parent} is no folder that can be written")

    def write_lists(self, sets: Sets) -> list[str]:
        """Write the lists of a split, and of classes if there are many; put their paths into the entries."""
        for x in sets.datasets:
            if x.images is not None:
                x.entry["LIST"] = self._write(self.folder / f"{x.entry['NAME']}.txt", "\n".join(x.images))
        classes = sets.datasets[0].entry["CLASSES"]
        if len(classes) > _MOST_CLASSES and all(x == x.strip() and len(x.splitlines()) == 1 for x in classes):
            path = self._write(self.folder / "classes.txt", "\n".join(classes))
            for x in sets.datasets:
                x.entry["CLASSES"] = path
        return [str(path) for path in self._written]

    def write_config(self, text: str) -> None:
        """Write the config."""
        self._write(self.config, text.removesuffix("\n"))

    def remove(self) -> None:
        """Remove what was written."""
        for path in self._written:
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _write(self, path: Path, text: str) -> str:
        try:
            path.parent.mkdir(exist_ok=True)
            with create_file(path, replace=False) as file:
                self._written.append(path)
                file.write(f"{text}\n".encode())
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error
        return str(path)


def _first_choices(
    sets: Sets, facts: Facts, files: _Files, begin: Start, device: str, seed: int
) -> list[Choice]:
    names = {
        use: [x.entry["NAME"] for x in sets.datasets if x.use == use] for use in ("train", "val", "test")
    }
    datasets = {
        "DATASETS.FOCAL": [x.entry for x in sets.datasets],
        "DATASETS.TRAIN": names["train"],
        "DATASETS.VAL": names["val"],
        "DATASETS.TEST": names["test"],
        "MODEL.RETINANET.NUM_CLASSES": "auto",
    }
    run = {"SEED": seed, "OUTPUT_DIR": f"output/{files.config.stem}", "MODEL.DEVICE": "auto"}
    workers = min(max(1, (os.cpu_count() or 1) - 1), 8) if device == "cuda" else 1
    resolution = choose_resolution(facts, device)
    held_out = [x.table.sizes.max() for x in sets.datasets if x.use != "train" and len(x.table)]
    return [
        Choice("run", run, ""),
        Choice("split", datasets, sets.reason),
        Choice("starting weights", begin.recipe.keys, f"{begin.reason}; {begin.recipe.source}"),
        resolution.choice,
        choose_tiles(int(max(held_out)), resolution, facts.longest[0.95]),
        *choose_flips(
            facts,
            direction_of(sets.all_train, sets.looked),
            from_above=sets.places.upright is False,
            evidence=sets.places.reason,
        ),
        Choice("colours", COLOURS, "as in the package's demo; their effect was not measured alone"),
        choose_negatives(facts),
        choose_limits(max(_most_boxes(x.table) for x in sets.datasets)),
        Choice(
            "reading",
            {"DATALOADER.NUM_WORKERS": workers},
            "one process: the others would take cores from training"
            if device == "cpu"
            else "a process a core",
        ),
    ]


def _most_boxes(table: Table) -> int:
    """Return the largest number of objects in an image."""
    return int(np.bincount(table.image[table.objects], minlength=1).max())


def _best_metric(validation: Sequence[str]) -> Choice:
    metric = "bbox/AP" if len(validation) == 1 else f"{validation[0]}/bbox/AP"
    reason = f"model_best.pth is the checkpoint of the highest AP on {validation[0]}"
    return Choice("best checkpoint", {"TEST.FOCAL.BEST_METRIC": metric}, reason)


def _load(begin: Start, choices: Sequence[Choice]) -> CfgNode:
    """Load the choices so far as a config; its datasets are registered."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "config.yaml")
        with create_file(path) as file:
            file.write(as_yaml((), begin.recipe.base, choices).encode())
        return load_config(path)


def _merged(cfg: CfgNode, choice: Choice) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([x for pair in choice.keys.items() for x in pair])
    cfg.freeze()
    return cfg


def _anchors(cfg: CfgNode, sets: Sets, facts: Facts, seed: int) -> Choice:
    sizes, ratios, spread = anchor_shape(facts)
    with building("anchors"):
        layout = build_layout(cfg)
    result = compare_anchors(
        cfg, layout, list(sets.tables("train").values()), {}, num_sizes=sizes, num_ratios=ratios, seed=seed
    )
    keys = {
        "MODEL.ANCHOR_GENERATOR.SIZES": result.chosen.sizes,
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [result.chosen.ratios],
    }
    return Choice("anchors", keys, f"{spread}; {_recalls(result)}")


def _recalls(result: Comparison) -> str:
    name = list(result.before)[-1]
    before, after = result.before[name], result.after[name]
    if not result.better:
        return (
            f"the base's anchors fit boxes that were not searched on as well (recall {before.recall[0]:.3f})"
        )
    return (
        f"searched on half of the images: of {after.boxes} boxes ({name}), {100 * after.recall[0]:.1f} % "
        f"have an anchor of IoU 0.5 and {100 * after.recall[2]:.1f} % one of 0.7; with the base's anchors "
        f"{100 * before.recall[0]:.1f} and {100 * before.recall[2]:.1f} %"
    )


def _batch(cfg: CfgNode, model: Any, train: Mapping[str, Table], device: str) -> Choice:
    # Of two images: batch norm can't be trained on one, whose coarsest level may be a single cell.
    memory = memory_facts(_merged(cfg, Choice("", {"SOLVER.IMS_PER_BATCH": 2}, "")), model, train)
    assert memory is not None
    fixed = memory.total - memory.activations
    sizes = {batch: fixed + batch * memory.activations // 2 for batch in batches(device)}
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    return choose_batch(sizes, free, sum(len(x) for x in train.values()), device)


def _last_choices(
    cfg: CfgNode, sets: Sets, trial: Trial, begin: Start, minutes: float, device: str
) -> list[Choice]:
    validation = sets.tables("val")
    images = sum(len(x) for x in validation.values())
    return [
        choose_rate(trial.rates, trial.losses, begin.recipe.rate),
        choose_schedule(
            minutes=minutes,
            seconds=trial.seconds,
            batch=cfg.SOLVER.IMS_PER_BATCH,
            images=sum(len(x) for x in sets.tables("train").values()),
            evaluation=trial.test_seconds * images,
            timed=f"timed on this machine ({device}, {torch.get_num_threads()} threads{_busy()})",
        ),
        _best_metric(list(validation)),
    ]


def _busy() -> str:
    """Say how busy other programs keep the machine, if they do: without them training would be faster."""
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    return f"; busy with other programs: a load of {load:.1f} on {cores} cores" if load > 1.5 * cores else ""


def _header(folder: str, output: str, minutes: float, made: Made) -> list[str]:
    facts = made.facts
    assert facts is not None
    counts = first_few([f"{name} {number}" for name, number in facts.counts.items()], 10)
    return [
        f"Written by focal-d2 new {folder} --minutes {minutes:g}: each choice has its reason above it.",
        f"To train on: {facts.images} images, {facts.boxes} boxes ({counts}).",
        *(f"Note: {note}." for note in made.notes),
        f"Command: focal-d2 train --config-file {output}",
        "Relative paths start from the folder in which the command runs.",
    ]
