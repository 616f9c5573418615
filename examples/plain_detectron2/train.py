#!/usr/bin/env python
"""A detectron2 project with its own trainer and data: two lines and one in the YAML bring FocalRetinaNet."""

import sys
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import BoxMode

import focal_d2  # 1: registers FocalRetinaNet with detectron2


def draw_shapes(folder: Path, seed: int) -> list[dict]:
    """Twelve pictures with a square and a disc each, in detectron2's dataset format."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    records = []
    for i in range(12):
        picture = rng.integers(60, 120, (128, 128, 3), dtype=np.uint8)
        (x, y), (u, v) = rng.integers(0, 88, (2, 2)).tolist()
        cv2.rectangle(picture, (x, y), (x + 39, y + 39), (40, 200, 240), -1)
        cv2.circle(picture, (u + 20, v + 20), 20, (240, 120, 40), -1)
        path = folder / f"{i}.png"
        path.write_bytes(cv2.imencode(".png", picture)[1])
        boxes = [(0, [x, y, x + 40, y + 40]), (1, [u, v, u + 40, v + 40])]
        records.append(
            {
                "file_name": str(path),
                "image_id": i,
                "height": 128,
                "width": 128,
                "annotations": [
                    {"category_id": k, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS} for k, box in boxes
                ],
            }
        )
    return records


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))


def main() -> None:
    cfg = get_cfg()
    focal_d2.add_focal_config(cfg)  # 2: makes the keys under MODEL.FOCAL known
    cfg.merge_from_file(str(Path(__file__).with_name("config.yaml")))
    cfg.merge_from_list(sys.argv[1:])
    for seed, name in enumerate(("shapes_train", "shapes_test")):
        folder = Path(cfg.OUTPUT_DIR) / name
        DatasetCatalog.register(name, lambda folder=folder, seed=seed: draw_shapes(folder, seed))
        MetadataCatalog.get(name).thing_classes = ["square", "disc"]
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()  # ends with an evaluation; its results are in metrics.json


if __name__ == "__main__":
    main()
