"""Checks of image files: there, whole, of the annotated size, and met once."""

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

from focal_d2.analysis.doctor.annotations import MOST_EXAMPLES
from focal_d2.analysis.doctor.findings import Example, Finding, share
from focal_d2.data.pixels import UNREADABLE
from focal_d2.data.table import Table

# Files that are read before the progress bar moves.
_CHUNK = 64


class Decoded(NamedTuple):
    """What is known of an image file; its pixels are not kept."""

    size: tuple[int, int] | None  # height and width as training sees it; None: it cannot be read
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
    except UnidentifiedImageError:
        return Decoded(None, b"", "not an image" if os.path.getsize(file_name) else "empty file")
    except UNREADABLE as error:
        return Decoded(None, b"", " ".join(str(error).split()) or type(error).__name__)
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, key=str(pixels.shape).encode())
    return Decoded((pixels.shape[0], pixels.shape[1]), digest.digest())


def decode_all(file_names: Sequence[str], read: Callable[[str], np.ndarray]) -> dict[str, Decoded]:
    """Read images in threads: decoders leave Python's lock. Progress is shown where stderr is a terminal.

    Args:
        file_names: of the images.
        read: see `decode`.
    """
    unique = list(dict.fromkeys(file_names))
    known: dict[str, Decoded] = {}
    with (
        ThreadPoolExecutor(os.cpu_count()) as threads,
        tqdm(total=len(unique), desc="images", unit="image", leave=False, disable=None) as bar,
    ):
        for start in range(0, len(unique), _CHUNK):
            chunk = unique[start : start + _CHUNK]
            known.update(zip(chunk, threads.map(lambda name: decode(name, read), chunk), strict=True))
            bar.update(len(chunk))
    return known


def check_images(name: str, table: Table, known: Mapping[str, Decoded]) -> list[Finding]:
    """Check one dataset's images against its annotations.

    Args:
        name: the dataset's.
        table: its annotations.
        known: of each of its files; see `decode_all`.
    """
    found: dict[str, list[Example]] = defaultdict(list)
    for file_name, (height, width) in zip(table.file_names, table.sizes.tolist(), strict=True):
        image = known[file_name]
        if image.missing:
            found["image-missing"].append(Example(file_name))
        elif image.size is None:
            found["image-unreadable"].append(Example(file_name, image.error))
        elif image.size != (height, width):
            text = f"annotated as {width} × {height}, is {image.size[1]} × {image.size[0]}"
            if image.size == (width, height):
                text += ": height and width swapped, or annotated before it was turned (EXIF)"
            found["image-size"].append(Example(file_name, text))
    what = {
        "image-missing": "image files are not there",
        "image-unreadable": "images cannot be read",
        "image-size": "images have another size than annotated",
    }
    return [
        Finding(
            code,
            f"{share(len(found[code]), len(table))} {text}",
            name,
            len(found[code]),
            found[code][:MOST_EXAMPLES],
        )
        for code, text in what.items()
        if code in found
    ]


def check_sides(train: Mapping[str, Table], test: Mapping[str, Table]) -> list[Finding]:
    """Find datasets that are trained and tested on.

    Args:
        train: the datasets to train on, by name.
        test: those to test on.
    """
    both = [name for name in train if name in test]
    message = "to train on and to test on: AP says how well it is learnt by heart"
    return [Finding("dataset-in-both", message, name, len(train[name])) for name in both]


def check_repeats(
    train: Mapping[str, Table], test: Mapping[str, Table], known: Mapping[str, Decoded]
) -> list[Finding]:
    """Find images met again: within a side as other files, or on both sides.

    Args:
        train: the datasets to train on, by name.
        test: those to test on; the ones that are in `train` too are not looked at again.
        known: of each file, see `decode_all`; without it, paths are compared and no pixels.
    """
    test = {name: table for name, table in test.items() if name not in train}
    found = []
    # Datasets to test on are measured one by one, so an image may be in two of them.
    for unit in (train, *({name: table} for name, table in test.items())):
        again = [files for files in _by_content(unit, known).values() if len(files) > 1]
        if again:
            involved = dict.fromkeys(name for files in again for name, _ in files)
            examples = [Example(own, f"same as {files[0][1]}") for files in again for _, own in files[1:]]
            among = sum(len(dict.fromkeys(table.file_names)) for table in unit.values())
            message = (
                f"{share(len(examples), among)} images are there again, as another file or of another dataset"
            )
            found.append(
                Finding(
                    "image-duplicate", message, ", ".join(involved), len(examples), examples[:MOST_EXAMPLES]
                )
            )
    to_train = _by_content(train, known)
    for name, table in test.items():
        examples = []
        for key, files in _by_content({name: table}, known).items():
            if key in to_train:
                of, path = to_train[key][0]
                for _, own in files:
                    same = "the same file is in" if own == path else f"same as {path} of"
                    examples.append(Example(own, f"{same} {of}"))
        if examples:
            message = f"{share(len(examples), len(table))} images to test on are also to train on"
            found.append(Finding("image-leak", message, name, len(examples), examples[:MOST_EXAMPLES]))
    return found


def _by_content(
    tables: Mapping[str, Table], known: Mapping[str, Decoded]
) -> dict[bytes | str, list[tuple[str, str]]]:
    """Group (dataset, path) by what the file holds; a file that was not read, by its path."""
    files: dict[bytes | str, list[tuple[str, str]]] = defaultdict(list)
    for name, table in tables.items():
        for path in dict.fromkeys(table.file_names):
            decoded = known.get(path)
            files[decoded.digest if decoded and decoded.size else os.path.abspath(path)].append((name, path))
    return files
