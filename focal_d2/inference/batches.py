"""Detections in many files, batch by batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from focal_d2.errors import UserError, user_message
from focal_d2.inference.feed import ahead
from focal_d2.inference.predictor import Predictor, Prepared
from focal_d2.inference.results import Detections
from focal_d2.inference.video import Frame, Video


class Outcome(NamedTuple):
    """What came of a file: its detections, or why there are none."""

    file: str
    result: Detections | UserError
    frame: Frame | None = None


def detect_in_files(
    predictor: Predictor, files: Sequence[str], part: range, done: int
) -> Iterator[list[Outcome]]:
    """Detect in the images of a list, a batch of it at a time.

    Where a batch begins depends on the list alone, and a batch that was done in part is computed whole:
    what follows has the same bits as without a stop.

    Args:
        predictor: of the model.
        files: all files; none is a video.
        part: which of them; it begins with a batch.
        done: how many of them are done.

    Yields:
        For each batch what came of those of its files that were not done.
    """
    if done >= len(part):
        return
    size = predictor.batch_size
    begin = part.start + done // size * size
    skip = part.start + done - begin

    def prepare(file: str) -> Prepared | UserError:
        try:
            return predictor.prepare(file)
        except UserError as error:
            return error

    prepared = ahead(prepare, itertools.islice(files, begin, part.stop), number=2 * size)
    for start in range(begin, part.stop, size):
        batch = list(itertools.islice(prepared, min(size, part.stop - start)))
        results = iter(_detect(predictor, [x for x in batch if isinstance(x, Prepared)]))
        outcomes = [
            Outcome(file, x if isinstance(x, UserError) else next(results))
            for file, x in zip(files[start : start + size], batch, strict=False)
        ]
        if skip < len(outcomes):
            yield outcomes[skip:]
        skip = 0


def detect_in_video(predictor: Predictor, video: Video) -> Iterator[list[Outcome]]:
    """Detect in the frames of a video, a batch at a time. The last outcome may be why it ended early."""
    for frames, problem in _frame_batches(video, predictor.batch_size):
        results = _detect(predictor, [predictor.prepare(x.pixels) for x in frames])
        yield [Outcome(video.path, result, x) for result, x in zip(results, frames, strict=True)]
        if problem is not None:
            yield [Outcome(video.path, problem)]


def _frame_batches(video: Video, size: int) -> Iterator[tuple[list[Frame], UserError | None]]:
    """Yield the frames of a video in batches, and with the last of them why the video ended early."""
    batch: list[Frame] = []
    try:
        for frame in video.frames():
            batch.append(frame)
            if len(batch) == size:
                yield batch, None
                batch = []
    except UserError as error:
        yield batch, error
        return
    yield batch, None


def _detect(predictor: Predictor, images: list[Prepared]) -> list[Detections | UserError]:
    """Detect in a batch; in one image at a time where memory is too small.

    Pictures in tiles are read while the model works, each by itself, and may turn out to be damaged.
    """
    if predictor.window and len(images) > 1:
        return [result for image in images for result in _detect(predictor, [image])]
    try:
        return [*predictor.detect(images)]
    except UserError as error:
        if not predictor.window:
            raise
        return [error]
    except RuntimeError as error:
        message = "out of memory" if isinstance(error, torch.OutOfMemoryError) else user_message(error)
        if message is None:
            raise
    if len(images) > 1:
        return [result for image in images for result in _detect(predictor, [image])]
    image = images[0]
    where = "" if isinstance(image.source, np.ndarray) else f"{image.source}: "
    size = f"; the image has {image.width} × {image.height} pixels" if image.width else ""
    return [UserError(f"{where}{message}{size}")]
