"""Files of formats that are not read; for some, image libraries start programs."""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, features


def _encode(mode: str, kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


PS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
SUN = bytes.fromhex("59a66a95") + struct.pack(">7I", 2, 2, 24, 12, 1, 0, 0) + bytes(12)
# Metafiles, and what Pillow 12 cannot write; the others come from Pillow itself.
FOREIGN = {
    "EPS": PS,
    "EPS with a binary header": b"\xc5\xd0\xd3\xc6" + struct.pack("<2I", 32, len(PS)) + bytes(20) + PS,
    "EMF": struct.pack("<2I2i2I4i", 1, 108, 0, 0, 64, 64, 0, 0, 1000, 1000) + b" EMF" + bytes(100),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(4) + struct.pack("<3H", 64, 64, 96) + bytes(6) + b"\1\0\x09\0",
    "XPM": b'/* XPM */\nstatic char *a[] = {\n"1 1 1 1",\n"a c #000000",\n"a"};\n',
    "Radiance": b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2 +X 2\n" + bytes(16),
    "Sun raster": SUN,
    **{
        kind: _encode(mode, kind)
        for kind, mode in {
            **dict.fromkeys(
                ["DIB", "PCX", "DDS", "JPEG2000", "ICNS", "ICO", "IM", "PDF", "SGI", "TGA"], "RGB"
            ),
            **{"BLP": "P", "MSP": "1", "XBM": "1", "SPIDER": "F", "QOI": "RGB", "PALM": "1"},
        }.items()
    },
}
if features.check("avif"):
    FOREIGN["AVIF"] = _encode("RGB", "AVIF")
