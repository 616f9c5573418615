"""A prediction run: many files, records and pictures as they come, other formats at the end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from focal_d2.data.pictures import write_picture
from focal_d2.errors import UserError, reason
from focal_d2.inference.batches import Outcome, detect_in_files, detect_in_video
from focal_d2.inference.draw import draw_detections, draw_truth
from focal_d2.inference.formats import write_formats
from focal_d2.inference.inputs import Inputs, check_not_overwritten
from focal_d2.inference.predictor import Predictor
from focal_d2.inference.records import Records, Settings, record_of, weights_digest
from focal_d2.inference.results import Detections
from focal_d2.inference.sources import in_colours
from focal_d2.inference.video import Video, VideoWriter, is_video
from focal_d2.model_card import card_of

PICTURES = "pictures"  # the format, and the folder


@dataclass
class PredictionRun:
    """What a run reads and writes.

    Attributes:
        predictor: of the model; it may return one detection more than `limit`, to show that there are more.
        inputs: the files.
        output: the folder; None: nothing is written.
        formats: names of `FORMATS`, and `PICTURES`.
        shard: this one and the number of all, from 1.
        resume: continue a run that was stopped.
        limit: most detections of an image; 0: any number.
        truth: boxes (M, 4) of each file, which are drawn beside the detections.
        on_record: called with the line of each record.
        on_problem: called with a line for each file that can't be read.
        cut: number of images of which `limit` cut detections off, and the first of them.
        failed: number of files that can't be read.
    """

    predictor: Predictor
    inputs: Inputs
    output: Path | None
    formats: tuple[str, ...] = ()
    shard: tuple[int, int] = (1, 1)
    resume: bool = False
    limit: int = 0
    truth: dict[str, np.ndarray] | None = None
    on_record: Callable[[str], object] = lambda line: None
    on_problem: Callable[[str], object] = lambda line: None
    cut: tuple[int, str] = (0, "")
    failed: int = 0
    _writers: dict[str, VideoWriter] = field(default_factory=dict)

    def __call__(self) -> int:
        """Predict on all files, and write.

        Returns:
            The number of files of this run, or of its shard.

        Raises:
            UserError: for anything the user can correct.
        """
        videos = [file for file in self.inputs.files if is_video(file)]
        if videos and (self.resume or self.shard != (1, 1)):
            raise UserError(f"{videos[0]} is a video; --resume and --shard are for images")
        settings = self.settings()
        if self.output is None:
            self._predict(settings, None, 0)
            return len(settings.part)
        check_not_overwritten(self.inputs, self.output)
        records = Records(self.output, settings, resume=self.resume)
        self.failed = records.failed
        try:
            self._predict(settings, records, records.done)
        finally:
            records.close()
        if self.shard == (1, 1):
            write_formats(self.output, settings, tuple(x for x in self.formats if x != PICTURES))
        return len(settings.part)

    def settings(self) -> Settings:
        """Describe the run."""
        card = card_of(self.predictor.cfg)
        return Settings(
            weights=weights_digest(self.predictor.model),
            config=hashlib.sha256(card.config.encode()).hexdigest(),
            threshold=[round(float(x), 7) for x in self.predictor.thresholds],
            inputs=self.inputs.digest(),
            number=len(self.inputs.files),
            batch_size=self.predictor.batch_size,
            pictures=PICTURES in self.formats,
            shard=self.shard,
            class_names=list(self.predictor.class_names),
            root=self.inputs.root,
            start=self.inputs.start,
            doubles=sorted(self.inputs.doubles),
        )

    def _predict(self, settings: Settings, records: Records | None, done: int) -> None:
        part = settings.part
        with tqdm(total=len(part), initial=done, unit="image", disable=None) as bar:
            for outcomes in self._outcomes(part, done):
                lines = [json.dumps(self._record(x)) for x in outcomes]
                if records is not None:
                    records.write(lines)
                for line in lines:
                    self.on_record(line)
                bar.update(sum(x.frame is None for x in outcomes))
        for writer in self._writers.values():
            writer.close()

    def _outcomes(self, part: range, done: int) -> Iterator[list[Outcome]]:
        """Yield what comes of the files, batch by batch; videos are batches of their own."""
        files = self.inputs.files
        if not any(map(is_video, files)):
            yield from detect_in_files(self.predictor, files, part, done)
            return
        for file, images in _runs_of_images(files):
            if file is None:
                yield from detect_in_files(self.predictor, images, range(len(images)), 0)
                continue
            try:
                video = Video(file, max_pixels=self.predictor.cfg.INPUT.FOCAL.MAX_PIXELS)
            except UserError as error:
                yield [Outcome(file, error)]
                continue
            self._writers[file] = VideoWriter(self._picture_path(file, ".mp4"), video.rate)
            yield from detect_in_video(self.predictor, video)
            self._writers.pop(file).close()

    def _record(self, outcome: Outcome) -> dict[str, Any]:
        """Write the picture of an outcome and return its record."""
        result = outcome.result
        if isinstance(result, Detections):
            if 0 < self.limit < len(result):
                self.cut = self.cut[0] + 1, self.cut[1] or outcome.file
                result = result[: self.limit]  # the best come first
            if PICTURES in self.formats and self.output is not None:
                self._draw(outcome, result)
            if outcome.frame is None:
                return record_of(outcome.file, result)
            frame = outcome.frame
            return record_of(outcome.file, result, frame=frame.number, seconds=round(frame.seconds, 3))
        self.failed += 1
        self.on_problem(str(result))
        return {"file": outcome.file, "error": str(result)}

    def _draw(self, outcome: Outcome, result: Detections) -> None:
        if outcome.frame is not None:
            self._writers[outcome.file].write(result.draw())
            return
        path = self._picture_path(outcome.file, ".png")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"output folder {path.parent}: {reason(error)}") from error
        try:
            pixels = in_colours(outcome.file, self.predictor.cfg.INPUT.FOCAL.MAX_PIXELS)
        except UserError as error:  # larger than memory: it was read in tiles
            self.on_problem(f"not drawn: {error}")
            return
        picture = draw_detections(pixels, result.boxes, result.scores, result.classes, result.class_names)
        if self.truth is not None and outcome.file in self.truth:
            picture = draw_truth(pixels, self.truth[outcome.file], picture)
        write_picture(path, picture)

    def _picture_path(self, file: str, ending: str) -> Path:
        return (self.output or Path()) / PICTURES / f"{self.inputs.stem(file)}{ending}"


def _runs_of_images(files: Sequence[str]) -> Iterable[tuple[str | None, list[str]]]:
    """Yield each video, and between them the images that follow each other: (video, []) or (None, images)."""
    images: list[str] = []
    for file in files:
        if not is_video(file):
            images.append(file)
            continue
        if images:
            yield None, images
        images = []
        yield file, []
    if images:
        yield None, images
