"""detectron2's Faster R-CNN with a ResNet-18 and its FPN, from scratch: batch norm is trained.

Settings: detectron2's faster_rcnn_R_50_FPN_1x.yaml, with tiles as they are, 400 pixels, horizontal flips,
anchors of half its sizes (it enlarges images to 800 pixels), and 128 regions of an image to train on, as its
tutorial for small data has it.
"""

from __future__ import annotations

from typing import Any

import torch
from common import LIMIT, LOWEST_SCORE, parse, train, write_detections
from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage


def configure(batch: int) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "BN"
    cfg.MODEL.PIXEL_STD = [57.375, 57.12, 58.395]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 1
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 128
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = LOWEST_SCORE
    cfg.TEST.DETECTIONS_PER_IMAGE = LIMIT
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    cfg.DATASETS.TRAIN = ("trees",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.SOLVER.IMS_PER_BATCH = batch
    return cfg


def main() -> None:
    args = parse(__doc__)
    register_coco_instances("trees", {}, str(args.data / "train.json"), str(args.data / "train"))
    cfg = configure(args.batch or 4)
    model = build_model(cfg).train()
    with EventStorage():  # where the model counts
        train(args, model, iter(build_detection_train_loader(cfg)), model)
    model.eval()

    @torch.inference_mode()
    def detect(path: str) -> list[tuple[list[float], float]]:
        pixels = torch.from_numpy(read_image(path, cfg.INPUT.FORMAT).transpose(2, 0, 1).copy())
        record: dict[str, Any] = {"image": pixels, "height": pixels.shape[1], "width": pixels.shape[2]}
        instances = model([record])[0]["instances"]
        return list(zip(instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), strict=True))

    write_detections(args, detect)


if __name__ == "__main__":
    main()
