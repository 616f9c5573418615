from __future__ import annotations

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.detection_utils import read_image
from PIL import Image, PngImagePlugin

from focal_d2.data import pixels
from focal_d2.data.image_files import (
    FILE_FORMATS,
    IMAGE_SUFFIXES,
    UNREADABLE,
    allow_pixels,
    check_for_detectron2,
    open_image,
    upright_size,
    why_unreadable,
)
from focal_d2.data.opencv import OpenCVInput, resize, to_planes
from focal_d2.data.pixels import FORMATS, from_array, to_rgb
from tests.data.hostile_images import FOREIGN
from tests.special_files import SPECIAL, put

read_pixels = functools.partial(pixels.read_pixels, max_pixels=10**8)
read_with_pillow = functools.partial(pixels.read_with_pillow, max_pixels=10**8)


def photograph(height: int = 90, width: int = 120, *, channels: int = 3) -> np.ndarray:
    """Smooth colours, sharp edges and noise: (H, W, C) uint8."""
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (6, 8, channels), np.uint8), (width, height))
    image[height // 3 : height // 2, width // 4 : width // 2] = 255
    image[::7, : width // 5] = 0
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, kind: str, **kwargs: object) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **kwargs)
    return file.getvalue()


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """Put a chunk after a PNG file's header."""
    checksum = zlib.crc32(name + content)
    return (
        png[:33] + struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum) + png[33:]
    )


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[274] = orientation
    return tags.tobytes()


def note(key: str, value: str, **kwargs: bool) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, value, **kwargs)
    return info


XMP_TURNED = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
IMAGE, GREY = photograph(), photograph()[:, :, 0]
PNG = encode(IMAGE, "PNG")
JPEGS = {
    "jpeg": encode(IMAGE, "JPEG"),
    "progressive": encode(IMAGE, "JPEG", progressive=True),
    "grey jpeg": encode(GREY, "JPEG"),
    "full colour": encode(IMAGE, "JPEG", subsampling=0),
    "rgb jpeg": encode(IMAGE, "JPEG", keep_rgb=True),
    "restarts": cv2.imencode(".jpg", IMAGE, [cv2.IMWRITE_JPEG_RST_INTERVAL, 4])[1].tobytes(),
    "exif of a thumbnail": encode(IMAGE, "JPEG", exif=exif(1) + encode(GREY[:16, :16], "JPEG")),
    "broken exif": encode(IMAGE, "JPEG", exif=b"Exif\0\0no tags"),
    "unknown orientation": encode(IMAGE, "JPEG", exif=exif(9)),
    "jpeg with xmp": encode(IMAGE, "JPEG", xmp=XMP_TURNED.encode()),
}
BY_OPENCV = {
    **JPEGS,
    "png": PNG,
    "grey png": encode(GREY, "PNG"),
    "text": encode(IMAGE, "PNG", pnginfo=note("Software", "some")),
    "gamma": with_chunk(PNG, b"gAMA", struct.pack(">I", 45455)),
    "significant bits": with_chunk(PNG, b"sBIT", bytes((5, 6, 5))),
    "background": with_chunk(PNG, b"bKGD", struct.pack(">3H", 1, 2, 3)),
}
BY_PILLOW = {
    "palette": encode(Image.fromarray(IMAGE).quantize(16), "PNG"),
    "alpha": encode(photograph(channels=4), "PNG"),
    "grey and alpha": encode(Image.fromarray(IMAGE).convert("LA"), "PNG"),
    "one bit": encode(Image.fromarray(IMAGE).convert("1"), "PNG"),
    "16 bits colour": cv2.imencode(".png", IMAGE.astype(np.uint16) * 250)[1].tobytes(),
    "transparent colour": with_chunk(PNG, b"tRNS", struct.pack(">3H", *IMAGE[0, 0].tolist())),
    "png with exif": encode(IMAGE, "PNG", exif=exif(6)),
    "png with a raw profile": encode(
        IMAGE, "PNG", pnginfo=note("Raw profile type exif", "\nexif\n26\n" + exif(6).hex())
    ),
    "png with xmp": encode(IMAGE, "PNG", pnginfo=note("XML:com.adobe.xmp", XMP_TURNED)),
    "animated png": encode(IMAGE, "PNG", save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]),
    "cmyk": encode(Image.fromarray(IMAGE).convert("CMYK"), "JPEG"),
    "trailing bytes": JPEGS["jpeg"] + b"more",
    "several pictures": encode(IMAGE, "MPO", save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]),
    "gif": encode(IMAGE, "GIF", save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]),
    "bmp": encode(IMAGE, "BMP"),
    "tiff": encode(IMAGE, "TIFF"),
    "webp": encode(IMAGE, "WEBP"),
}


