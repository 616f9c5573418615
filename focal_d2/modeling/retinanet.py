"""FocalRetinaNet: detectron2's RetinaNet with other losses, matching, decoding and training.

Shapes: N images, L levels, A anchors a cell, R anchors an image (all levels), K classes, P positive anchors
of the batch. Boxes are XYXY in absolute pixels. Labels are int64: [0, K) a class, K background, -1 ignored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_anchor_generator,
    build_backbone,
)
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import get_event_storage, has_event_storage
from detectron2.utils.logger import log_first_n
from torch import Tensor, nn

from focal_d2.config import check_choice
from focal_d2.detectron2_compat import DetectorHooks
from focal_d2.errors import UserError
from focal_d2.modeling import traced
from focal_d2.modeling.anchors import AnchorCache, Anchors
from focal_d2.modeling.assigners import Assigner, build_assigner
from focal_d2.modeling.candidates import Candidates, find_candidates
from focal_d2.modeling.folding import fold_norms
from focal_d2.modeling.head import FocalRetinaNetHead
from focal_d2.modeling.losses import (
    BoxLoss,
    ClassificationLoss,
    DenseBatch,
    LossNormalizer,
    gather_deltas,
)
from focal_d2.modeling.metrics import put_metrics
from focal_d2.modeling.parts import build_focal_parts
from focal_d2.modeling.precision import check_channels_last, configured_type, is_narrow
from focal_d2.modeling.targets import AnchorTargets, TargetBuffers, label_anchors
from focal_d2.ops.detect import best_boxes

logger = logging.getLogger(__name__)

_NOT_FINITE = (
    "the network's outputs are NaN or infinite, and where they are nothing is detected: MODEL.WEIGHTS are "
    "damaged, or of a training that diverged"
)


@META_ARCH_REGISTRY.register()
class FocalRetinaNet(DetectorHooks, RetinaNet):
    """RetinaNet (arXiv 1708.02002), interchangeable with detectron2's.

    It reads the same `MODEL.RETINANET.*` keys, gives the same losses, gradients and detections, and its
    state dict has the same names plus `loss_normalizer.ema`. It is a subclass so that tools which ask for
    detectron2's class accept it.
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
        assigner: Assigner,
        region_share: float,
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
        amp: torch.dtype | None,
        channels_last: bool,
        fold_frozen_norms: bool,
        use_kernels: bool,
        compile_network: bool,
    ) -> None:
        """Compose the detector.

        Args:
            backbone: detectron2 backbone.
            head: features -> (L × (N, A·C, H, W) logits, L × (N, A·4, H, W) deltas).
            head_in_features: names of the backbone's outputs that the head reads, finest first.
            anchor_generator: features -> L × `Boxes`.
            box2box_transform: the R-CNN parametrisation of boxes.
            assigner: which anchors must detect which box.
            region_share: anchors of which an ignored region covers at least this share are not background.
            num_classes: K, without background.
            cls_loss: the classification loss, which also says what logits mean.
            box_loss: the box loss.
            loss_normalizer: number of positives -> divisor of both losses.
            test_score_thresh: detections need a higher score.
            test_topk_candidates: at most so many candidates of a level are the input of NMS.
            test_nms_thresh: IoU above which NMS drops the lower-scored box of the same class.
            max_detections_per_image: at most so many detections are returned.
            pixel_mean: a value for each channel, subtracted from the image.
            pixel_std: a value for each channel that divides the result.
            amp: run backbone and head under autocast to this type; None: in the weights' precision.
            channels_last: keep weights and images in NHWC.
            fold_frozen_norms: compute convolution and frozen batch norm as one convolution.
            use_kernels: match anchors with Triton kernels on a GPU; the loss has a separate such argument.
            compile_network: hand backbone and head to `torch.compile`, and keep targets in fixed shapes.
        """
        # Not RetinaNet's constructor: it would store settings of losses that this class does not use.
        super(RetinaNet, self).__init__(
            backbone, head, head_in_features, pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        self.num_classes = num_classes
        self.anchor_generator = anchor_generator
        self.anchors_of = AnchorCache(anchor_generator)
        self.box2box_transform = box2box_transform
        self.assigner = assigner
        self.region_share = region_share
        self.cls_loss = cls_loss
        self.box_loss = box_loss
        self.loss_normalizer = loss_normalizer
        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.max_detections_per_image = max_detections_per_image
        self.amp = amp
        self.channels_last = channels_last
        self.use_kernels = use_kernels
        if channels_last:
            self.to(memory_format=torch.channels_last)
        shapes = backbone.output_shape()
        self.level_names = [name.capitalize() for name in head_in_features]
        self._strides = [shapes[name].stride for name in head_in_features]
        if fold_frozen_norms:
            fold_norms(self.backbone)
        # Detects in several views of each image instead, if set: see `inference.test_time`.
        self.views: Callable[[FocalRetinaNet, list[dict[str, Any]]], list[dict[str, Instances]]] | None = None
        self.compiled = compile_network
        self.target_buffers = TargetBuffers() if compile_network and cls_loss.fixed_shapes else None
        if compile_network:
            self.backbone.compile()
            self.head.compile()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Read `MODEL.RETINANET.*` and `MODEL.FOCAL.*`.

        Raises:
            UserError: for a value outside a key's choices.
        """
        retinanet = cfg.MODEL.RETINANET
        if cfg.TEST.DETECTIONS_PER_IMAGE < 1:
            raise UserError(f"TEST.DETECTIONS_PER_IMAGE is {cfg.TEST.DETECTIONS_PER_IMAGE}; at least 1")
        box2box_transform = Box2BoxTransform(weights=retinanet.BBOX_REG_WEIGHTS)
        parts = build_focal_parts(cfg, box2box_transform)
        cls_loss = parts["cls_loss"]
        backbone = build_backbone(cfg)
        if parts["channels_last"] and torch.device(cfg.MODEL.DEVICE).type == "cpu":
            check_channels_last(backbone)
        shapes = backbone.output_shape()
        for name in retinanet.IN_FEATURES:
            check_choice("MODEL.RETINANET.IN_FEATURES entry", name, tuple(shapes))
        feature_shapes = [shapes[name] for name in retinanet.IN_FEATURES]
        anchor_generator = build_anchor_generator(cfg, feature_shapes)
        if anchor_generator.box_dim != 4:
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.NAME is {cfg.MODEL.ANCHOR_GENERATOR.NAME}, whose boxes have "
                f"{anchor_generator.box_dim} numbers; FocalRetinaNet's have 4"
            )
        return {
            **parts,
            "backbone": backbone,
            "head": FocalRetinaNetHead(
                cfg,
                feature_shapes,
                num_classes=cls_loss.num_logits,
                prior_bias=cls_loss.prior_bias(retinanet.PRIOR_PROB),
            ),
            "head_in_features": retinanet.IN_FEATURES,
            "anchor_generator": anchor_generator,
            "box2box_transform": box2box_transform,
            "assigner": build_assigner(cfg),
            "num_classes": retinanet.NUM_CLASSES,
            "test_score_thresh": retinanet.SCORE_THRESH_TEST,
            "test_topk_candidates": retinanet.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": retinanet.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """Losses in training, detections in evaluation; see detectron2's `DenseDetector.forward`.

        Beside its "instances" an image may have "ignored_boxes" in training, (G, 4) XYXY in its pixels, and a
        "sampling_seed" in [0, 2^63), for losses that choose examples at random.
        """
        if not self.training:
            with self.precision():
                if traced.is_recording():
                    return traced.detect(self, batched_inputs)
                if self.views is not None:
                    return self.views(self, batched_inputs)
                return super().forward(batched_inputs)
        return self.losses(batched_inputs, self.network)

    def losses(
        self,
        batched_inputs: list[dict[str, Any]],
        network: Callable[[ImageList], tuple[list[Tensor], list[list[Tensor]]]],
    ) -> dict[str, Tensor]:
        """Return the losses of images, see `forward`; `network` is the method, or has its results."""
        if not all("instances" in x for x in batched_inputs) or not batched_inputs:
            raise UserError("training needs images with instances, which this batch does not have")
        images = self.preprocess_image(batched_inputs)
        boxes = ([x["instances"] for x in batched_inputs], [x.get("ignored_boxes") for x in batched_inputs])
        # Before the network runs, so that a GPU has counted the positives when the host needs their number.
        anchors = self.anchors_for(images)
        targets = self.label_anchors(anchors, *boxes)
        with self.precision():
            features, predictions = network(images)
        actual = self._anchors_of(features)
        if actual is not anchors:  # a backbone that rounds its sizes another way
            anchors, targets = actual, self.label_anchors(actual, *boxes)
        seeds = [_seed_of(x) for x in batched_inputs] if self.cls_loss.samples else ()
        return self.compute_losses(predictions, anchors, targets, seeds, images.image_sizes)

    @torch.no_grad()
    def count_positives(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        """Return the number of positive anchors, a scalar; see `forward` for the images."""
        # Only the padded size of the batch counts: without values, nothing is copied to a GPU.
        shapes = [torch.empty(x["image"].shape, device="meta") for x in batched_inputs]
        images = ImageList.from_tensors(
            shapes, self.backbone.size_divisibility, padding_constraints=self.backbone.padding_constraints
        )
        instances = [x["instances"] for x in batched_inputs]
        return self.label_anchors(self.anchors_for(images), instances).positive.sum()

    def precision(self) -> AbstractContextManager[Any]:
        """Return the autocast context that `MODEL.FOCAL.AMP.*` asks for, or one that does nothing."""
        if self.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp)

    def network(self, images: ImageList) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Run backbone and head.

        Returns:
            L × (N, C, H, W) features; L × (N, A·C, H, W) logits and L × (N, A·4, H, W) deltas.
        """
        backbone, head = self.backbone, self.head
        if self.compiled and traced.is_recording():  # compiled modules refuse to be traced
            backbone, head = backbone.forward, head.forward
        # Only gradients are wrong for narrow images, so evaluation may compute in bfloat16.
        narrow = self.training and self.amp == torch.bfloat16
        narrow = narrow and is_narrow(images.tensor, coarsest_stride=self._strides[-1])
        with torch.autocast(self.device.type, enabled=False) if narrow else nullcontext():
            outputs = backbone(images.tensor)
            features = [outputs[name] for name in self.head_in_features]
            return features, head(features)

    def to_device(self, x: Tensor) -> Tensor:
        """Move an image without waiting for the copy."""
        return x.to(self.device, non_blocking=True)

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Normalise, pad and batch: an `ImageList` of (N, C, H, W) in the configured memory format."""
        images = super().preprocess_image(batched_inputs)
        if not self.channels_last:
            return images
        return ImageList(images.tensor.contiguous(memory_format=torch.channels_last), images.image_sizes)

    def anchors_for(self, images: ImageList) -> Anchors:
        """Return the anchors of a batch, from the strides that the backbone declares."""
        height, width = images.tensor.shape[-2:]
        return self.anchors_of([(-(-height // s), -(-width // s)) for s in self._strides], self.device)

    def _anchors_of(self, features: list[Tensor]) -> Anchors:
        return self.anchors_of([(x.shape[-2], x.shape[-1]) for x in features], self.device)

    def compute_losses(
        self,
        predictions: list[list[Tensor]],
        anchors: Anchors,
        targets: AnchorTargets,
        seeds: Sequence[int],
        sizes: Sequence[tuple[int, int]] = (),
    ) -> dict[str, Tensor]:
        """Return `loss_cls` and `loss_box_reg`, scalars, each divided by the normaliser."""
        with torch.autocast(self.device.type, enabled=False):
            logits, deltas = predictions
            if self.target_buffers is not None:
                targets = self.target_buffers.hold(targets)
            positives = targets.positives()
            normalizer = self.loss_normalizer(targets.positive.sum())
            upstream = self.loss_normalizer.upstream
            if upstream is not None and self.cls_loss.divided_by_positives:
                upstream = upstream / normalizer
            if has_event_storage():
                per_image = targets.num_positives() / len(targets.labels)
                get_event_storage().put_scalar("num_pos_anchors", per_image)
            batch = DenseBatch(
                logits=logits,
                num_logits=self.cls_loss.num_logits,
                labels=targets.labels,
                positive=targets.positive,
                **positives._asdict(),
                deltas=deltas,
                anchors=anchors.boxes,
                decode=self.box2box_transform.apply_deltas,
                seeds=seeds,
                sizes=sizes,
                upstream=upstream,
            )
            losses = {
                "loss_cls": self.cls_loss(batch),
                "loss_box_reg": self.box_loss(
                    gather_deltas(deltas, positives.image, positives.anchor),
                    anchors.boxes[positives.anchor],
                    positives.gt_boxes,
                    positives.valid,
                ),
            }
            if self.cls_loss.divided_by_positives:
                losses["loss_cls"] = losses["loss_cls"] / normalizer
            if self.box_loss.divided_by_positives:
                losses["loss_box_reg"] = losses["loss_box_reg"] / normalizer
            put_metrics(self.cls_loss, batch, losses["loss_cls"], levels=self.level_names)
            return losses

    def label_anchors(
        self, anchors: Anchors, gt_instances: list[Instances], regions: Sequence[Tensor | None] | None = None
    ) -> AnchorTargets:
        """Match every anchor to at most one box; see `focal_d2.modeling.targets.label_anchors`."""
        return label_anchors(
            anchors,
            gt_instances,
            self.assigner,
            self.num_classes,
            regions=regions or [None] * len(gt_instances),
            region_share=self.region_share,
            use_kernels=self.use_kernels,
        )

    def forward_inference(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Threshold, keep each level's best, decode, and suppress per class.

        Returns:
            N × `Instances` with pred_boxes (D, 4), scores (D) falling, pred_classes (D), in the padded
            image's pixels.
        """
        return [self.suppress(x) for x in self.candidates(images, features, predictions)]

    def candidates(
        self, images: ImageList, features: list[Tensor], predictions: list[list[Tensor]]
    ) -> list[Instances]:
        """Threshold, keep each level's best, and decode; see `forward_inference` for the result."""
        with torch.autocast(self.device.type, enabled=False):
            logits, deltas = predictions
            anchors = self._anchors_of(features)
            found = find_candidates(
                logits, deltas, self.cls_loss, self.test_score_thresh, self.test_topk_candidates
            )
            boxes = self.box2box_transform.apply_deltas(found.deltas, anchors.boxes[found.anchor])
            usable = boxes.isfinite().all(1)
            if not (usable.all() and _are_finite(logits)):
                log_first_n(logging.WARNING, _NOT_FINITE, name=__name__)
                found, boxes = Candidates(*(field[usable] for field in found)), boxes[usable]
            results = []
            for i, image_size in enumerate(images.image_sizes):
                of_image = (found.image == i).nonzero().squeeze(1)
                results.append(
                    Instances(
                        image_size,
                        pred_boxes=Boxes(boxes[of_image]),
                        scores=found.score[of_image],
                        pred_classes=found.label[of_image],
                    )
                )
            return results

    def suppress(self, candidates: Instances) -> Instances:
        """Return the best candidates of an image, best first, without those that NMS drops."""
        return candidates[
            best_boxes(
                candidates.pred_boxes.tensor,
                candidates.scores,
                candidates.pred_classes,
                self.test_nms_thresh,
                self.max_detections_per_image,
            )
        ]


def _are_finite(outputs: list[Tensor]) -> bool:
    extremes = [torch.stack(x.aminmax()) for x in outputs if x.numel()]
    return not extremes or bool(torch.stack(extremes).isfinite().all())


def _seed_of(sample: dict[str, Any]) -> int:
    """Return a sample's seed, or draw one if the sample is from another loader than ours."""
    return sample["sampling_seed"] if "sampling_seed" in sample else int(torch.randint(2**62, ()))


def precision_around(cfg: CfgNode, model: nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that makes the autocast context of a training step.

    For `FocalRetinaNet` the context does nothing, because the model enters autocast itself. Other models are
    evaluated in float32, as with detectron2's trainer.

    Raises:
        UserError: for a type that the device does not have.
    """
    dtype = None if isinstance(model, FocalRetinaNet) else configured_type(cfg)
    if dtype is None:
        return nullcontext
    return partial(torch.autocast, torch.device(cfg.MODEL.DEVICE).type, dtype=dtype)
