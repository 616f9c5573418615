"""FocalRetinaNet: RetinaNet on detectron2's `DenseDetector`.

Shapes: N images, L levels, A anchors a cell, R anchors an image (all levels), K classes, P positive anchors
of the batch. Boxes are XYXY in absolute pixels. Labels are int64: [0, K) a class, K background, -1 ignored.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import batched_nms
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import Tensor, nn

from focal_d2.config import check_choice, focal_config, loss_parameters
from focal_d2.errors import UserError
from focal_d2.modeling.anchors import AnchorCache, Anchors
from focal_d2.modeling.head import FocalRetinaNetHead
from focal_d2.modeling.losses import (
    BOX_LOSSES,
    NORMALIZERS,
    BoxLoss,
    ClassificationLoss,
    DenseBatch,
    LossNormalizer,
    build_loss,
    gather_deltas,
    level_ranges,
)
from focal_d2.ops import IGNORE_LABEL
from focal_d2.ops.assign import match_anchors


class AnchorTargets(NamedTuple):
    """What the anchors of a batch shall predict."""

    labels: Tensor  # (N, R) int64
    positive: Tensor  # (N, R) bool
    gt_boxes: Tensor  # (P, 4) float, in the order of positive.nonzero()


class Candidates(NamedTuple):
    """Scores above the threshold, each (E,)."""

    image: Tensor  # int64
    anchor: Tensor  # int64
    label: Tensor  # int64, in [0, K)
    score: Tensor  # float

    def where(self, chosen: Tensor) -> Candidates:
        """Return some of them, by mask or index."""
        return Candidates(*(field[chosen] for field in self))


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(DenseDetector):
    """RetinaNet (arXiv 1708.02002), interchangeable with detectron2's.

    It reads the same `MODEL.RETINANET.*` keys, gives the same losses, gradients and detections, and its
    state dict has the same names plus `loss_normalizer.ema`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: nn.Module,
        head_in_features: list[str],
        anchor_generator: nn.Module,
        box2box_transform: Box2BoxTransform,
        anchor_matcher: Matcher,
        num_classes: int,
        cls_loss: ClassificationLoss,
        box_loss: BoxLoss,
        loss_normalizer: LossNormalizer,
        test_score_thresh: float,
        test_topk_candidates: int,
        test_nms_thresh: float,
        max_detections_per_image: int,
        pixel_mean: list[float],
        pixel_std: list[float],
        amp: bool,
        channels_last: bool,
    ) -> None:
        """Compose the detector.

        Args:
            backbone: detectron2 backbone.
            head: features -> (L × (N, A·C, H, W) logits, L × (N, A·4, H, W) deltas).
            head_in_features: names of the backbone's outputs that the head reads, finest first.
            anchor_generator: features -> L × `Boxes`.
            box2box_transform: the R-CNN parametrisation of boxes.
            anchor_matcher: its thresholds, labels and allow_low_quality_matches; see `match_anchors`.
            num_classes: K, without background.
            cls_loss: the classification loss, which also says what logits mean.
            box_loss: the box loss.
            loss_normalizer: number of positives -> divisor of both losses.
            test_score_thresh: detections need a higher score.
            test_topk_candidates: at most so many candidates of a level go on to NMS.
            test_nms_thresh: IoU above which NMS drops the lower-scored box of the same class.
            max_detections_per_image: at most so many detections are returned.
            pixel_mean: a value for each channel, subtracted from the image.
            pixel_std: a value for each channel that divides the result.
            amp: run backbone and head under bfloat16 autocast.
            channels_last: keep weights and images in NHWC.
        """
        super().__init__(backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std)
        self.num_classes = num_classes
        self.anchor_generator = anchor_generator
        self.anchors_of = AnchorCache(anchor_generator)
        self.box2box_transform = box2box_transform
        self.anchor_matcher = anchor_matcher
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.loss_normalizer = loss_normalizer
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.amp = amp
        self.channels_last = channels_last
        if channels_last:
            self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.RETINANET.*` and `MODEL.FOCAL.*`.

        Raises:
            UserError: for a value outside a key's choices.
        """
        retinanet, focal = cfg.MODEL.RETINANET, focal_config(cfg)
        if retinanet.FOCAL_LOSS_ALPHA > 1 or retinanet.FOCAL_LOSS_GAMMA < 0:
            raise UserError(
                f"MODEL.RETINANET.FOCAL_LOSS_ALPHA is {retinanet.FOCAL_LOSS_ALPHA} and FOCAL_LOSS_GAMMA "
                f"{retinanet.FOCAL_LOSS_GAMMA}; at most 1 and at least 0 are needed"
            )
        if not 0 < retinanet.PRIOR_PROB < 1:
            raise UserError(
                f"MODEL.RETINANET.PRIOR_PROB is {retinanet.PRIOR_PROB}; it must lie between 0 and 1"
            )
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        for name in retinanet.IN_FEATURES:
            check_choice("MODEL.RETINANET.IN_FEATURES entry", name, tuple(shapes))
        feature_shapes = [shapes[name] for name in retinanet.IN_FEATURES]
        cls_loss = build_loss(
            focal.LOSS.NAME,
            num_classes=retinanet.NUM_CLASSES,
            parameters=loss_parameters(cfg),
            implementation=focal.LOSS.IMPLEMENTATION,
        )
        box2box_transform = Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS)
        return {
            "backbone": backbone,
            "head": FocalRetinaNetHead(
                cfg,
                feature_shapes,
                num_classes=cls_loss.num_logits,
                prior_bias=cls_loss.prior_bias(retinanet.PRIOR_PROB),
            ),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": build_anchor_generator(cfg, feature_shapes),
            "box2box_transform": box2box_transform,
            "anchor_matcher": Matcher(
                retinanet.IOU_THRESHOLDS,
                retinanet.IOU_LABELS,
                allow_low_quality_matches=focal.LOW_QUALITY_MATCHES,
            ),
            "num_classes": retinanet.NUM_CLASSES,
            "cls_loss": cls_loss,
            "box_loss": BoxLoss(
                kind=check_choice(
                    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE", retinanet.BBOX_REG_LOSS_TYPE, BOX_LOSSES
                ),
                transform=box2box_transform,
                smooth_l1_beta=retinanet.SMOOTH_L1_LOSS_BETA,
                ghm_mu=focal.GHM_R.MU,
                ghm_bins=focal.GHM_R.BINS,
                ghm_momentum=focal.GHM_R.MOMENTUM,
            ),
            "loss_normalizer": LossNormalizer(
                kind=check_choice("MODEL.FOCAL.LOSS.NORMALIZER", focal.LOSS.NORMALIZER, NORMALIZERS)
            ),
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "amp": focal.AMP.ENABLED,
            "channels_last": focal.CHANNELS_LAST,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, detections in evaluation; see detectron2's `DenseDetector.forward`."""
        if not self.amp:
            return super().forward(batched_inputs)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return super().forward(batched_inputs)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch: an `ImageList` of (N, C, H, W) in the configured memory format."""
        images = super().preprocess_image(batched_inputs)
        if not self.channels_last:
            return images
        return ImageList(images.tensor.contiguous(memory_format=torch.channels_last), images.image_sizes)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: list[list[Tensor]],
        gt_instances: list[Instances],
    ) -> dict[str, Tensor]:
        """Return `loss_cls` and `loss_box_reg`, scalars, each divided by the normaliser.

        Args:
            images: unused; part of the base class's interface.
            features: L × (N, C, H, W).
            predictions: L × (N, A·C, H, W) logits and L × (N, A·4, H, W) deltas.
            gt_instances: N × `Instances` with gt_boxes (M, 4) and gt_classes (M).
        """
        with torch.autocast(self.device.type, enabled=False):
            logits, deltas = predictions
            anchors = self.anchors_of(features)
            targets = self.label_anchors(anchors, gt_instances)
            num_positives = targets.positive.sum()
            if has_event_storage():
                get_event_storage().put_scalar("num_pos_anchors", num_positives.item() / len(gt_instances))
            image_index, anchor_index = targets.positive.nonzero(as_tuple=True)  # (P,), (P,)
            losses = {
                "loss_cls": self.cls_loss(
                    DenseBatch(
                        logits=logits,
                        num_logits=self.cls_loss.num_logits,
                        labels=targets.labels,
                        positive=targets.positive,
                        gt_boxes=targets.gt_boxes,
                        deltas=deltas,
                        anchors=anchors.boxes,
                        decode=self.box2box_transform.apply_deltas,
                    )
                ),
                "loss_box_reg": self.box_loss(
                    gather_deltas(deltas, image_index, anchor_index),
                    anchors.boxes[anchor_index],
                    targets.gt_boxes,
                ),
            }
            normalizer = self.loss_normalizer(num_positives)
            if self.cls_loss.divided_by_positives:
                losses["loss_cls"] = losses["loss_cls"] / normalizer
            if self.box_loss.divided_by_positives:
                losses["loss_box_reg"] = losses["loss_box_reg"] / normalizer
            return losses

    @torch.no_grad()
    def label_anchors(self, anchors: Anchors, gt_instances: list[Instances]) -> AnchorTargets:
        """Match every anchor to at most one box by IoU (paper, section 4).

        Departure from the paper, as in detectron2: each box also gets its best anchors, however low
        their IoU, unless `MODEL.FOCAL.LOW_QUALITY_MATCHES` is false.

        Args:
            anchors: of the batch's image shape (`self.anchors_of`).
            gt_instances: N × `Instances` with gt_boxes (M, 4) and gt_classes (M); M may be 0.
        """
        labels = torch.full(
            (len(gt_instances), len(anchors.boxes)),
            self.num_classes,
            dtype=torch.int64,
            device=anchors.boxes.device,
        )
        positive = torch.zeros_like(labels, dtype=torch.bool)
        gt_boxes = [anchors.boxes.new_zeros(0, 4)]
        for image_labels, image_positive, gt in zip(labels, positive, gt_instances, strict=True):
            if len(gt) == 0:
                continue
            matched, outcome = self._match(gt.gt_boxes, anchors)
            image_positive.copy_(outcome == 1)
            chosen = matched[image_positive]
            image_labels[outcome == -1] = IGNORE_LABEL
            image_labels[image_positive] = gt.gt_classes[chosen]
            gt_boxes.append(gt.gt_boxes.tensor[chosen])
        return AnchorTargets(labels, positive, torch.cat(gt_boxes))

    def _match(self, boxes: Boxes, anchors: Anchors) -> tuple[Tensor, Tensor]:
        matcher = self.anchor_matcher
        return match_anchors(
            boxes.tensor,
            anchors.boxes,
            anchors.grid,
            thresholds=matcher.thresholds[1:-1],  # without the infinities around them
            labels=matcher.labels,
            low_quality_matches=matcher.allow_low_quality_matches,
        )

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Threshold, keep each level's best, decode, and suppress per class.

        Returns:
            N × `Instances` with pred_boxes (D, 4), scores (D) falling, pred_classes (D), in the padded
            image's pixels.
        """
        with torch.autocast(self.device.type, enabled=False):
            logits, deltas = predictions
            anchors = self.anchors_of(features)
            found = self._candidates(logits)
            boxes = self.box2box_transform.apply_deltas(
                gather_deltas(deltas, found.image, found.anchor), anchors.boxes[found.anchor]
            )
            results = []
            for i, image_size in enumerate(images.image_sizes):
                own = (found.image == i).nonzero().squeeze(1)
                own = own[batched_nms(boxes[own], found.score[own], found.label[own], self.test_nms_thresh)]
                own = own[: self.max_detections_per_image]
                results.append(
                    Instances(
                        image_size,
                        pred_boxes=Boxes(boxes[own]),
                        scores=found.score[own],
                        pred_classes=found.label[own],
                    )
                )
            return results

    def _candidates(self, logits: list[Tensor]) -> Candidates:
        """Find what scores above the threshold; of each image and level the best.

        Args:
            logits: L × (N, A·C, H, W).
        """
        parts = []
        for x, start, _ in level_ranges(logits, self.cls_loss.num_logits):
            best = self._best(self._above_threshold(x))
            parts.append(best._replace(anchor=best.anchor + start))
        return Candidates(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _above_threshold(self, logits: Tensor) -> Candidates:
        """Find what scores above the threshold on a level, (N, A·C, H, W)."""
        level = logits.unflatten(1, (-1, self.cls_loss.num_logits))  # (N, A, C, H, W)
        anchors, width = level.shape[1], level.shape[4]
        cut = self.cls_loss.least_logit(self.test_score_thresh)
        if cut is None:
            scores = self.cls_loss.probabilities(level.movedim(2, 4).float()).movedim(4, 2)
            image, a, label, row, column = (scores > self.test_score_thresh).nonzero(as_tuple=True)
            score = scores[image, a, label, row, column]
        else:
            # Few logits are above it: probabilities of the others are never computed. Half precision rounds
            # the number it is compared with.
            cut -= abs(cut) * torch.finfo(level.dtype).eps if math.isfinite(cut) else 0.0
            image, a, label, row, column = (level > cut).nonzero(as_tuple=True)
            score = self.cls_loss.probabilities(level[image, a, label, row, column].float())
        found = Candidates(image, (row * width + column) * anchors + a, label, score)
        return found if cut is None else found.where(score > self.test_score_thresh)

    def _best(self, found: Candidates) -> Candidates:
        """Keep at most `test_topk_candidates` of each image."""
        if len(found.score) <= self.test_topk_candidates:
            return found
        kept = []
        for image in found.image.unique().tolist():
            own = (found.image == image).nonzero().squeeze(1)
            count = min(self.test_topk_candidates, len(own))
            kept.append(own[found.score[own].topk(count).indices])
        return found.where(torch.cat(kept))