@pytest.fixture
def opened_by_pillow(monkeypatch) -> list[str]:
    """The files that OpenCV left to Pillow."""
    files: list[str] = []

    def spy(file_name, image_format, *, max_pixels):
        files.append(file_name)
        return read_with_pillow(file_name, image_format)

    monkeypatch.setattr(pixels, "read_with_pillow", spy)
    return files


@pytest.mark.parametrize("image_format", ["BGR", "RGB"])
@pytest.mark.parametrize("kind", [*BY_OPENCV, *BY_PILLOW])
def test_read_pixels_is_detectron2s(tmp_path, opened_by_pillow, kind, image_format):
    path = tmp_path / "ein Bild – 図.img"
    path.write_bytes({**BY_OPENCV, **BY_PILLOW}[kind])
    expected = read_image(str(path), image_format)
    found = read_pixels(str(path), image_format)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_with_pillow(str(path), image_format), expected)
    assert bool(opened_by_pillow) == (kind in BY_PILLOW)


@pytest.mark.parametrize("image_format", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P", "LA", "1"])
def test_every_format_reads_every_kind_of_file_and_array(tmp_path, image_format, mode):
    colours = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = str(tmp_path / "image.tif")
    Image.fromarray(colours).convert(mode).save(path)
    pixels = read_with_pillow(path, image_format)
    assert pixels.shape == (20, 30, FORMATS[image_format])
    assert pixels.dtype == (np.float32 if image_format == "YUV-BT.601" else np.uint8)
    if mode in ("RGB", "L") and (mode, image_format) != ("L", "HSV"):
        np.testing.assert_allclose(pixels, read_image(path, image_format), rtol=1e-6)
    if mode in ("RGB", "L"):
        grey = np.asarray(Image.fromarray(colours).convert("L"))
        as_opencv = colours[:, :, ::-1] if mode == "RGB" else grey
        np.testing.assert_array_equal(from_array(as_opencv, image_format), pixels)
    rgb = read_with_pillow(path, "RGB")
    if image_format != "L":
        most = {"HSV": 10, "YCbCr": 3}.get(image_format, 0)
        assert np.abs(to_rgb(pixels, image_format).astype(int) - rgb).max() <= most
    else:
        np.testing.assert_array_equal(to_rgb(pixels, "L"), np.repeat(pixels, 3, axis=2))


READERS = pytest.mark.parametrize("read", [read_pixels, read_with_pillow])
# The high byte is 0 to 11, the low byte 7.
DEEP = np.arange(12, dtype=np.uint16).reshape(3, 4) * 256 + 7


@READERS
@pytest.mark.parametrize(
    "kind, deep",
    [("PNG", DEEP), ("TIFF", DEEP), ("TIFF", DEEP.astype(">u2")), ("TIFF", DEEP.astype(np.int32))],
    ids=["png", "tiff", "big-endian tiff", "32 bits"],
)
def test_16_bits_lose_their_low_byte(tmp_path, kind, deep, read):
    path = tmp_path / "deep"
    path.write_bytes(encode(deep, kind))
    found = read(str(path), "BGR")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.arange(12).reshape(3, 4, 1).repeat(3, 2))
    if deep.dtype == np.uint16:
        np.testing.assert_array_equal(found, cv2.imread(str(path)))


@READERS
@pytest.mark.parametrize(
    "values, message",
    [
        (np.float32([[0, 1]]), r"floating-point numbers \(mode F\)"),
        (np.int32([[0, 65536]]), "0 to 65536; 8 or 16 bits are read"),
        (np.int32([[-1, 65535]]), "-1 to 65535"),
    ],
)
def test_values_of_other_ranges_are_refused(tmp_path, values, message, read):
    path = tmp_path / "measured.tif"
    path.write_bytes(encode(values, "TIFF"))
    with pytest.raises(OSError, match=message):
        read(str(path), "BGR")


def palette() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    return image


def pair(*pixels: tuple[int, ...]) -> np.ndarray:
    return np.array([pixels], np.uint8)


