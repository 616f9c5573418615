"""Resume a run: the owners of state, the checks of a checkpoint, and settings that changed in the config."""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from detectron2.config import CfgNode
from detectron2.solver.lr_scheduler import LRMultiplier
from detectron2.utils import comm

from focal_d2.config import MOST_ITERATIONS, leaves
from focal_d2.detectron2_compat import LOOP_STATE
from focal_d2.errors import UserError, one_line
from focal_d2.storage.card import ModelCard, class_difference

logger = logging.getLogger(__name__)


class Owner(Protocol):
    """An object whose state is in checkpoints, under its name.

    Hooks have the same two methods, but detectron2 saves and loads them.
    """

    def state_dict(self) -> Any:
        """Return the state, as `torch.load` reads it safely."""

    def load_state_dict(self, state: Any, /) -> list[str]:
        """Load a state; return a clause for each reason why training does not continue exactly."""


class CardOfRun:
    """The card that a run puts into its checkpoints; see `ModelCard`."""

    def __init__(self, card: ModelCard) -> None:
        """Take the card of the config."""
        self._card = card

    def state_dict(self) -> dict[str, Any]:
        """Return the card."""
        return self._card.as_dict()

    def load_state_dict(self, content: Any) -> None:
        """Compare the class names of the checkpoint with those of the training set.

        Raises:
            UserError: if they are the same in another order.
            ValueError: if the card is damaged.
        """
        card = ModelCard.from_dict(content)
        names = None if card is None else card.class_names
        difference, permuted = class_difference(names, self._card.class_names, "DATASETS.TRAIN")
        if permuted:
            raise UserError(f"--resume: {difference}")
        if difference:
            logger.warning(f"--resume: {difference}")


class ProcessCount:
    """The number of processes that train."""

    def state_dict(self) -> int:
        """Return the number of processes."""
        return comm.get_world_size()

    def load_state_dict(self, before: int) -> list[str]:
        """Compare with the number in the checkpoint; return a clause if it differs."""
        if before == comm.get_world_size():
            return []
        return [
            f"{comm.get_world_size()} processes instead of {before}: sums are rounded in another order, and "
            "batch norm that is neither frozen nor synchronised sees batches of another size"
        ]


def complete_state(state: dict[str, Any], *, batch: int) -> dict[str, Any]:
    """Add the owners' states that are missing in a checkpoint of detectron2, as far as they are known.

    Args:
        state: of the trainer, from a checkpoint.
        batch: images of a batch, over all processes.
    """
    defaults = {"data": {"images": (state["iteration"] + 1) * batch}, "random": [], "processes": 1}
    return {**defaults, **state}


def check_state(
    state: dict[str, Any], *, cfg: CfgNode, optimizer: torch.optim.Optimizer, schedule: dict[str, Any]
) -> None:
    """Check the values that PyTorch and detectron2 load without a check and that would fail later.

    Args:
        state: of the trainer, from a checkpoint.
        cfg: full config.
        optimizer: the one that will load its part of the state.
        schedule: the attributes of the schedule that will load its part.

    Raises:
        UserError: if the state is of another optimizer, or of a schedule for another number of processes.
        ValueError: if it is damaged or hostile: a field does not have the right kind of numbers.
    """
    # Another version of PyTorch has more settings or fewer. Another optimizer lacks some and has others.
    groups = state[LOOP_STATE]["optimizer"]["param_groups"]
    ours, theirs = optimizer.param_groups[0].keys(), groups[0].keys()
    if ours - theirs and theirs - ours:
        raise UserError(
            f"--resume: the checkpoint in {cfg.OUTPUT_DIR} was written with another optimizer than "
            f"SOLVER.FOCAL.OPTIMIZER {cfg.SOLVER.FOCAL.OPTIMIZER}"
        )
    before, now = state.get("processes", 1), comm.get_world_size()
    if before != now and cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise UserError(
            f"--resume: {before} processes wrote the checkpoint in {cfg.OUTPUT_DIR}, not {now}; "
            "SOLVER.REFERENCE_WORLD_SIZE made another schedule for them: start as many, or set it to 0 and "
            "the schedule as it was"
        )
    iteration = state["iteration"]
    if not isinstance(iteration, int) or not 0 <= iteration <= MOST_ITERATIONS:
        raise ValueError(f"iteration {iteration!r}")
    for name, value in state.get("hooks", {}).get("LRScheduler", {}).items():
        numbers = value if isinstance(value, list) else []
        if (
            name not in schedule
            or type(value) is not type(schedule[name])
            or not all(isinstance(x, (int, float)) and abs(x) < math.inf for x in numbers)
            or (type(value) is int and not 0 <= value <= MOST_ITERATIONS + 1)  # it counts them
        ):
            raise ValueError(one_line(f"the schedule's {name} {value!r}", 100))


