"""Checkpoints: safe to load, whole on disk, and fitting the model they are loaded into."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from focal_d2.detectron2_compat import CheckpointerHooks
from focal_d2.errors import UserError, describe_error, first_few, reason
from focal_d2.storage.card import CARD
from focal_d2.storage.checkpoint_folder import LAST, CheckpointFolder
from focal_d2.storage.downloads import check_address, fetch, is_address
from focal_d2.storage.files import check_regular, write_aside
from focal_d2.storage.pickles import ForbiddenImportError
from focal_d2.storage.pretrained import check_pretrained, fetch_pretrained, is_pretrained
from focal_d2.storage.weights import read_pickle, read_safetensors, read_torch

# What the losses remember: not in detectron2's checkpoints, and each loss has its own.
_OURS = ("loss_normalizer.", "cls_loss.", "box_loss.")
# Absent from converted files, and without meaning once training is over.
_COUNTER = "num_batches_tracked"
# The parts that weights to start from must fill: the first of them that the model has.
_PRETRAINED = ("backbone.bottom_up.", "backbone.")
# A residual block, under any of the names that detectron2 knows how to match.
_BLOCK = re.compile(r"(^|\.)res[2-5]\.\d+\.")
_BOX_PREDICTOR = "roi_heads.box_predictor"  # of detectron2's R-CNNs
# What detectron2 reads at the end of a name.
_HEURISTICS = "?matching_heuristics=True"

logger = logging.getLogger(__name__)


class UnusableFileError(UserError):
    """A file that is missing, damaged, no checkpoint, or refused; another checkpoint may be usable."""


class FocalCheckpointer(CheckpointerHooks, DetectionCheckpointer):
    """detectron2's checkpointer, but

    - weights of another architecture are refused, where it warns;
    - files can't run code;
    - a file gets its name only when it is complete, and loading verifies its checksums;
    - if a checkpoint is damaged, the one before it is loaded.
    """

    def __init__(
        self,
        model: Any,
        save_dir: str = "",
        *,
        partial: bool,
        keep: int = 0,
        trust_files: bool = False,
        allow_download: bool = False,
        **checkpointables: Any,
    ) -> None:
        """Wrap a model.

        Args:
            model: the module to save and load.
            save_dir: folder of the checkpoints.
            partial: accept what training may start from: files without FPN and head, such as ImageNet
                weights, heads for another number of classes, or more than this model has. The ResNet must
                fit all the same. If false, file and model must have the same entries.
            keep: of the checkpoints that are named by their iteration, keep so many; 0: all.
            trust_files: let checkpoints import and run what they name.
            allow_download: load addresses outside detectron2's stores, too.
            checkpointables: see detectron2's `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self._folder = CheckpointFolder(self.save_dir)
        self.partial = partial
        self.keep = keep
        self.trust_files = trust_files
        self.allow_download = allow_download
        self._source = ""
        self._by_heuristics = False
        self._must_be_whole = False

    def save(self, name: str, *, tag: bool = True, **kwargs: Any) -> None:
        """Write a checkpoint, name it in `last_checkpoint`, and delete those that are too old to be kept.

        Args:
            name: of the file in `save_dir`, without its ending.
            tag: let it be the one that `last_checkpoint` names.
            kwargs: further content of the file.

        Raises:
            UserError: if it can't be written; the former checkpoints are as they were.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data |= {key: x.state_dict() for key, x in self.checkpointables.items()}
        data |= kwargs
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        try:
            write_aside(path, lambda file: torch.save(data, file))
            if tag:
                self.tag_last_checkpoint(os.path.basename(path))
        except OSError as error:
            raise UserError(self._why_not_written(path, error)) from error
        self._folder.delete_old(os.path.basename(path), keep=self.keep)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """See detectron2's `DetectionCheckpointer`; the file changes in one step."""
        path = os.path.join(self.save_dir, LAST)
        write_aside(path, lambda file: file.write(last_filename_basename.encode()))

    def _why_not_written(self, path: str, error: OSError) -> str:
        good = self.get_checkpoint_file()
        rest = (
            f"--resume continues from {good}" if os.path.isfile(good) else "no checkpoint was written before"
        )
        free = f", {shutil.disk_usage(self.save_dir).free / 1e6:.1f} MB are free" if _is_folder(path) else ""
        return f"cannot write {path}: {reason(error)}{free}; {rest}"

    def has_checkpoint(self) -> bool:
        """Return whether there is a run to resume; see `CheckpointFolder.is_used`."""
        return self._folder.is_used()

    def get_checkpoint_file(self) -> str:
        """Return the file that `last_checkpoint` names; see `CheckpointFolder.last`."""
        return self._folder.last()

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Load the last checkpoint and all that it holds, or start from weights.

        A checkpoint that can't be used is passed over with a warning for the one before it; one that is sound
        but does not fit stops the run. What a killed run left half written is removed, if there is a run.
        Of several processes the first one decides; the others must be able to read the same file.

        Args:
            path: of the weights to start from, if not `resume` or there is no checkpoint.
            resume: continue the run in `save_dir`; then all weights must fit.

        Returns:
            What else was in the file.

        Raises:
            UserError: if no checkpoint can be used, or the weights can't.
        """
        if self.checkpointables and self.save_to_disk:
            self._folder.delete_unfinished()
        resume = comm.all_gather(resume and self.has_checkpoint())[0]
        if not resume:
            return self.load(path, checkpointables=[])
        self.partial, self._must_be_whole = False, True
        files, problems = comm.all_gather(self._folder.candidates())[0]
        for file in files:
            if problems:
                logger.warning(f"--resume: {problems[-1]}; trying {os.path.basename(file)}")
            result = self._load_together(file)
            if not isinstance(result, UnusableFileError):
                return result
            problems.append(str(result))
        raise UserError(
            f"--resume: no checkpoint in {self.save_dir} can be used: {first_few(problems, 1, '; ')}"
        )

    def _load_together(self, path: str) -> dict[str, Any] | UnusableFileError:
        """Load a file in every process; return the error if the first process can't use it."""
        content: dict[str, Any] = {}
        error: UserError | None = None
        try:
            content = self.load(path)
        except UserError as caught:
            error = caught
        errors: list[UserError | None] = comm.all_gather(error)
        if isinstance(errors[0], UnusableFileError):
            return errors[0]
        for rank, problem in enumerate(errors):
            if problem is not None:
                raise problem if rank == 0 else UserError(f"--resume: process {rank}: {problem}")
        return content

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a file or an address; see detectron2's `DetectionCheckpointer.load`.

        Only a text with a scheme (https://…) is an address: `#`, `?` and `:` may stand in the name of a file.
        At the end of either, `?matching_heuristics=True` lets weights match by parts of their names.

        Raises:
            UserError: if it cannot be found or read, or does not fit the model or its optimizer. The model is
                as it was then.
        """
        self._source = path
        file, self._by_heuristics = _without_option(path)
        check_file(path, allow_download=self.allow_download)
        before = {name: x.detach().to("cpu", copy=True) for name, x in self.model.state_dict().items()}
        try:
            if is_pretrained(file):
                file = fetch_pretrained(file)
            elif is_address(file):
                file = fetch(file, allow_download=self.allow_download)
            # fvcore's: detectron2's, between, takes every path for an address.
            return dict(Checkpointer.load(self, file, *args, **kwargs))
        except Exception as error:
            self.model.load_state_dict(before)
            if isinstance(error, UserError):
                raise
            # A damaged or foreign file fails in whatever way its bytes bring about, and an optimizer's
            # state that does not fit in a few more. The first line has the reason.
            cause = (
                reason(error) if isinstance(error, ForbiddenImportError) else describe_error(error, lines=1)
            )
            raise UnusableFileError(f"cannot load weights {path}: {cause}") from error

    def read_file(self, filename: str) -> dict[str, Any]:
        """Read a file as detectron2 does, formats and all, but by our readers."""
        if filename.endswith(".pkl"):
            data = read_pickle(filename, trusted=self.trust_files)
            if "model" in data and "__author__" in data:
                return dict(data)
            arrays = data.get("blobs", data)
            arrays = {name: x for name, x in arrays.items() if not name.endswith("_momentum")}
            return {"model": arrays, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            state = read_torch(filename, trusted=self.trust_files)["model_state"]
            state = {name: x for name, x in state.items() if not name.endswith(_COUNTER)}
            return {"model": state, "__author__": "pycls", "matching_heuristics": True}
        content: dict[str, Any]
        if filename.endswith(".safetensors"):
            content = {"model": read_safetensors(filename)}
        else:
            content = self.read_torch_file(filename)
            content = content if "model" in content else {"model": content}
        return {**content, "matching_heuristics": True} if self._by_heuristics else content

    def read_torch_file(self, filename: str) -> dict[str, Any]:
        content = read_torch(filename, trusted=self.trust_files)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} where a dictionary must be")
        # Older checkpoints have no card.
        owners = [name for name in self.checkpointables if name != CARD]
        needed = {"model": dict, "iteration": int, **dict.fromkeys(owners, dict)}
        for name, kind in needed.items() if self._must_be_whole else ():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"it has no {name}, so no run can continue from it")
        return content

    def load_model(self, checkpoint: dict[str, Any]) -> Any:
        """Load weights; see detectron2's `DetectionCheckpointer`.

        Raises:
            UserError: if they do not fit the model.
        """
        for name in checkpoint["model"]:
            if not str(name).isprintable():  # fvcore and detectron2 log names as they are
                raise ValueError(f"an entry is called {name!r}; control characters are refused")
        translated = self._translate(checkpoint)
        incompatible = super().load_model(checkpoint)
        misshaped = {name: (theirs, ours) for name, theirs, ours in incompatible.incorrect_shapes}
        entries = set(self.model.state_dict())
        missing = _needed(incompatible.missing_keys) - misshaped.keys()
        surplus = _needed(incompatible.unexpected_keys)
        if self.partial:
            # The rest may be new: the pyramid of a backbone that has one, and the head.
            prefix = next((x for x in _PRETRAINED if any(n.startswith(x) for n in entries)), "")
            needed = {n for n in entries if n.startswith(prefix)}
            missing &= needed
            surplus = {n for n in surplus if translated or _BLOCK.search(n)}
            misshaped = {n: shapes for n, shapes in misshaped.items() if n in needed}
        self._check_classes(misshaped)
        reasons = []
        if missing:
            reasons.append(f"lack {first_few(sorted(missing), 3)}")
        if surplus:
            reasons.append(f"have {first_few(sorted(surplus), 3)}, which the model does not have")
        if misshaped:
            shapes = [
                f"{name}, {theirs} in the file, {ours} in the model"
                for name, (theirs, ours) in sorted(misshaped.items())
            ]
            reasons.append(f"have another shape: {first_few(shapes, 1)}")
        if reasons:
            raise UserError(f"weights {self._source} do not fit this model: they {'; '.join(reasons)}")
        check_finite(self.model)
        return incompatible

    def _translate(self, checkpoint: dict[str, Any]) -> bool:
        """Give a backbone's own weights the model's names, in place; return whether they were such weights.

        A backbone of another library than detectron2 has `translate_weights`: that library's files have
        other names than our checkpoints.
        """
        bottom_up = getattr(getattr(self.model, "backbone", None), "bottom_up", None)
        translate = getattr(bottom_up, "translate_weights", None)
        if translate is None or any(str(name).startswith(_PRETRAINED) for name in checkpoint["model"]):
            return False
        weights = checkpoint["model"]
        for name in ("state_dict", "state_dict_ema"):  # what timm's training script saves
            weights = weights[name] if isinstance(weights.get(name), dict) else weights
        checkpoint["model"] = {f"{_PRETRAINED[0]}{name}": x for name, x in translate(weights).items()}
        return True

    def convert_arrays(self, state_dict: dict[str, Any]) -> None:
        """Make tensors of arrays, and check the types; the entries have the model's names by then."""
        super().convert_arrays(state_dict)
        check_types(state_dict, self.model)

    def _check_classes(self, misshaped: dict[str, tuple[Any, Any]]) -> None:
        """Raise an error about the number of classes if file and model differ in nothing else."""
        layers = {name.rpartition(".")[0] for name in misshaped}
        state = self.model.state_dict()
        if layers == {"head.cls_score"} and "head.bbox_pred.bias" in state:
            key, owner = "MODEL.RETINANET.NUM_CLASSES", self.model
            anchors = state["head.bbox_pred.bias"].shape[0] // 4
        elif layers and layers <= {f"{_BOX_PREDICTOR}.cls_score", f"{_BOX_PREDICTOR}.bbox_pred"}:
            key, owner, anchors = "MODEL.ROI_HEADS.NUM_CLASSES", getattr(self.model, "roi_heads", None), 1
        else:
            return
        classes = getattr(owner, "num_classes", None)
        scores = next((x for name, x in misshaped.items() if name.endswith("cls_score.bias")), None)
        if classes is None or scores is None:
            return
        (theirs,), (ours,) = scores
        # Some heads also score the background.
        before = theirs // anchors - (ours // anchors - classes)
        text = f"{self._source} was trained with {before} classes, but {key} is {classes}"
        if self._must_be_whole:
            text = (
                f"--resume: {text}; to train other classes from it, choose another OUTPUT_DIR and set "
                f"MODEL.WEIGHTS {self._source}"
            )
        raise UserError(text)


def check_types(state: dict[str, Any], model: torch.nn.Module) -> None:
    """Check that a state has floats where the model has them: PyTorch converts other numbers silently.

    Raises:
        ValueError: naming an entry.
    """
    for name, ours in model.state_dict().items():
        theirs = state.get(name)
        if isinstance(theirs, torch.Tensor) and ours.is_floating_point() and not theirs.is_floating_point():
            raise ValueError(f"{name} has {theirs.dtype} numbers; they must be floats")


def check_finite(model: torch.nn.Module) -> None:
    """Check that a model's numbers are finite; a buffer may be infinite by design.

    Raises:
        ValueError: naming an entry.
    """
    parameters = {name for name, _ in model.named_parameters()}
    for name, x in model.state_dict().items():
        sound = x.isfinite() if name in parameters else ~x.isnan()
        if bad := x.numel() - int(sound.sum()):
            raise ValueError(f"{name} has {bad} of {x.numel()} numbers that are NaN or infinite")


def _needed(names: Iterable[str]) -> set[str]:
    return {n for n in names if not n.endswith(_COUNTER) and not n.startswith(_OURS)}


def _without_option(path: str) -> tuple[str, bool]:
    """Return the path without detectron2's option, and whether it was there."""
    if path.endswith(_HEURISTICS) and not os.path.isfile(path):
        return path.removesuffix(_HEURISTICS), True
    return path, False


def check_file(path: str, *, allow_download: bool = False) -> None:
    """Check that weights exist, or are an address that may be fetched, or "".

    Raises:
        UserError: if not.
    """
    file, _ = _without_option(path)
    if is_pretrained(file):
        check_pretrained(file)
    elif is_address(file):
        check_address(file, allow_download=allow_download)
    elif file and not os.path.exists(file):
        raise UnusableFileError(f"weights file not found: {file}")
    elif file:
        try:
            check_regular(file)
        except OSError as error:
            raise UnusableFileError(f"weights file {file}: {error.strerror}") from error


def _is_folder(path: str) -> bool:
    return os.path.isdir(os.path.dirname(path))
