"""torchvision's RetinaNet with a ResNet-18 and its FPN (P3 to P7), from scratch: batch norm is trained.

Settings: tiles as they are, 400 pixels, with horizontal flips, the default of torchvision's references.
Anchors of half torchvision's sizes: it enlarges images to 800 pixels, where trees are twice as large.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from common import LIMIT, LOWEST_SCORE, annotations, parse, train, write_detections
from torch import Tensor, nn
from torchvision.io import ImageReadMode, decode_image
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7


def build() -> RetinaNet:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=nn.BatchNorm2d,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    sizes = tuple(tuple(int(x * 2 ** (i / 3)) for i in range(3)) for x in (16, 32, 64, 128, 256))
    return RetinaNet(
        backbone,
        num_classes=2,  # 0 is not used, as COCO counts from 1
        anchor_generator=AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5),
        score_thresh=LOWEST_SCORE,
        detections_per_img=LIMIT,
        _skip_resize=True,
    )


def read(path: str) -> Tensor:
    return decode_image(path, ImageReadMode.RGB).float() / 255


def batches(content: dict[str, Any], size: int) -> Iterator[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    boxes: dict[int, list[list[float]]] = {image["id"]: [] for image in content["images"]}
    for x in content["annotations"]:
        left, top, width, height = x["bbox"]
        boxes[x["image_id"]].append([left, top, left + width, top + height])
    order: list[dict[str, Any]] = []
    while True:
        images, targets = [], []
        for _ in range(size):
            order = order or random.sample(content["images"], len(content["images"]))
            record = order.pop()
            image, target = read(record["path"]), torch.tensor(boxes[record["id"]]).reshape(-1, 4)
            if random.random() < 0.5:
                image, target[:, [0, 2]] = image.flip(-1), image.shape[-1] - target[:, [2, 0]]
            images.append(image)
            targets.append({"boxes": target, "labels": torch.ones(len(target), dtype=torch.int64)})
        yield images, targets


def main() -> None:
    args = parse(__doc__)
    model = build().train()
    train(args, model, batches(annotations(args.data, "train"), args.batch or 4), lambda batch: model(*batch))
    model.eval()

    @torch.inference_mode()
    def detect(path: str) -> list[tuple[list[float], float]]:
        (found,) = model([read(path)])
        return list(zip(found["boxes"].tolist(), found["scores"].tolist(), strict=True))

    write_detections(args, detect)


if __name__ == "__main__":
    main()
