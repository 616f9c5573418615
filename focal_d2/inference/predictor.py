"""Detect objects in images with a trained model."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from focal_d2.config import key_value
from focal_d2.config.architectures import CLASS_KEYS, class_key
from focal_d2.data.augmentations import Resize
from focal_d2.data.datasets import known_class_names
from focal_d2.data.mapper import build_reader
from focal_d2.errors import UserError, first_few
from focal_d2.evaluation.operating_point import OperatingPoint, saved_point
from focal_d2.inference.feed import ahead
from focal_d2.inference.results import Detections
from focal_d2.inference.sources import Source, read_source
from focal_d2.inference.test_time import build_augmented_views
from focal_d2.inference.tiled import TileSettings, open_picture
from focal_d2.inference.tiles import TileDetections
from focal_d2.load_config import load_config
from focal_d2.modeling import FocalRetinaNet
from focal_d2.modeling.build import building, resolve_device
from focal_d2.storage.card import ModelCard, class_difference, saved_card
from focal_d2.storage.checkpoint import FocalCheckpointer

logger = logging.getLogger(__name__)

# Most images of a batch, and on a CPU most pixels: larger batches are no faster there.
_IMAGES_ON_CPU, _IMAGES_ON_GPU = 8, 64
_PIXELS_ON_CPU = 2**21
# Of a GPU's memory, the share that batches may fill.
_SHARE_OF_GPU = 0.6


class Prepared(NamedTuple):
    """An image as the model takes it."""

    tensor: torch.Tensor  # (C, H', W'), resized
    height: int  # of the image itself
    width: int
    source: Source | None


class Predictor:
    """A trained detector for images: files, arrays or Pillow images, one or many.

    Example:
        predictor = focal_d2.Predictor("output/model_final.pth")
        for box, score, label, name in predictor("field.png"):
            print(name, score, box)
        for result in predictor(["a.jpg", "b.jpg"]):
            result.draw(f"{result.file}.boxes.png")

    Images of a batch have the same size: the result of an image does not depend on others. Images of other
    sizes would have to be padded, which changes what the network sees at their edges.

    Attributes:
        cfg: the config.
        model: detectron2's model, in evaluation mode.
        thresholds: (K,) the lowest score of the detections of each class that are returned; the model itself
            returns none below `SCORE_THRESH_TEST`. They may be changed.
        operating_point: of the checkpoint; None if it has none.
        class_names: K names.
        batch_size: the most images that are computed together.
        tiles: how pictures are cut (`TEST.FOCAL.TILES`); None: they are not.
        progress: called after each batch of tiles (`TEST.FOCAL.TILES`) with their number so far, and that of
            all tiles of the picture.
    """

    def __init__(
        self,
        model: CfgNode | str | Path,
        *,
        threshold: float | Mapping[str, float] | None = None,
        batch_size: int | None = None,
        trust_files: bool = False,
        allow_download: bool = False,
    ) -> None:
        """Build the model and load its weights.

        Args:
            model: a checkpoint of a training, or of `focal-d2 strip`, which has its config in it; or a full
                config with `MODEL.WEIGHTS` (see `focal_d2.engine.load_config`). The class names are the
                checkpoint's; if it has none, those of the first dataset of `DATASETS.TEST`; if there is none
                with as many classes, numbers.
            threshold: see `thresholds`: a number for all classes, or one a class, by its name. None: those of
                the checkpoint's operating point, or 0 if there is none. A line of the log says which.
            batch_size: see the attributes; None: 8 on a CPU, and on a GPU what its memory takes, at most 64.
            trust_files: let the checkpoint import and run code.
            allow_download: let `MODEL.WEIGHTS` be an address outside detectron2's stores.

        Raises:
            UserError: if the weights are missing or do not fit, the machine does not have the device, or
                detectron2 refuses the config.
        """
        if isinstance(model, (str, Path)):
            model = _config_of(os.fspath(model), trust_files=trust_files)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        self.reader = build_reader(model)
        self.cfg = cfg = model.clone()
        cfg.defrost()
        resolve_device(cfg)
        if not cfg.MODEL.WEIGHTS:
            raise UserError("MODEL.WEIGHTS is empty: prediction needs a checkpoint")
        with building("model"):
            self.model = build_model(cfg).eval()
        content = FocalCheckpointer(
            self.model, partial=False, trust_files=trust_files, allow_download=allow_download
        ).load(cfg.MODEL.WEIGHTS)
        self.operating_point = saved_point(content, cfg.MODEL.WEIGHTS)
        self.class_names = _class_names(cfg, saved_card(content, cfg.MODEL.WEIGHTS))
        if threshold is None and self.operating_point is not None:
            logger.info(f"threshold: {self.operating_point}, from {cfg.MODEL.WEIGHTS}")
        self.thresholds = _thresholds(threshold, self.operating_point, self.class_names)
        self.progress: Callable[[int, int], None] = lambda done, tiles: None
        self.tiles, size = None, cfg.INPUT.MIN_SIZE_TEST
        if isinstance(self.model, FocalRetinaNet):
            self.tiles = TileSettings.from_config(cfg, self.model)
            self.model.views = build_augmented_views(cfg)
            size = 0 if self.model.views else size  # views are made of the original image
        self._resize = Resize(size, cfg.INPUT.MAX_SIZE_TEST)
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        self.batch_size = batch_size or (_IMAGES_ON_GPU if on_gpu else _IMAGES_ON_CPU)
        self._fits: dict[torch.Size, int] | None = None if batch_size else {}  # images of a size in a batch

    @overload
    def __call__(self, images: Source) -> Detections: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[Detections]: ...

    def __call__(self, images: Source | list[Any] | tuple[Any, ...]) -> Detections | list[Detections]:
        """Detect objects with scores of at least `thresholds`.

        Args:
            images: an image, or a list of them: a file; pixels as OpenCV reads them, (H, W, 3) uint8 in BGR
                order, or (H, W) or (H, W, 1) uint8 grey; or a Pillow image of any mode. They are converted to
                `INPUT.FORMAT`.

        Returns:
            The detections of the image; of a list, a list with those of each image.

        Raises:
            UserError: if a file cannot be read as an image, or pixels have another shape or type.
        """
        if isinstance(images, (list, tuple)):
            return list(self.stream(images))
        return self.detect([self.prepare(images)])[0]

    def in_tiles(self) -> Predictor | None:
        """Return a predictor of the same model that detects in tiles (`TEST.FOCAL.TILES`).

        Returns:
            None if the model has no tiles, or the config resizes images and does not say the size of a tile.
        """
        test = self.cfg.TEST.FOCAL
        resizes = self.cfg.INPUT.MIN_SIZE_TEST and not self.cfg.TEST.AUG.ENABLED
        if not isinstance(self.model, FocalRetinaNet) or (resizes and not test.TILES.WINDOW):
            return None
        other = copy.copy(self)
        other.cfg = self.cfg.clone()
        other.cfg.TEST.FOCAL.TILES.ENABLED = True
        other.tiles = TileSettings.from_config(other.cfg, self.model)
        return other

    @property
    def window(self) -> int:
        """Side of a tile in pixels; 0 without tiles."""
        return self.tiles.window if self.tiles else 0

    def stream(self, images: Iterable[Source]) -> Iterator[Detections]:
        """Yield the detections of each image in order; memory does not grow with their number.

        Args:
            images: see `__call__`; read as far as needed.

        Raises:
            UserError: as `__call__`.
        """
        batch: list[Prepared] = []
        for image in ahead(self.prepare, images, number=2 * self.batch_size):
            batch.append(image)
            if len(batch) == self.batch_size:
                yield from self.detect(batch)
                batch = []
        yield from self.detect(batch)

    def prepare(self, image: Source) -> Prepared:
        """Read an image and resize it for the model. Threads may call it.

        A picture that is detected in tiles is not read here.

        Raises:
            UserError: as `__call__`.
        """
        if self.tiles is not None:
            return Prepared(torch.empty(0), 0, 0, image)
        pixels = read_source(image, self.reader)
        resized = self.reader.augmentation_input(pixels)
        self._resize(resized)
        height, width = pixels.shape[:2]
        return Prepared(self.reader.to_tensor(resized.image), height, width, image)

    @torch.no_grad()
    def detect(self, images: Sequence[Prepared]) -> list[Detections]:
        """Detect objects in images that were prepared, those of the same size together.

        Args:
            images: results of `prepare`.
        """
        if self.tiles is None:
            return self._detect_whole(images)
        return [self._detect_in_tiles(self.tiles, x.source) for x in images if x.source is not None]

    def _detect_in_tiles(self, tiles: TileSettings, source: Source) -> Detections:
        def detect(images: Sequence[tuple[torch.Tensor, int, int]]) -> list[TileDetections]:
            results = self._detect_whole([Prepared(*image, source=None) for image in images])
            return [TileDetections(x.boxes, x.scores, x.classes) for x in results]

        with open_picture(source, self.reader) as picture:
            found = tiles.detect(picture, self.reader, detect, batch=self.batch_size, progress=self.progress)
            size = picture.height, picture.width
            return Detections(*found, self.class_names, *size, source, picture.georeference)

    def _detect_whole(self, images: Sequence[Prepared]) -> list[Detections]:
        results: list[Detections | None] = [None] * len(images)
        of_size: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(images):
            of_size.setdefault(image.tensor.shape, []).append(i)
        for size, indices in of_size.items():
            start = 0
            while start < len(indices):
                number = self._most_of(size)
                for i, result in self._forward(images, indices[start : start + number]):
                    results[i] = result
                start += number
        return [x for x in results if x is not None]

    def _most_of(self, size: torch.Size) -> int:
        """Return how many images of a size fit a batch; 1 on a GPU that has seen none of them."""
        if self._fits is None:
            return self.batch_size
        if torch.device(self.cfg.MODEL.DEVICE).type != "cuda":
            return max(1, min(self.batch_size, _PIXELS_ON_CPU // max(1, size[1] * size[2])))
        return self._fits.get(size, 1)

    def _forward(
        self, images: Sequence[Prepared], indices: Sequence[int]
    ) -> Iterator[tuple[int, Detections]]:
        batch = [images[i] for i in indices]
        inputs = [{"image": x.tensor, "height": x.height, "width": x.width} for x in batch]
        size, device = batch[0].tensor.shape, torch.device(self.cfg.MODEL.DEVICE)
        measured = device.type == "cuda" and self._fits is not None and size not in self._fits
        if measured:
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        outputs = self.model(inputs)
        limits = torch.from_numpy(np.asarray(self.thresholds, np.float32))
        if measured and self._fits is not None:
            each = max(1, torch.cuda.max_memory_allocated(device) - before)
            room = _SHARE_OF_GPU * torch.cuda.get_device_properties(device).total_memory - before
            self._fits[size] = max(1, min(self.batch_size, int(room // each)))
        for i, image, output in zip(indices, batch, outputs, strict=True):
            if "instances" not in output:
                raise UserError(
                    f"{type(self.model).__name__} returns {', '.join(output)} of an image; prediction needs "
                    "instances"
                )
            instances = output["instances"].to("cpu")
            instances = instances[instances.scores >= limits[instances.pred_classes]]
            yield (
                i,
                Detections(
                    instances.pred_boxes.tensor.numpy(),
                    instances.scores.numpy(),
                    instances.pred_classes.numpy(),
                    self.class_names,
                    image.height,
                    image.width,
                    image.source,
                ),
            )


def _config_of(path: str, *, trust_files: bool) -> CfgNode:
    """Return the config in a checkpoint."""
    if not path.endswith(".pth"):
        raise UserError(
            f"Predictor takes a checkpoint (.pth) or a config, not {path}; of a YAML file it takes "
            'load_config(FILE, ["MODEL.WEIGHTS", CHECKPOINT])'
        )
    return load_config(path, trust_files=trust_files)


def _thresholds(
    threshold: float | Mapping[str, float] | None, point: OperatingPoint | None, class_names: Sequence[str]
) -> np.ndarray:
    """Return the threshold of each class, (K,) float32; see `Predictor`.

    Raises:
        UserError: for a class that there is not.
    """
    others = 0.0  # of classes that are not named
    if threshold is None:
        others, threshold = (0.0, {}) if point is None else (point.score, point.per_class)
    elif not isinstance(threshold, Mapping):
        others, threshold = threshold, {}
    elif unknown := [name for name in threshold if name not in class_names]:
        raise UserError(
            f"threshold: no class is called {first_few(unknown)}; they are {first_few(class_names)}"
        )
    return np.array([threshold.get(name, others) for name in class_names], np.float32)


def _class_names(cfg: CfgNode, card: ModelCard | None) -> list[str]:
    """Return the K class names of a model; see `Predictor`.

    Raises:
        UserError: if the checkpoint has another number of names than the model has classes.
    """
    dataset = cfg.DATASETS.TEST[0] if cfg.DATASETS.TEST else ""
    of_dataset = known_class_names(dataset) if dataset else None
    counted_by = class_key(cfg)
    most = max(key_value(cfg, key) for key in ([counted_by] if counted_by else CLASS_KEYS))
    if card is not None and card.class_names is not None:
        if counted_by and len(card.class_names) != most:
            raise UserError(
                f"{cfg.MODEL.WEIGHTS} has names of {len(card.class_names)} classes, but {counted_by} is "
                f"{most}"
            )
        difference, _ = class_difference(card.class_names, of_dataset, f'dataset "{dataset}"')
        if difference:
            logger.warning(f"{difference}; results have the checkpoint's names")
        return list(card.class_names)
    if counted_by and (of_dataset is None or len(of_dataset) != most):
        of_dataset = None
    return of_dataset or [str(k) for k in range(most)]