@READERS
@pytest.mark.parametrize(
    "data, expected",
    [
        (encode(palette(), "PNG"), pair((10, 20, 30), (200, 100, 50))),
        # What lies under alpha is what was stored.
        (encode(pair((10, 20, 30, 255), (200, 100, 50, 0)), "PNG"), pair((10, 20, 30), (200, 100, 50))),
        (encode(np.array([[7, 250]], np.uint8), "PNG"), pair((7, 7, 7), (250, 250, 250))),
        # No ink is white; full cyan takes all red; half black halves the rest.
        (
            encode(Image.fromarray(pair((0, 0, 0, 0), (255, 0, 0, 128)), "CMYK"), "TIFF"),
            pair((255, 255, 255), (0, 127, 127)),
        ),
        (
            encode(palette(), "GIF", save_all=True, append_images=[Image.new("P", (2, 1), 1)]),
            pair((10, 20, 30), (200, 100, 50)),
        ),
    ],
    ids=["palette", "alpha", "grey", "cmyk", "first of an animation"],
)
def test_hand_made_pixels_are_read_as_they_are(tmp_path, data, expected, read):
    path = tmp_path / "pair"
    path.write_bytes(data)
    np.testing.assert_array_equal(read(str(path), "RGB"), expected)
    np.testing.assert_array_equal(read(str(path), "BGR"), expected[:, :, ::-1])


# What a camera that was held so wrote: each orientation of EXIF, undone.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
    8: lambda x: np.rot90(x),
}


@READERS
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "16 bits PNG", "16 bits TIFF"])
def test_lossless_pictures_are_turned_once(tmp_path, kind, orientation, read):
    path = tmp_path / "turned"
    deep = "16 bits" in kind
    path.write_bytes(encode(DEEP if deep else IMAGE, kind.split()[-1], exif=exif(orientation)))
    picture = (DEEP >> 8).astype(np.uint8)[:, :, None].repeat(3, 2) if deep else IMAGE
    np.testing.assert_array_equal(read(str(path), "RGB"), UPRIGHT[orientation](picture))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_read_pixels_turns_as_exif_says(tmp_path, kind, orientation):
    path = tmp_path / "turned"
    path.write_bytes(encode(IMAGE, kind, exif=exif(orientation)))
    found = read_pixels(str(path), "BGR")
    assert found.shape == ((90, 120, 3) if orientation < 5 else (120, 90, 3))
    np.testing.assert_array_equal(found, read_image(str(path), "BGR"))


def outcome(read, path: str) -> np.ndarray | str:
    try:
        return read(path, "BGR")
    except UNREADABLE as error:
        return f"{type(error).__name__}: {error}".partition(" at 0x")[0]


@pytest.mark.parametrize("damage", ["cut", "changed", "zeros"])
@pytest.mark.parametrize("kind", [*JPEGS, "png", "grey png"])
def test_broken_files_are_read_or_refused_alike(tmp_path, kind, damage):
    """Corrupt data: the same pixels or the same error from either reader."""
    rng = np.random.default_rng(0)
    whole, path = BY_OPENCV[kind], tmp_path / "broken"
    refused = 0
    for i in range(60):
        data = bytearray(whole)
        at = int(rng.integers(0, len(data)))
        if damage == "cut":
            del data[len(data) - i - 1 if i < 20 else at :]
        elif damage == "changed":
            data[at] ^= int(rng.integers(1, 256))
        else:
            data[at : at + 40] = bytes(len(data[at : at + 40]))
        path.write_bytes(data)
        expected, found = outcome(read_with_pillow, str(path)), outcome(read_pixels, str(path))
        if isinstance(expected, str):
            refused += 1
            assert found == expected
        else:
            np.testing.assert_array_equal(found, expected)
    # What is not cut may decode.
    assert refused > 30 or damage != "cut"


