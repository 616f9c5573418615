"""Check that image files exist, can be read, and have the annotated size."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from focal_d2.annotations import Table
from focal_d2.data.checks.examples import MOST_EXAMPLES
from focal_d2.data.checks.findings import Example, Finding, share
from focal_d2.data.image_files import UNREADABLE, why_unreadable

# Files that are read before the progress bar moves.
_CHUNK = 64


class Decoded(NamedTuple):
    """The size and content hash of an image file, or the reason why it cannot be read."""

    size: tuple[int, int] | None  # height and width as training reads it; None: it cannot be read
    digest: bytes  # of size and pixels
    error: str = ""
    missing: bool = False


def decode(file_name: str, read: Callable[[str], np.ndarray]) -> Decoded:
    """Read an image.

    Args:
        file_name: of the image.
        read: file name -> pixels (H, W, C), as training reads it.
    """
    try:
        pixels = read(file_name)
    except FileNotFoundError:
        return Decoded(None, b"", missing=True)
    except UNREADABLE as error:
        if isinstance(error, UnidentifiedImageError) and not os.path.getsize(file_name):
            return Decoded(None, b"", "empty file")
        return Decoded(None, b"", why_unreadable(file_name, error))
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, key=str(pixels.shape).encode())
    return Decoded((pixels.shape[0], pixels.shape[1]), digest.digest())


def decode_all(file_names: Sequence[str], read: Callable[[str], np.ndarray]) -> dict[str, Decoded]:
    """Read images in threads: decoders release Python's lock. Show progress if stderr is a terminal.

    Args:
        file_names: of the images.
        read: see `decode`.
    """
    unique = list(dict.fromkeys(file_names))
    decoded: dict[str, Decoded] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(unique), desc="images", unit="image", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(unique), _CHUNK):
            chunk = unique[start : start + _CHUNK]
            decoded.update(zip(chunk, threads.map(lambda name: decode(name, read), chunk), strict=True))
            bar.update(len(chunk))
    return decoded


def check_images(name: str, table: Table, decoded: Mapping[str, Decoded]) -> list[Finding]:
    """Check one dataset's images against its annotations.

    Args:
        name: the dataset's.
        table: its annotations.
        decoded: each of its files, by file name; see `decode_all`.
    """
    examples: dict[str, list[Example]] = defaultdict(list)
    for file_name, (height, width) in zip(table.file_names, table.sizes.tolist(), strict=True):
        image = decoded[file_name]
        if image.missing:
            examples["image-missing"].append(Example(file_name))
        elif image.size is None:
            examples["image-unreadable"].append(Example(file_name, image.error))
        elif image.size != (height, width):
            text = f"annotated as {width} × {height}, is {image.size[1]} × {image.size[0]}"
            if image.size == (width, height):
                text += ": height and width swapped, or annotated before it was turned (EXIF)"
            examples["image-size"].append(Example(file_name, text))
    messages = {
        "image-missing": "image files do not exist",
        "image-unreadable": "images cannot be read",
        "image-size": "images have another size than annotated",
    }
    return [
        Finding(
            code,
            f"{share(len(examples[code]), len(table))} {text}",
            name,
            len(examples[code]),
            examples[code][:MOST_EXAMPLES],
        )
        for code, text in messages.items()
        if code in examples
    ]
