"""From a config with a checkpoint to files, each of them compared with the model in Python."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode

from focal_d2.data.pixels import FORMATS as CHANNELS
from focal_d2.errors import UserError, reason
from focal_d2.evaluation.operating_point import SCORE_WITHOUT_POINT
from focal_d2.export import run
from focal_d2.export.check import Agreement, Limits, Loss, average_precision, compare
from focal_d2.export.graph import Graph, check_exportable, describe, for_recording
from focal_d2.export.onnx import record_onnx, require, save_onnx
from focal_d2.export.quantise import quantise
from focal_d2.export.torchscript import load_torchscript, write_torchscript
from focal_d2.inference import Predictor
from focal_d2.storage.files import read_file, write_aside

# Name of a format -> name of its file.
FORMATS = {"onnx": "model.onnx", "torchscript": "model.ts", "int8": "model_int8.onnx"}
_LARGEST_SOURCE = 2**20


class Exporter:
    """Writes a trained detector into a folder.

    Attributes:
        cfg: with which the model is recorded.
        threshold: the lowest score that `run.py` returns.
    """

    def __init__(
        self,
        cfg: CfgNode,
        folder: Path,
        *,
        threshold: float | None = None,
        trust_files: bool = False,
        allow_download: bool = False,
    ) -> None:
        """Load the checkpoint.

        Args:
            cfg: full config with `MODEL.WEIGHTS`.
            folder: for the files; it is made.
            threshold: see the attributes; None: the checkpoint's operating point, or 0.3 without it.
            trust_files: see `Predictor`.
            allow_download: see `Predictor`.

        Raises:
            UserError: if this model can't be exported, or the folder can't be made.
        """
        check_exportable(cfg)
        self.cfg, self.folder = for_recording(cfg), folder
        self.predictor = Predictor(
            self.cfg, threshold=0.0, trust_files=trust_files, allow_download=allow_download
        )
        point = self.predictor.operating_point
        self.threshold = threshold if threshold is not None else point.score if point else SCORE_WITHOUT_POINT
        self._graph = Graph(self.predictor.model).eval()
        self._channels = CHANNELS[cfg.INPUT.FORMAT]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {folder}: {reason(error)}") from error

    def write(self, format_name: str, calibration: Sequence[Path] = ()) -> Path:
        """Write a file of one of `FORMATS`, and `run.py` beside it; return its path.

        Args:
            format_name: of `FORMATS`.
            calibration: pictures that int8 is calibrated on.

        Raises:
            UserError: if a package is missing or the file can't be written.
        """
        path = self.folder / FORMATS[format_name]
        try:
            if format_name == "torchscript":
                write_torchscript(self._graph, path, self.metadata("float32"), channels=self._channels)
                return path
            require("onnxruntime")  # run.py needs it, and so does the comparison
            model, precision = self._recorded, "float32"
            if format_name == "int8":
                tensors = (self.predictor.prepare(str(x)).tensor for x in calibration)
                images = (x.permute(1, 2, 0).unsqueeze(0).contiguous().numpy() for x in tensors)
                model, precision = quantise(model, images), "int8"
            save_onnx(model, path, self.metadata(precision))
            source = read_file(run.__file__, limit=_LARGEST_SOURCE)
            write_aside(str(self.folder / "run.py"), lambda file: file.write(source))
        except OSError as error:
            raise UserError(f"cannot write {path}: {reason(error)}") from error
        return path

    def metadata(self, precision: str) -> dict[str, Any]:
        """Return the metadata of a file; see `describe`."""
        names = self.predictor.class_names
        return describe(self.cfg, class_names=list(names), threshold=self.threshold, precision=precision)

    def load(self, path: Path) -> run.Detector:
        """Load a file that was written; it returns all scores."""
        if path.suffix == ".ts":
            detector = run.Detector(load_torchscript(path), self.metadata("float32"))
        else:
            detector = run.load(path, threads=torch.get_num_threads())
        detector.threshold = 0.0
        return detector

    def compare(self, path: Path, pictures: Sequence[Path]) -> Agreement:
        """Compare a file with the model in Python, both in float32, on pictures."""
        retinanet = self.cfg.MODEL.RETINANET
        limits = Limits(retinanet.SCORE_THRESH_TEST, self.cfg.TEST.DETECTIONS_PER_IMAGE)
        return compare(self.detect, self.load(path), pictures, limits)

    def measure_loss(self, path: Path, largest: float) -> Loss:
        """Compare an int8 file's AP on `DATASETS.VAL` with that of float32; remove the file if it is bad.

        Args:
            path: of the file.
            largest: loss that is allowed, in points of AP.
        """
        files = (self.load(self.write("onnx")), self.load(path))
        names = self.cfg.DATASETS.VAL
        before, after = (sum(average_precision(x, d, self.cfg) for d in names) / len(names) for x in files)
        loss = Loss(before, after, largest, ", ".join(names))
        if not loss.agrees:
            path.unlink()
        return loss

    @cached_property
    def _recorded(self) -> Any:
        return record_onnx(self._graph, channels=self._channels)

    def detect(self, path: Path) -> run.Detections:
        """Return what the model in Python detects in a picture, with all scores."""
        found = self.predictor(path)
        return run.Detections(found.boxes, found.scores, found.classes)
