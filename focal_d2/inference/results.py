"""The detections of one image, and the forms in which they leave the program.

D detections of K classes. Boxes are XYXY in pixels of the image, from the outer edge of its first pixel.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from focal_d2.data.pictures import write_picture
from focal_d2.data.rasters import Georeference
from focal_d2.errors import UserError
from focal_d2.inference.draw import draw_detections
from focal_d2.inference.sources import Source, in_colours
from focal_d2.storage.files import write_aside

# Columns of CSV files. All but the last are those of annotations in CSV format (docs/data.md), which lets
# detections be corrected and trained on.
COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax", "label", "score")
# Decimals in texts: of pixels, and of scores.
PIXEL_DECIMALS, SCORE_DECIMALS = 2, 6
_DEGREE_DECIMALS = 8  # a millimetre


class Detection(NamedTuple):
    """One object."""

    box: np.ndarray  # (4,) float32
    score: float
    label: int  # in [0, K)
    name: str  # of the class


@dataclass(frozen=True, eq=False)
class Detections:
    """The detections of one image, best first.

    Example:
        result = predictor("field.png")
        for box, score, label, name in result:
            print(name, score, box)
        large = result[result.areas > 400]

    Attributes:
        boxes: (D, 4) float32.
        scores: (D,) float32 in (0, 1).
        classes: (D,) int64 in [0, K).
        class_names: K names.
        height: of the image, in pixels.
        width: the same.
        source: the image as the predictor was given it: a path, an array or a Pillow image.
        georeference: where the image is on the Earth, of a TIFF file that was read in tiles and says so.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    class_names: Sequence[str]
    height: int
    width: int
    source: Source | None = None
    georeference: Georeference | None = None

    def __len__(self) -> int:
        """Return D."""
        return len(self.scores)

    def __iter__(self) -> Iterator[Detection]:
        """Yield the detections, best first."""
        for box, score, label in zip(self.boxes, self.scores.tolist(), self.classes.tolist(), strict=True):
            yield Detection(box, score, label, self.class_names[label])

    def __getitem__(self, which: Any) -> Detections:
        """Return some of the detections; `which` is a slice, a mask (D,) or indices, as for an array."""
        if isinstance(which, (int, np.integer)):
            which = [which]
        return Detections(
            self.boxes[which],
            self.scores[which],
            self.classes[which],
            self.class_names,
            self.height,
            self.width,
            self.source,
            self.georeference,
        )

    def __repr__(self) -> str:
        """Say how many there are, and in which image."""
        return f"Detections({len(self)} in {self.file or 'an image'} of {self.width} × {self.height} pixels)"

    @property
    def names(self) -> list[str]:
        """The name of the class of each detection."""
        return [self.class_names[k] for k in self.classes.tolist()]

    @property
    def areas(self) -> np.ndarray:
        """(D,) areas of the boxes in square pixels."""
        return np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1)

    @property
    def file(self) -> str:
        """The path of the image; "" if the predictor was given pixels."""
        return str(self.source) if isinstance(self.source, (str, Path)) else ""

    def rounded(self) -> tuple[list[list[float]], list[float], list[int]]:
        """Return boxes, scores and classes as plain numbers with as many decimals as texts have."""
        boxes = [[round(x, PIXEL_DECIMALS) for x in box] for box in self.boxes.astype(float).tolist()]
        scores = [round(x, SCORE_DECIMALS) for x in self.scores.astype(float).tolist()]
        return boxes, scores, self.classes.tolist()

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return what COCO calls results: dictionaries of image_id, category_id, bbox (XYWH) and score.

        Args:
            image_id: of the image.

        Returns:
            D dictionaries. A class's category_id is its label + 1: COCO's tools take 0 for the background.
        """
        return [coco_result(image_id, *values) for values in zip(*self.rounded(), strict=True)]

    def to_csv(self, path: str | Path | None = None) -> str:
        """Return the detections as CSV with the header of `COLUMNS`, and write it.

        Args:
            path: of the file; None: no file is written.

        Returns:
            A line for each detection; one without a box if there are none, as in annotations.

        Raises:
            UserError: if the file can't be written.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(csv_rows(self.file, *self.rounded(), self.class_names))
        if path is not None:
            _write_text(path, text.getvalue())
        return text.getvalue()

    def to_geojson(self, path: str | Path | None = None) -> dict[str, Any]:
        """Return the detections as a GeoJSON FeatureCollection (RFC 7946), and write it.

        Args:
            path: of the file; None: no file is written.

        Returns:
            A polygon in longitude and latitude (WGS 84) for each box, with the properties label and score.

        Raises:
            UserError: if the image has no georeference, or the file can't be written.
        """
        if self.georeference is None:
            raise UserError(f"{self.file or 'the image'} has no georeference; GeoJSON needs one")
        x0, y0, x1, y1 = self.boxes.astype(float).T
        # Counter-clockwise on a map with north up.
        rings = np.stack([x0, y1, x1, y1, x1, y0, x0, y0, x0, y1], axis=1).reshape(-1, 2)
        places = self.georeference.to_degrees(rings).round(_DEGREE_DECIMALS).reshape(-1, 5, 2).tolist()
        _, scores, _ = self.rounded()
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"label": name, "score": score},
            }
            for ring, name, score in zip(places, self.names, scores, strict=True)
        ]
        collection = {"type": "FeatureCollection", "features": features}
        if path is not None:
            _write_text(path, json.dumps(collection))
        return collection

    def to_supervision(self) -> Any:
        """Return `supervision.Detections`, with the names of the classes in `data["class_name"]`.

        Raises:
            UserError: if supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError(
                f"to_supervision() needs the package supervision ({error}): pip install supervision"
            ) from error
        return supervision.Detections(
            xyxy=self.boxes,
            confidence=self.scores,
            class_id=self.classes,
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def draw(self, path: str | Path | None = None, *, image: Source | None = None) -> np.ndarray:
        """Draw the detections on the image, with class and score; see `focal_d2.inference.draw`.

        Args:
            path: of a picture to write, in the format of its ending; None: none is written.
            image: to draw on; None: the one that the predictor was given.

        Returns:
            (H, W, 3) uint8 in BGR order, as OpenCV has it.

        Raises:
            UserError: if the image can't be read, has another size, or the picture can't be written.
        """
        source = self.source if image is None else image
        if source is None:
            raise UserError("draw(image=…): these detections do not know their image")
        pixels = in_colours(source)
        if pixels.shape[:2] != (self.height, self.width):
            raise UserError(
                f"draw(): the image has {pixels.shape[1]} × {pixels.shape[0]} pixels, the detections are of "
                f"one of {self.width} × {self.height}"
            )
        picture = draw_detections(pixels, self.boxes, self.scores, self.classes, self.class_names)
        if path is not None:
            write_picture(Path(path), picture)
        return picture


def _write_text(path: str | Path, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    try:
        write_aside(str(path), lambda file: file.write(data))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def coco_result(image_id: int, box: Sequence[float], score: float, label: int) -> dict[str, Any]:
    """Return one of COCO's results; see `Detections.to_coco`."""
    x0, y0, x1, y1 = box
    size = [round(x1 - x0, PIXEL_DECIMALS), round(y1 - y0, PIXEL_DECIMALS)]
    return {"image_id": image_id, "category_id": label + 1, "bbox": [x0, y0, *size], "score": score}


def csv_rows(
    file: str,
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    classes: Sequence[int],
    class_names: Sequence[str],
) -> Iterator[list[Any]]:
    """Yield the rows of an image in a CSV file; see `Detections.to_csv`."""
    for box, score, label in zip(boxes, scores, classes, strict=True):
        yield [file, *box, class_names[label], score]
    if not boxes:
        yield [file, *[""] * (len(COLUMNS) - 1)]
