"""Annotation formats: each reader returns a `Table`, with a line in `problems` for each wrong item."""

from collections.abc import Callable

from focal_d2.annotations import Table
from focal_d2.data.readers.coco import read_coco
from focal_d2.data.readers.csv_file import read_csv
from focal_d2.data.readers.voc import read_voc
from focal_d2.data.readers.yolo import read_yolo

# DATASETS.FOCAL's FORMAT, and who reads it.
READERS: dict[str, Callable[..., Table]] = {
    "coco": read_coco,
    "csv": read_csv,
    "voc": read_voc,
    "yolo": read_yolo,
}

__all__ = ["READERS", "read_coco", "read_csv", "read_voc", "read_yolo"]