def test_png_with_broken_data_is_refused(tmp_path):
    # detectron2 trains on what could be decoded, the rest black.
    data, path = bytearray(PNG), tmp_path / "broken.png"
    data[len(data) // 2 : len(data) // 2 + 40] = bytes(40)
    path.write_bytes(data)
    assert read_image(str(path), "BGR").shape == IMAGE.shape
    for read in (read_pixels, read_with_pillow):
        with pytest.raises(OSError, match="broken|unrecognized|truncated"):
            read(str(path), "BGR")


@pytest.mark.parametrize("marker", [0x5C, 0xC4, 0xD8, 0xDA])
def test_marker_within_a_scan_is_refused(tmp_path, marker):
    # OpenCV makes the rest of such a picture grey.
    data, path = bytearray(JPEGS["jpeg"]), tmp_path / "broken.jpg"
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    data[middle : middle + 2] = bytes((0xFF, marker))
    path.write_bytes(data)
    with pytest.raises(OSError, match="broken data stream"):
        read_pixels(str(path), "BGR")


@pytest.mark.parametrize(
    "size, most, mean",
    [
        ((90, 120), 0, 0),
        ((180, 240), 1, 0.35),
        ((131, 175), 1, 0.35),
        ((72, 96), 2, 0.1),
        ((33, 44), 2, 0.1),
    ],
)
def test_resize_is_within_two_grey_levels_of_pillows(size, most, mean):
    image = photograph()
    expected = T.ResizeTransform(90, 120, *size).apply_image(image)
    found = resize(image, *size)
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= most
    assert difference.mean() <= mean


def test_resize_smooths_where_one_side_shrinks():
    image = photograph()
    expected = T.ResizeTransform(90, 120, 91, 60).apply_image(image)
    assert np.abs(resize(image, 91, 60).astype(int) - expected).max() <= 2


def test_to_planes_copies():
    image = photograph()
    planes = to_planes(image)
    assert planes.is_contiguous()
    np.testing.assert_array_equal(planes.numpy(), image.transpose(2, 0, 1))
    image[:] = 0
    assert planes.max() > 0


@pytest.mark.parametrize(
    "transform",
    [
        T.HFlipTransform(120),
        T.VFlipTransform(90),
        T.NoOpTransform(),
        T.CropTransform(10, 20, 50, 40),
        T.RotationTransform(90, 120, 90),
        T.BlendTransform(0, 0, 1.2),
    ],
    ids=lambda x: type(x).__name__,
)
def test_opencv_input_transforms_as_detectron2s(transform):
    image = photograph()[:, :, ::-1]
    image.flags.writeable = False
    found, expected = OpenCVInput(image), T.AugInput(image)
    for inputs in (found, expected):
        inputs.transform(transform)
    np.testing.assert_array_equal(found.image, expected.image)


def test_opencv_input_resizes_what_was_cropped():
    image = photograph()
    found, expected = OpenCVInput(image), T.AugInput(image)
    for inputs in (found, expected):
        for transform in (T.CropTransform(10, 20, 50, 40), T.ResizeTransform(40, 50, 32, 40)):
            inputs.transform(transform)
    assert np.abs(found.image.astype(int) - expected.image).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size_is_that_of_the_pixels(orientation, tmp_path):
    exif = Image.Exif()
    exif[274] = orientation
    path = str(tmp_path / "a.jpg")
    Image.new("RGB", (20, 10)).save(path, exif=exif)
    assert upright_size(path) == read_pixels(path, "BGR").shape[:2]


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_refused_whatever_the_name_says(tmp_path, programs, kind, ending):
    path = str(tmp_path / f"a.{ending}")
    Path(path).write_bytes(FOREIGN[kind])
    for read in (
        lambda: read_pixels(path, "BGR"),
        lambda: read_with_pillow(path, "BGR"),
        lambda: upright_size(path),
        lambda: check_for_detectron2(path, max_pixels=10**8),
    ):
        with pytest.raises(UNREADABLE, match="not an image of a format that is read \\(BMP, GIF, JPEG, PNG"):
            read()
    assert not programs.exists()


def test_every_ending_is_of_a_format_that_is_read(tmp_path):
    for ending in IMAGE_SUFFIXES:
        path = str(tmp_path / f"a{ending}")
        Image.fromarray(GREY if ending == ".pgm" else IMAGE).save(path)
        assert open_image(path, max_pixels=None).format in FILE_FORMATS
        assert read_pixels(path, "BGR").shape == IMAGE.shape
    assert {Image.registered_extensions()[ending] for ending in IMAGE_SUFFIXES} == {*FILE_FORMATS}


def test_jpeg_with_the_mark_of_avif_is_no_work_for_opencv(tmp_path, opened_by_pillow):
    # OpenCV 5 takes it for AVIF: a segment of 0x6674 bytes, the first of which are "yp".
    jpeg, path = JPEGS["jpeg"], tmp_path / "a.jpg"
    path.write_bytes(jpeg[:2] + b"\xff\xe0ftypavif\0\0\0\0avifmif1".ljust(0x6674 + 2, b"\0") + jpeg[2:])
    found = read_pixels(str(path), "BGR")
    assert opened_by_pillow == [str(path)]
    np.testing.assert_array_equal(found, cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR))