class SolverSettings:
    """The config's settings of optimizer and schedule. Checkpoints keep them, so that changes are noticed.

    PyTorch's optimizers load all their settings from a checkpoint, and detectron2's schedule loads its base
    learning rates. Here, settings that changed in the config have the config's values. All others come from
    the checkpoint, also those that code of the user changes during training.

    This class is no `Owner`: parameter groups may have changed, so its saved state is needed before the
    optimizer's state is loaded; see `merge`.
    """

    def __init__(self, cfg: CfgNode, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the settings.

        Args:
            cfg: full config.
            model: the model that is trained.
            optimizer: as it was built; no schedule has changed its learning rates yet.
        """
        self._folder = cfg.OUTPUT_DIR
        # The training loader reports a changed IMS_PER_BATCH.
        self._keys = {key: str(x) for key, x in leaves(cfg.SOLVER).items() if key != "IMS_PER_BATCH"}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._groups: list[dict[str, Any]] = []
        for i, group in enumerate(optimizer.param_groups):
            members = [names.get(id(x), f"{i}/{j}") for j, x in enumerate(group["params"])]
            settings = {key: x for key, x in group.items() if key != "params"}
            self._groups.append({"names": members, "settings": settings})

    def state_dict(self) -> dict[str, Any]:
        """Return the keys of SOLVER as texts, and each parameter group's names and settings."""
        return {"keys": self._keys, "groups": self._groups}

    def merge(self, state: dict[str, Any], schedule: Any) -> tuple[dict[str, Any], list[str]]:
        """Put the settings that have changed in the config into a checkpoint's state.

        Args:
            state: of the trainer, after `check_state`. It is not changed.
            schedule: the one that will load its part of the state.

        Returns:
            The state to load, and a clause for each change.

        Raises:
            UserError: if the checkpoint has other parameter groups and is too old to name their parameters.
            Exception: of several types, if the state is damaged.
        """
        saved = self._read(state)
        rate, saved_rate = self._groups[0]["settings"]["lr"], saved.built[0]["lr"]
        same_rate = bool(rate == saved_rate)
        if saved.keys:
            same_rate = saved.keys["BASE_LR"] == self._keys["BASE_LR"]
        halved = saved.rates[0] / saved_rate if saved_rate else 1.0  # by ON_NONFINITE
        groups: list[dict[str, Any]] = []
        rates, tensors = [], {}
        for ours in self._groups:
            group, rate = _merge_group(ours, saved, factor=halved if same_rate else None)
            group["params"] = []
            for name in ours["names"]:
                number = sum(len(x["params"]) for x in (*groups, group))
                group["params"].append(number)
                if name in saved.positions and saved.positions[name][1] in saved.tensors:
                    tensors[number] = saved.tensors[saved.positions[name][1]]
            groups.append(group)
            rates.append(rate)

        optimizer = {**state[LOOP_STATE]["optimizer"], "state": tensors, "param_groups": groups}
        state = {**state, LOOP_STATE: {**state[LOOP_STATE], "optimizer": optimizer}}
        if "base_lrs" in (scheduled := state.get("hooks", {}).get("LRScheduler", {})):
            state["hooks"] = {**state["hooks"], "LRScheduler": {**scheduled, "base_lrs": rates}}
        changes = self._changes(saved)
        if changes and not isinstance(schedule, LRMultiplier):
            changes.append(f"{type(schedule).__name__} takes its other numbers from the checkpoint")
        if not same_rate and halved < 1:
            changes.append(
                f"{round(-math.log2(halved))} halvings of the learning rate (SOLVER.FOCAL.ON_NONFINITE) are "
                "dropped"
            )
        return state, changes

    def _read(self, state: dict[str, Any]) -> _Saved:
        optimizer = state[LOOP_STATE]["optimizer"]
        groups, settings = optimizer["param_groups"], state.get("settings")
        if settings is None:
            # A checkpoint of an older version or of detectron2: use the settings of its optimizer.
            if [len(x["params"]) for x in groups] != [len(x["names"]) for x in self._groups]:
                raise UserError(
                    f"--resume: the checkpoint in {self._folder} does not name its parameters, and its "
                    "groups of parameters are not the config's: SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, "
                    "BIAS_LR_FACTOR and MODEL.BACKBONE.FREEZE_AT must be as they were"
                )
            names = [x["names"] for x in self._groups]
            built = [{k: x for k, x in g.items() if k not in ("params", "initial_lr")} for g in groups]
            built = [{**x, "lr": g.get("initial_lr", g["lr"])} for x, g in zip(built, groups, strict=True)]
            settings = {"keys": {}}
        else:
            names = [x["names"] for x in settings["groups"]]
            built = [x["settings"] for x in settings["groups"]]
        positions = {
            name: (i, number)
            for i, (members, group) in enumerate(zip(names, groups, strict=True))
            for name, number in zip(members, group["params"], strict=True)
        }
        rates = state.get("hooks", {}).get("LRScheduler", {}).get("base_lrs") or [x["lr"] for x in built]
        return _Saved(settings["keys"], built, groups, rates, positions, optimizer["state"])

    def _changes(self, saved: _Saved) -> list[str]:
        changes = [
            f"SOLVER.{key} from {one_line(saved.keys[key], 100)} to {value}"
            for key, value in self._keys.items()
            if saved.keys.get(key, value) != value
        ]
        ours = {name: group["settings"] for group in self._groups for name in group["names"]}
        theirs = {name: saved.built[i] for name, (i, _) in saved.positions.items()}
        if not changes:
            # An older checkpoint has no keys, and a `build_optimizer` of the user may read other keys.
            changes += dict.fromkeys(
                f"{key} from {theirs[name][key]} to {x}"
                for name in ours
                if name in theirs
                for key, x in ours[name].items()
                if theirs[name].get(key, x) != x
            )
        for names, what in ((ours.keys() - theirs, "trained"), (theirs.keys() - ours, "no longer trained")):
            if names:
                changes.append(f"parameters that are now {what}: {len(names)}, such as {min(names)}")
        return changes


class _Saved(NamedTuple):
    """A checkpoint's state of optimizer and schedule. Its parameter groups are numbered from 0."""

    keys: dict[str, str]  # of SOLVER, as texts; empty if the checkpoint does not have them
    built: list[dict[str, Any]]  # each group's settings, as its config gave them
    groups: list[dict[str, Any]]  # each group when the checkpoint was written
    rates: list[float]  # each group's base learning rate, after halvings
    positions: dict[str, tuple[int, int]]  # a parameter's group, and its number in `tensors`
    tensors: dict[int, dict[str, Any]]  # the optimizer's state of each parameter


def _merge_group(
    ours: dict[str, Any], saved: _Saved, *, factor: float | None
) -> tuple[dict[str, Any], float]:
    """Return the settings with which a parameter group resumes, and its base learning rate.

    Args:
        ours: the group's parameter names and settings in the config.
        saved: the checkpoint's state.
        factor: the product of all halvings of the base learning rate, or None if they are dropped.
    """
    settings = ours["settings"]
    group, rate = {**settings, "initial_lr": settings["lr"]}, settings["lr"] * (factor or 1.0)
    # Another config may have divided the parameters into other groups.
    sources = sorted({saved.positions[name][0] for name in ours["names"] if name in saved.positions})
    if not sources:
        return group, rate
    same = {
        key
        for key in {*settings, *saved.groups[sources[0]]}
        if all(_has_same(saved.built[i], settings, key) for i in sources)
    }
    group |= {k: x for k, x in saved.groups[sources[0]].items() if k in same - {"lr", "initial_lr", "params"}}
    now, base = saved.groups[sources[0]]["lr"], saved.rates[sources[0]]
    if factor is not None and "lr" in same:
        rate = base
    group["lr"] = now * (rate / base) if base else rate
    return group, rate


def _has_same(a: dict[str, Any], b: dict[str, Any], key: str) -> bool:
    return (key in a) == (key in b) and a.get(key) == b.get(key)


def follow_schedule(optimizer: torch.optim.Optimizer, schedule: Any, *, last: int) -> None:
    """Set the next iteration's learning rates to those of the config's schedule.

    The optimizer has the checkpoint's rates, which may follow the schedule of an earlier config.

    Args:
        optimizer: with its loaded state.
        schedule: with its loaded state. A schedule that is not detectron2's is not read.
        last: the iterations of the whole training, beyond which no schedule is defined.
    """
    if isinstance(schedule, LRMultiplier) and schedule.last_epoch <= last:
        for group, rate in zip(optimizer.param_groups, schedule.get_lr(), strict=True):
            group["lr"] = rate


def set_aside(folder: Path) -> None:
    """Move an earlier run's checkpoints and metrics away, so that they are not taken for the new run's."""
    numbers = (int(x.name[8:]) for x in folder.glob("earlier_*") if x.name[8:].isdecimal())
    earlier = folder / f"earlier_{max(numbers, default=0) + 1}"
    earlier.mkdir()
    for path in [folder / "last_checkpoint", *folder.glob("model_*.pth")]:
        if path.exists():
            path.rename(earlier / path.name)
    metrics = folder / "metrics.json"
    if metrics.exists():
        # The file is emptied, not moved: the new run has already opened it to append to it.
        shutil.copy(metrics, earlier)
        os.truncate(metrics, 0)
    logger.warning(
        f"checkpoints of an earlier run in {folder} are now in {earlier}; --resume would continue from them"
    )
