"""Large pictures that are read window by window: GeoTIFF and TIFF, with their georeference.

rasterio (GDAL) reads them; it is an optional package.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import TiffImagePlugin

from focal_d2.data.image_files import UNREADABLE, pillow_errors, why_unreadable
from focal_d2.errors import UserError, describe_error, first_few
from focal_d2.storage.files import open_data

logger = logging.getLogger(__name__)

# Of decoded blocks, in MiB. A row of windows reads the same strips again and again.
_CACHE = 256
_TIFF_HEADERS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: more than 4 GB
_ORIENTATION = 274  # a tag of TIFF


@dataclass(frozen=True)
class Georeference:
    """Where the pixels of a picture are on the Earth.

    Attributes:
        crs: the coordinate reference system, as "EPSG:32612" or WKT; "" if the file does not say.
        transform: (a, b, c, d, e, f): column x and row y are at (a x + b y + c, d x + e y + f).
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]

    def to_map(self, points: np.ndarray) -> np.ndarray:
        """Return the coordinates (…, 2) float64 of pixels (…, 2): x, y."""
        a, b, c, d, e, f = self.transform
        x, y = np.moveaxis(np.asarray(points, np.float64), -1, 0)
        return np.stack([a * x + b * y + c, d * x + e * y + f], axis=-1)

    def to_degrees(self, points: np.ndarray) -> np.ndarray:
        """Return longitude and latitude (n, 2) in WGS 84 of pixels (n, 2), as GeoJSON has them (RFC 7946).

        Raises:
            UserError: if the coordinate reference system is not known, or has no such coordinates.
        """
        from rasterio.errors import CRSError, RasterioError
        from rasterio.warp import transform

        if not self.crs:
            raise UserError("the picture names no coordinate reference system; GeoJSON needs one")
        at = self.to_map(points)
        try:
            return np.stack(transform(self.crs, "EPSG:4326", at[:, 0], at[:, 1]), axis=-1)
        except (CRSError, RasterioError) as error:
            raise UserError(f"{self.crs} has no longitude and latitude: {describe_error(error)}") from error


class Raster:
    """A TIFF file of which windows are read."""

    def __init__(self, path: str, dataset: Any) -> None:
        """Choose the bands that are read.

        Args:
            path: of the file.
            dataset: rasterio's.

        Raises:
            UserError: for pixels that are not of 8 or 16 bits.
        """
        self.height, self.width = dataset.height, dataset.width
        self._path, self._dataset = path, dataset
        kinds = [interpretation.name for interpretation in dataset.colorinterp]
        self._palette = _palette(dataset) if kinds[0] == "palette" else None
        colours = [kinds.index(name) + 1 for name in ("red", "green", "blue") if name in kinds]
        if len(colours) < 3:
            usable = [i + 1 for i, kind in enumerate(kinds) if kind != "alpha"]
            colours = usable[:3] if len(usable) >= 3 else usable[:1]
        self._bands = colours
        types = {dataset.dtypes[band - 1] for band in colours}
        if not types <= {"uint8", "uint16"}:
            raise UserError(
                f"cannot read {path}: its pixels are {', '.join(sorted(types))}; unsigned numbers of 8 or 16 "
                "bits are read"
            )
        left_out = [
            f"{i + 1} ({dataset.descriptions[i] or kind})"
            for i, kind in enumerate(kinds)
            if i + 1 not in colours and kind != "alpha"
        ]
        if left_out:
            logger.info(f"{path}: bands {colours} are read, and not {first_few(left_out)}")
        if "uint16" in types:
            logger.info(f"{path}: of 16 bits the higher 8 are read, as in training")
        if any(dataset.nodatavals[band - 1] is not None for band in colours):
            value = dataset.nodatavals[colours[0] - 1]
            logger.info(f"{path}: pixels without data are read as they are stored: {value:g}")
        self.georeference = _georeference(dataset)

    def read(self, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
        """Return the pixels of columns x0 to x1 and rows y0 to y1, (y1 - y0, x1 - x0, 3) uint8 BGR.

        Raises:
            UserError: if the file is damaged there.
        """
        from rasterio.errors import RasterioError

        try:
            pixels = self._dataset.read(self._bands, window=((y0, y1), (x0, x1)))  # (bands, h, w)
        except RasterioError as error:
            raise UserError(
                f"cannot read {self._path}, rows {y0} to {y1}: {describe_error(error)}"
            ) from error
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if self._palette is not None:
            return self._palette[pixels[0]]
        if len(pixels) == 1:
            pixels = pixels.repeat(3, axis=0)
        return np.ascontiguousarray(pixels[::-1].transpose(1, 2, 0))


@contextmanager
def open_raster(path: str, *, max_pixels: int | None) -> Iterator[Raster | None]:
    """Open a TIFF file to read windows of it.

    Args:
        path: of an image.
        max_pixels: limit on the pixels of a block, the part of a file that is decoded at once.

    Yields:
        The raster; None if the file is no TIFF, or rasterio is not installed.

    Raises:
        UserError: if the file cannot be read.
    """
    orientation = _tiff_orientation(path)
    if orientation is None:
        yield None
        return
    if orientation != 1:
        raise UserError(
            f"cannot read {path} by windows: it is stored turned or mirrored (TIFF orientation {orientation})"
        )
    try:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning, RasterioError
    except ImportError:
        logger.info(f"{path} is read as a whole, without its georeference: rasterio is not installed")
        yield None
        return

    # Only GDAL's driver for TIFF: others read files and addresses that a file names.
    with rasterio.Env(GDAL_CACHEMAX=_CACHE), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        try:
            dataset = rasterio.open(os.path.abspath(path), driver="GTiff")
        except RasterioError as error:
            raise UserError(f"cannot read image {path}: {describe_error(error)}") from error
        with dataset:
            rows, columns = dataset.block_shapes[0]
            if max_pixels is not None and rows * columns > max_pixels:
                raise UserError(
                    f"cannot read {path} by windows: its blocks have {columns:,} × {rows:,} pixels, more "
                    f"than INPUT.FOCAL.MAX_PIXELS, {max_pixels:,}; gdal_translate -co TILED=YES makes them "
                    "smaller"
                )
            yield Raster(path, dataset)


def _tiff_orientation(path: str) -> int | None:
    """Return a TIFF file's orientation, 1 for upright; None if the file is no TIFF.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open_data(path, limit=sys.maxsize) as file, pillow_errors():
            header = file.read(8)
            if header[:4] not in _TIFF_HEADERS:
                return None
            header += file.read(8) if header[:4] in _TIFF_HEADERS[2:] else b""
            directory = TiffImagePlugin.ImageFileDirectory_v2(header)
            file.seek(directory.next)
            directory.load(file)
            return int(directory.get(_ORIENTATION, 1))
    except UNREADABLE as error:
        raise UserError(f"cannot read image {path}: {why_unreadable(path, error)}") from error


def _palette(dataset: Any) -> np.ndarray:
    """Return the colours (256, 3) uint8 BGR of a palette."""
    table = np.zeros((256, 3), np.uint8)
    for value, (red, green, blue, _) in dataset.colormap(1).items():
        table[value] = blue, green, red
    return table


def _georeference(dataset: Any) -> Georeference | None:
    matrix = tuple(float(x) for x in dataset.transform[:6])
    if dataset.transform.is_identity:
        return None
    crs = dataset.crs
    name = "" if crs is None else (f"EPSG:{crs.to_epsg()}" if crs.to_epsg() else crs.to_wkt())
    return Georeference(name, matrix)  # type: ignore[arg-type]