def test_file_of_two_formats_is_not_left_to_detectron2(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    path.write_bytes(BY_PILLOW["tiff"])
    check_for_detectron2(str(path), max_pixels=10**8)
    Image.init()
    # A plugin that takes everything, as those of formats without a mark may.
    monkeypatch.setitem(Image.OPEN, "ANY", (lambda *_: Image.new("RGB", (1, 1)), None))
    monkeypatch.setattr(Image, "ID", ["ANY", *Image.ID])
    with pytest.raises(OSError, match="it is both TIFF and None"):
        check_for_detectron2(str(path), max_pixels=10**8)
    assert read_with_pillow(str(path), "BGR").shape == IMAGE.shape


def tiff_of_tiles(size: int, tile: int) -> bytes:
    tags = [(256, size), (257, size), (258, 8), (259, 5), (262, 1), (277, 1), (322, tile), (323, tile)]
    tags += [(324, 10 + 12 * 10 + 4), (325, 16)]
    entries = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + bytes(16)


def empty_png(size: int) -> bytes:
    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + size // 8)) for _ in range(size)) + packer.flush()
    header = struct.pack(">2I5B", size, size, 1, 0, 0, 0, 0)
    end = [with_chunk(PNG[:33], *chunk)[33:] for chunk in ((b"IDAT", rows), (b"IEND", b""))]
    return with_chunk(PNG[:8].ljust(33), b"IHDR", header)[33:].join([PNG[:8], b"".join(end)])


def gif(canvas: int, frame: int) -> bytes:
    size = struct.pack("<2H", canvas, canvas)
    at = struct.pack("<4H", 0, 0, frame, frame)
    return b"GIF89a" + size + b"\x80\0\0" + bytes(6) + b"," + at + b"\0\x02\x02\x44\x01\0;"


def jpeg_of(size: int) -> bytes:
    data = bytearray(JPEGS["jpeg"])
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">2H", size, size)
    return bytes(data)


def webp_of(size: int) -> bytes:
    data = bytearray(encode(IMAGE, "WEBP", save_all=True, append_images=[Image.fromarray(IMAGE[::-1])]))
    start = data.index(b"VP8X") + 12
    data[start : start + 6] = (size - 1).to_bytes(3, "little") * 2
    return bytes(data)


