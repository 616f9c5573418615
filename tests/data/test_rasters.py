from __future__ import annotations

import logging

import cv2
import numpy as np
import pytest
from PIL import Image

from focal_d2 import UserError
from focal_d2.data.pixels import ImageReader
from focal_d2.data.rasters import Georeference, open_raster

rasterio = pytest.importorskip("rasterio")
UTM = rasterio.transform.Affine(0.1, 0, 541000.0, 0, -0.1, 4977000.0)  # 10 cm a pixel, north up


def pixels(height=70, width=90, bands=3, dtype=np.uint8):
    high = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, high, (bands, height, width), endpoint=True).astype(dtype)


def write(path, data, **options):
    options = {
        "driver": "GTiff",
        "height": data.shape[1],
        "width": data.shape[2],
        "count": len(data),
    } | options
    with rasterio.open(path, "w", dtype=data.dtype, **options) as file:
        file.write(data)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate"},
        {"BIGTIFF": "YES", "compress": "lzw", "blockysize": 7},
        {"interleave": "band", "photometric": "rgb"},
    ],
)
def test_windows_are_those_of_the_whole_image(tmp_path, options):
    path = write(tmp_path / "a.tif", pixels(), **options)
    whole = ImageReader("BGR", "pil", 10**6).read(path) if "BIGTIFF" not in options else None
    expected = np.ascontiguousarray(pixels()[::-1].transpose(1, 2, 0))
    if whole is not None:
        np.testing.assert_array_equal(whole, expected)
    with open_raster(path, max_pixels=10**6) as raster:
        assert (raster.height, raster.width, raster.georeference) == (70, 90, None)
        for x0, y0, x1, y1 in ((0, 0, 90, 70), (13, 5, 77, 70), (89, 69, 90, 70)):
            np.testing.assert_array_equal(raster.read(x0, y0, x1, y1), expected[y0:y1, x0:x1])


def test_grey_and_16_bits_are_read_as_in_training(tmp_path):
    for name, data in (("a.tif", pixels(bands=1)), ("b.tif", pixels(bands=1, dtype=np.uint16))):
        path = write(tmp_path / name, data)
        whole = ImageReader("BGR", "pil", 10**6).read(path)
        with open_raster(path, max_pixels=None) as raster:
            np.testing.assert_array_equal(raster.read(0, 0, 90, 70), whole)


def test_files_of_other_programs(tmp_path):
    image = pixels().transpose(1, 2, 0)
    cv2.imwrite(str(tmp_path / "opencv.tif"), image)
    Image.fromarray(image).save(tmp_path / "pillow.tif", compression="tiff_lzw")
    Image.fromarray(image).quantize(16).save(tmp_path / "palette.tif")
    for name in ("opencv.tif", "pillow.tif", "palette.tif"):
        whole = ImageReader("BGR", "pil", 10**6).read(str(tmp_path / name))
        with open_raster(str(tmp_path / name), max_pixels=None) as raster:
            np.testing.assert_array_equal(raster.read(3, 4, 50, 60), whole[4:60, 3:50])


def test_extra_bands_are_left_out_and_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = write(tmp_path / "a.tif", pixels(bands=5), photometric="rgb", nodata=0)
    with open_raster(path, max_pixels=None) as raster:
        expected = pixels(bands=5)[2::-1].transpose(1, 2, 0)
        np.testing.assert_array_equal(raster.read(0, 0, 90, 70), expected)
    assert "bands [1, 2, 3] are read, and not 4 (undefined), 5 (undefined)" in caplog.text
    assert "pixels without data are read as they are stored: 0" in caplog.text


def test_the_georeference_is_that_of_the_file(tmp_path):
    path = write(tmp_path / "a.tif", pixels(), crs="EPSG:32612", transform=UTM)
    with open_raster(path, max_pixels=None) as raster:
        place = raster.georeference
    assert place.crs == "EPSG:32612"
    np.testing.assert_allclose(
        place.to_map(np.array([[0, 0], [10, 20]])), [[541000, 4977000], [541001, 4976998]]
    )
    # Zone 12 has its middle at 111° west; 41 km to the east are 0.52° there, at 44.9° north.
    ((longitude, latitude),) = place.to_degrees(np.array([[0, 0]]))
    assert longitude == pytest.approx(-110.48, abs=0.01)
    assert latitude == pytest.approx(44.95, abs=0.01)


def test_places_that_are_not_on_the_earth_are_named():
    point = np.array([[0.0, 0.0]])
    with pytest.raises(UserError, match="names no coordinate reference system"):
        Georeference("", tuple(UTM[:6])).to_degrees(point)
    with pytest.raises(UserError, match="nonsense has no longitude and latitude"):
        Georeference("nonsense", tuple(UTM[:6])).to_degrees(point)


def test_other_images_are_no_rasters(tmp_path):
    Image.fromarray(pixels().transpose(1, 2, 0)).save(tmp_path / "a.png")
    with open_raster(str(tmp_path / "a.png"), max_pixels=None) as raster:
        assert raster is None


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: write(path, pixels().astype(np.float32)), "its pixels are float32; unsigned numbers"),
        (lambda path: path.write_bytes(b"II*\0" + b"\xff" * 40), "cannot read image"),
        (lambda path: path.write_bytes(b"II*\0"), "cannot read image"),
        (
            lambda path: Image.fromarray(pixels().transpose(1, 2, 0)).save(path, tiffinfo={274: 6}),
            "stored turned or mirrored \\(TIFF orientation 6\\)",
        ),
    ],
)
def test_what_cannot_be_read_is_one_line(tmp_path, make, message):
    make(tmp_path / "a.tif")
    with (
        pytest.raises(UserError, match=message) as error,
        open_raster(str(tmp_path / "a.tif"), max_pixels=None),
    ):
        pass
    assert "\n" not in str(error.value)


def test_blocks_that_are_too_large_are_refused(tmp_path):
    path = write(tmp_path / "a.tif", pixels(), blockysize=70, compress="deflate")
    with (
        pytest.raises(
            UserError, match="its blocks have 90 × 70 pixels, more than INPUT.FOCAL.MAX_PIXELS, 6,000"
        ),
        open_raster(path, max_pixels=6000),
    ):
        pass


def test_a_file_that_is_damaged_inside_is_named(tmp_path):
    path = write(tmp_path / "a.tif", pixels(), compress="deflate", blockysize=10)
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = b"\0" * 400
    (tmp_path / "a.tif").write_bytes(data)
    with (
        open_raster(path, max_pixels=None) as raster,
        pytest.raises(UserError, match=r"cannot read .*a.tif, rows 0 to 70"),
    ):
        raster.read(0, 0, 90, 70)
