"""A model on pictures of any size, as `TEST.FOCAL.TILES.*` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from torch import Tensor

from focal_d2.data.pixels import ImageReader, from_array
from focal_d2.data.rasters import Georeference, open_raster
from focal_d2.errors import UserError
from focal_d2.inference.sources import Source, read_source
from focal_d2.inference.tiles import Tile, TileDetections, Tiling, check_tiling, detect_in_tiles

# Where images are not resized: as fast as larger tiles, and small enough for any machine.
_WINDOW = 512
_KEYS = "TEST.FOCAL.TILES"


@dataclass(frozen=True)
class Picture:
    """A picture of which windows are read.

    Attributes:
        height: in pixels.
        width: the same.
        read: returns the pixels of a tile, (h, w, C) in the reader's format.
        georeference: of a file that has one.
    """

    height: int
    width: int
    read: Callable[[Tile], np.ndarray]
    georeference: Georeference | None


@contextmanager
def open_picture(source: Source, reader: ImageReader) -> Iterator[Picture]:
    """Open a picture to read windows of it; only TIFF files are not decoded as a whole.

    Raises:
        UserError: if it cannot be read.
    """
    if isinstance(source, (str, Path)):
        with open_raster(str(source), max_pixels=reader.max_pixels) as raster:
            if raster is not None:
                yield Picture(
                    raster.height,
                    raster.width,
                    lambda tile: from_array(raster.read(*tile), reader.image_format),
                    raster.georeference,
                )
                return
    yield picture_of(read_source(source, reader))


def picture_of(pixels: np.ndarray) -> Picture:
    """Return a picture that is in memory, (H, W, C)."""
    return Picture(
        pixels.shape[0],
        pixels.shape[1],
        lambda tile: pixels[tile.y0 : tile.y1, tile.x0 : tile.x1],
        georeference=None,
    )


@dataclass(frozen=True)
class TileSettings:
    """How pictures are cut and detections joined.

    Attributes:
        window: side of a tile, in pixels of the picture.
        overlap: of neighbours, in pixels of the picture.
        scale: tiles are resized by it.
        iou: boxes of a class from two tiles are the same object above this IoU.
        fuse: see `detect_in_tiles`.
    """

    window: int
    overlap: int
    scale: float
    iou: float
    fuse: bool

    @classmethod
    def from_config(cls, cfg: CfgNode, model: Any) -> TileSettings | None:
        """Read `TEST.FOCAL.TILES.*`; None if they are not enabled.

        Args:
            cfg: full config.
            model: one of detectron2's, whose backbone says its strides.

        Raises:
            UserError: if the sizes do not fit each other or the strides.
        """
        test = cfg.TEST.FOCAL
        if not test.TILES.ENABLED:
            return None
        # Views of test-time augmentation are resized one by one.
        resized_to = 0 if cfg.TEST.AUG.ENABLED else cfg.INPUT.MIN_SIZE_TEST
        window = test.TILES.WINDOW or (0 if resized_to else _WINDOW)
        if not window:
            raise UserError(
                f"{_KEYS}.WINDOW is 0, and INPUT.MIN_SIZE_TEST {resized_to}: set WINDOW to the shorter side "
                "of the training images in pixels, so that tiles are resized as those were"
            )
        strides = [shape.stride for shape in model.backbone.output_shape().values()]
        # A tile that is resized starts anywhere in the anchors' grid.
        stride = max(strides) if resized_to in (0, window) else 1
        overlap = test.TILES.OVERLAP or window // 4 // stride * stride
        check_tiling(window, overlap, stride, keys=_KEYS)
        scale = resized_to / window if resized_to else 1.0
        return cls(window, overlap, scale, cfg.MODEL.RETINANET.NMS_THRESH_TEST, test.TILES.MERGE == "fuse")

    def detect(
        self,
        picture: Picture,
        reader: ImageReader,
        detect: Callable[[Sequence[tuple[Tensor, int, int]]], Sequence[TileDetections]],
        *,
        batch: int,
        progress: Callable[[int, int], None] = lambda done, tiles: None,
    ) -> TileDetections:
        """Detect objects in a picture.

        Args:
            picture: see `open_picture`.
            reader: resizes tiles, and makes tensors of them.
            detect: returns the detections of tiles, each given as its tensor (C, H, W), and its height and
                width in the picture, in whose pixels its boxes are.
            batch: tiles that `detect` gets at once.
            progress: called with the number of tiles that are done, and of all.
        """
        tiling = Tiling(picture.height, picture.width, self.window, self.overlap)

        def detect_pixels(tiles: list[np.ndarray]) -> Sequence[TileDetections]:
            return detect([(self._resized(x, reader), x.shape[0], x.shape[1]) for x in tiles])

        return detect_in_tiles(
            tiling,
            picture.read,
            detect_pixels,
            batch=batch,
            iou=self.iou,
            fuse=self.fuse,
            progress=lambda done: progress(done, tiling.rows * tiling.columns),
        )

    def _resized(self, pixels: np.ndarray, reader: ImageReader) -> Tensor:
        inputs = reader.augmentation_input(np.ascontiguousarray(pixels))
        if self.scale != 1:
            height, width = pixels.shape[:2]
            size = (max(1, round(x * self.scale)) for x in (height, width))
            inputs.transform(T.ResizeTransform(height, width, *size))
        return reader.to_tensor(inputs.image)