def scans(size: int, number: int) -> bytes:
    """Make a progressive JPEG of `number` scans, each of the whole picture and of some 100 bytes."""
    blocks = ((size + 7) // 8) ** 2
    data = b"\xff\xd8\xff\xdb" + struct.pack(">HB", 67, 0) + b"\1" * 64
    data += b"\xff\xc2" + struct.pack(">HB2HB3B", 11, 8, size, size, 1, 1, 0x11, 0)
    # A table with the runs of 2^14 and more blocks without a coefficient, and one with a difference of 0.
    data += b"\xff\xc4" + struct.pack(">HB", 20, 0x00) + bytes([1] + [0] * 15) + b"\0"
    data += b"\xff\xc4" + struct.pack(">HB", 20, 0x10) + bytes([1] + [0] * 15) + b"\xe0"
    dc = bytes(blocks // 8 + 1)
    data += b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0x00, 0, 0, 0) + dc
    bits = ""
    left = blocks
    while left > 0:
        run = min(left, 2**15 - 1)
        if run < 2**14:  # the table has this run alone
            run = 2**14
        bits += "0" + format(run - 2**14, "014b")
        left -= run
    bits += "1" * (-len(bits) % 8)
    run_bytes = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    scan = b"\xff\xda" + struct.pack(">HB2B3B", 8, 1, 1, 0x00, 1, 63, 0) + run_bytes
    return data + scan * number + b"\xff\xd9"


LARGE = {
    "png of 13,000 x 13,000 in 20 kB": (empty_png(13000), "it has 13000 × 13000 pixels"),
    "jpeg": (jpeg_of(65500), "its pixels are"),
    "tiles of a tiff": (tiff_of_tiles(16, 2**15), "its tiles have 32768 × 32768 pixels"),
    "canvas of a gif": (gif(60000, 1), "its pixels are"),
    "frame of a gif": (gif(1, 12000), "it has 12000 × 12000 pixels"),
    "canvas of a webp": (webp_of(16383), "its pixels are"),
    "ppm": (b"P6 12000 12000 255\n", "it has 12000 × 12000 pixels"),
    "bmp": (
        b"BM" + struct.pack("<IHHI3i2H6I", 100, 0, 0, 54, 40, 12000, 12000, 1, 24, *[0] * 6),
        "it has 12000 × 12000 pixels",
    ),
}


@READERS
@pytest.mark.parametrize("kind", LARGE)
def test_images_above_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch, kind, read):
    data, message = LARGE[kind]
    path = tmp_path / "large"
    path.write_bytes(data)
    assert len(data) < 30_000
    for decode in ("PIL.ImageFile.ImageFile.load", "cv2.imdecode"):
        monkeypatch.setattr(decode, lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(OSError, match=f"{message}, more|{message} more than INPUT.FOCAL.MAX_PIXELS"):
        read(str(path), "BGR")


def test_limit_above_pillows_own_is_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = tmp_path / "image.png"
    path.write_bytes(PNG)
    with pytest.raises(OSError, match="more than INPUT.FOCAL.MAX_PIXELS"):
        upright_size(str(path))
    assert pixels.read_with_pillow(str(path), "BGR", max_pixels=90 * 120).shape == IMAGE.shape
    assert Image.MAX_IMAGE_PIXELS == 90 * 120
    allow_pixels(5)
    assert Image.MAX_IMAGE_PIXELS == 90 * 120  # the user's own stays


def test_size_of_a_png_is_told_without_decoding(tmp_path, monkeypatch):
    turned = exif(6)[6:]
    path = tmp_path / "image.png"
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it is decoded"))
    for data in (
        with_chunk(PNG, b"eXIf", turned),
        PNG[:-12] + with_chunk(PNG[:33], b"eXIf", turned)[33:] + PNG[-12:],  # after the pixels
        BY_PILLOW["png with a raw profile"],
        BY_PILLOW["png with xmp"],
    ):
        path.write_bytes(data)
        assert upright_size(str(path)) == (120, 90)
    path.write_bytes(BY_PILLOW["animated png"])
    assert upright_size(str(path)) == (90, 120)


@READERS
def test_jpeg_of_many_scans_is_refused_before_it_is_decoded(tmp_path, monkeypatch, read):
    path = tmp_path / "image.jpg"
    path.write_bytes(scans(64, 150))
    assert read(str(path), "BGR").shape == (64, 64, 3)
    path.write_bytes(scans(64, 201))
    for decode in ("PIL.ImageFile.ImageFile.load", "cv2.imdecode"):
        monkeypatch.setattr(decode, lambda *_: pytest.fail("it is decoded"))
    with pytest.raises(OSError, match="a JPEG of more than 200 scans: save it again"):
        read(str(path), "BGR")


def test_encoders_write_few_scans(tmp_path):
    Image.fromarray(photograph(900, 1200)).save(tmp_path / "a.jpg", progressive=True)
    assert (tmp_path / "a.jpg").read_bytes().count(b"\xff\xda") < 20


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SPECIAL)
def test_only_regular_files_are_read_as_images(tmp_path, kind):
    path = str(tmp_path / "a.png")
    says = put(path, kind)
    check = functools.partial(check_for_detectron2, max_pixels=10**6)
    pillow = functools.partial(read_with_pillow, image_format="BGR")
    opencv = functools.partial(read_pixels, image_format="BGR")
    for read in (pillow, opencv, upright_size, check):
        with pytest.raises(OSError, match=says) as error:
            read(path)
        assert says in why_unreadable(path, error.value)


def test_files_longer_than_their_pixels_are_refused(tmp_path):
    """A chunk of a PNG file may say that it has two gigabytes, which Pillow reads to go past it."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG[:33] + struct.pack(">I", 2**31 - 1) + b"zzZz")
    os.truncate(path, 2**31 + 100)
    for read in (
        upright_size,
        lambda name: read_with_pillow(name, "BGR"),
        lambda name: read_pixels(name, "BGR"),
    ):
        with pytest.raises(OSError, match="it has 2147483748 bytes, more than"):
            read(str(path))
