"""The base class of classification losses, their input, and their registry.

A loss is a module that turns a batch's raw head outputs and labels into one number. It also defines the
logits: how many an anchor has, what they mean, and their initial values. `docs/losses.md` shows how to add a
loss in a separate file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from focal_d2.config import check_choice
from focal_d2.errors import UserError
from focal_d2.ops import paired_iou
from focal_d2.ops.common import divide, prepare_targets


class DenseBatch(NamedTuple):
    """The input of a classification loss. C is the number of logits an anchor: K, or K + 1 with softmax."""

    logits: list[Tensor]  # L × (N, A·C, H, W), as the head returns them
    num_logits: int  # C
    labels: Tensor  # (N, R) int64: [0, K) a class, K background, -1 ignored
    positive: Tensor  # (N, R) bool
    image: Tensor  # (P,) int64: the image of each positive, in the order of positive.nonzero(); see `valid`
    anchor: Tensor  # (P,) int64: its anchor, over all levels
    gt_boxes: Tensor  # (P, 4) XYXY, the boxes that the positives are matched to
    deltas: list[Tensor]  # L × (N, A·4, H, W), as the head returns them
    anchors: Tensor  # (R, 4) XYXY
    decode: Callable[[Tensor, Tensor], Tensor]  # (deltas (E, 4), anchors (E, 4)) -> boxes (E, 4) XYXY
    seeds: Sequence[int] = ()  # N, of each image, for losses that sample; empty for others
    sizes: Sequence[tuple[int, int]] = ()  # N × (height, width) before padding; empty: not known
    upstream: Tensor | None = None  # scalar: the gradient that the loss will get in backward, if known
    # (P,) bool: the rows of image, anchor and gt_boxes that are positives; None: all. Only losses with
    # `fixed_shapes` get other rows, and these come last.
    valid: Tensor | None = None

    def levels(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (N, H·W·A, C) logits and (N, H·W·A) labels of one level after another."""
        for x, start, stop in level_ranges(self.logits, self.num_logits):
            # detectron2's permute_to_N_HWA_K fails for N = 0.
            anchors = x.unflatten(1, (-1, self.num_logits)).permute(0, 3, 4, 1, 2).flatten(1, 3)
            yield anchors, self.labels[:, start:stop]

    def in_parts(self, *, pairs: int) -> Iterator[DenseBatch]:
        """Yield batches of consecutive images with at most so many pairs of an anchor and a logit.

        A batch has at least one image. The host waits for a GPU once, for the positives of each image.
        """
        images = max(1, pairs // max(1, self.labels.shape[1] * self.num_logits))
        numbers, done = self.positive.sum(1).tolist(), 0
        for first in range(0, len(numbers), images):
            part = slice(first, first + images)
            positives = slice(done, done + sum(numbers[part]))
            done = positives.stop
            yield self._replace(
                logits=[x[part] for x in self.logits],
                labels=self.labels[part],
                positive=self.positive[part],
                image=self.image[positives] - first,
                anchor=self.anchor[positives],
                gt_boxes=self.gt_boxes[positives],
                deltas=[x[part] for x in self.deltas],
                seeds=self.seeds[part],
                sizes=self.sizes[part],
                valid=None,  # rows that are no positives belong to no image
            )

    def positions(self) -> Tensor:
        """Return a number (R,) int64 that encodes each anchor's level, row, column and shape.

        Unlike the anchor's index, it does not depend on the size that the images are padded to.
        """
        parts = []
        for level, (x, start, stop) in enumerate(level_ranges(self.logits, self.num_logits)):
            index = torch.arange(stop - start, device=self.labels.device)
            cell, index_in_cell = divide(index, x.shape[1] // self.num_logits)
            row, column = divide(cell, max(1, x.shape[3]))
            parts.append((((level << 20) + row << 20) + column << 16) + index_in_cell)
        return torch.cat(parts)

    def inside(self, image: int) -> Tensor:
        """Return which anchors' centres are in the image, not in its padding: (R,) bool; all if unknown."""
        if not self.sizes:
            return torch.ones_like(self.positive[image])
        height, width = self.sizes[image]
        centre = (self.anchors[:, :2] + self.anchors[:, 2:]) / 2
        # Centres are at multiples of half a pixel, up to rounding; a centre on the edge is in the padding.
        return (centre[:, 0] < width - 0.25) & (centre[:, 1] < height - 0.25)

    def split(self, values: Tensor) -> list[Tensor]:
        """Split values of all anchors (N, R, ...) by level: L × (N, H·W·A, ...)."""
        return [values[:, start:stop] for _, start, stop in level_ranges(self.logits, self.num_logits)]

    def all_logits(self) -> Tensor:
        """Return all levels' logits, (N, R, C)."""
        return torch.cat([logits for logits, _ in self.levels()], dim=1)

    def predicted_boxes(self, image: int, anchors: Tensor) -> Tensor:
        """Return the boxes (E, 4) that anchors (E,) of an image predict, without gradient."""
        images = torch.full_like(anchors, image)
        return self.decode(gather_deltas(self.deltas, images, anchors).detach(), self.anchors[anchors])

    def quality(self) -> Tensor:
        """Return the IoU (N, R) of predicted and matched boxes, 0 elsewhere, without gradient."""
        deltas = gather_deltas(self.deltas, self.image, self.anchor).detach()
        boxes = self.decode(deltas, self.anchors[self.anchor])
        index = self.image * self.labels.shape[1] + self.anchor
        if self.valid is not None:  # other rows are written to an element at the end
            index = torch.where(self.valid, index, self.labels.numel())
        quality = self.anchors.new_zeros(self.labels.numel() + 1)
        quality[index] = paired_iou(boxes, self.gt_boxes)
        return quality[:-1].view(self.labels.shape)

    def without_padding(self) -> DenseBatch:
        """Return the batch with positives only; see `valid`. The host waits for a GPU."""
        if self.valid is None:
            return self
        image, anchor, gt_boxes = (x[self.valid] for x in (self.image, self.anchor, self.gt_boxes))
        return self._replace(image=image, anchor=anchor, gt_boxes=gt_boxes, valid=None)


def gather_deltas(deltas: list[Tensor], image: Tensor, anchor: Tensor) -> Tensor:
    """Read the deltas of E anchors from the head's output.

    Args:
        deltas: L × (N, A·4, H, W).
        image: (E,) index of the image.
        anchor: (E,) index of the anchor, over all levels.

    Returns:
        (E, 4) float32, or float64 for float64 deltas.
    """
    gathered = None
    for x, start, stop in level_ranges(deltas, 4):
        if stop == start:
            continue
        # Index every level with every anchor and select the right one afterwards: splitting first needs
        # counts, which a GPU would have to wait for.
        level = level_deltas(x, image, (anchor - start).remainder(stop - start))
        in_level = ((anchor >= start) & (anchor < stop)).unsqueeze(1)
        gathered = torch.where(in_level, level, 0.0 if gathered is None else gathered)
    if gathered is None:
        gathered = torch.cat([x.flatten() for x in deltas]).view(0, 4)
    return gathered if gathered.dtype == torch.float64 else gathered.float()


def level_deltas(deltas: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
    """Read the deltas (E, 4) of anchors (E,) of a level (N, A·4, H, W), of images (E,)."""
    level = deltas.unflatten(1, (-1, 4))  # (N, A, 4, H, W)
    cell, a = divide(anchor, level.shape[1])
    row, column = divide(cell, level.shape[4])
    return level[image, a, :, row, column]


def level_ranges(outputs: list[Tensor], per_anchor: int) -> Iterator[tuple[Tensor, int, int]]:
    """Yield each level's (N, A·C, H, W) of L, C being `per_anchor`, and its anchors' range [start, stop)."""
    start = 0
    for x in outputs:
        stop = start + x.shape[1:].numel() // per_anchor
        yield x, start, stop
        start = stop


class ClassificationLoss(nn.Module):
    """Base of the classification losses: sigmoid over K classes unless a subclass says otherwise.

    `forward(batch: DenseBatch)` returns a scalar. It is divided by the positive anchors' number
    (`MODEL.FOCAL.LOSS.NORMALIZER`) unless `divided_by_positives` is false. A loss with a one-pass
    implementation sets `has_fused`, and `use_fused` says when to use it.
    """

    divided_by_positives = True
    samples = False  # whether it draws random numbers; then the batch has a seed for each image
    # Whether it takes batches with padded positives (`DenseBatch.valid`) and has no shape that depends on
    # values, except for the one-pass implementation on a CPU.
    fixed_shapes = False
    has_fused = False
    implementation = "reference"
    use_kernels = False  # of the one-pass implementation, on a GPU

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    @property
    def num_logits(self) -> int:
        """Logits an anchor."""
        return self.num_classes

    def use_fused(self, batch: DenseBatch) -> bool:
        """Whether `MODEL.FOCAL.LOSS.IMPLEMENTATION` asks for the one-pass implementation."""
        if self.implementation == "auto":
            # Not measured on a GPU yet.
            return self.has_fused and batch.labels.device.type == "cpu"
        return self.implementation == "fused"

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the K classes' probabilities (..., K) of logits (..., C)."""
        return logits.sigmoid()

    def correctness(self, batch: DenseBatch) -> Iterator[Tensor]:
        """Yield how correct the model is on each example: 1 - |y - p|, level by level, (N, r, E).

        The examples are pairs of anchor and class, E = K, with target y: 1 for an anchor's class, else 0.
        This is the paper's p_t (eq. 2). A loss with other examples (E = 1: anchors) or targets overrides it.
        """
        for logits, labels in batch.levels():
            x, is_class, _ = prepare_targets(
                logits, labels, num_classes=self.num_classes, num_logits=self.num_logits
            )
            probs = self.probabilities(x)
            yield torch.where(is_class[..., : self.num_classes], probs, 1 - probs)

    def example_losses(self, batch: DenseBatch) -> Iterator[Tensor] | None:
        """Yield the part of the loss of each example of `correctness`, level by level, (N, r, E).

        It is read after `forward`, for metrics and without gradient, and must not change the loss's buffers.
        A factor that all examples share may be left out. None: the loss is not a sum over examples.
        """
        return None

    def least_logit(self, score: float) -> float | None:
        """Return a lower bound on the logits of all scores above `score` (in [0, 1]), rounding included.

        None if there is no such bound, because a subclass has other `probabilities`.
        """
        if type(self).probabilities is not ClassificationLoss.probabilities:
            return None
        if not 0 < score < 1:
            return math.copysign(math.inf, score - 0.5)
        return math.log(score / (1 - score)) - 1e-3

    def prior_bias(self, prior: float) -> Tensor:
        """Return the logits (C,) of an anchor whose classes have the prior π (paper, section 3.3)."""
        return torch.full((self.num_classes,), -math.log((1 - prior) / prior))


LOSSES: dict[str, type[ClassificationLoss]] = {}
_Loss = TypeVar("_Loss", bound=type[ClassificationLoss])


def register_loss(name: str) -> Callable[[_Loss], _Loss]:
    """Make a `ClassificationLoss` available as `MODEL.FOCAL.LOSS.NAME`.

    Its constructor's keyword arguments, besides num_classes, are its parameters, in capitals in YAML.

    Raises:
        ValueError: if the name is taken.
    """

    def register(loss: _Loss) -> _Loss:
        if LOSSES.setdefault(name, loss) is not loss:
            raise ValueError(f'a loss named "{name}" is registered already')
        return loss

    return register


def parameter_names(loss: type[ClassificationLoss]) -> list[str]:
    """Return the names that YAML uses for the parameters of a loss, sorted."""
    names = [name.upper() for name in inspect.signature(loss.__init__).parameters]
    return sorted(set(names) - {"SELF", "NUM_CLASSES"})


IMPLEMENTATIONS = ("auto", "reference", "fused")


def build_loss(
    name: str, *, num_classes: int, parameters: dict[str, Any], implementation: str, use_kernels: bool
) -> ClassificationLoss:
    """Build the loss that YAML names.

    Args:
        name: one of `LOSSES`.
        num_classes: K.
        parameters: what YAML sets, by the names it uses there.
        implementation: one of `IMPLEMENTATIONS`.
        use_kernels: whether `MODEL.FOCAL.KERNELS` asks for Triton kernels on a GPU.

    Raises:
        UserError: for an unknown name, a parameter that this loss does not read, or an implementation that
            it does not have.
    """
    check_choice("MODEL.FOCAL.LOSS.NAME", name, sorted(LOSSES))
    reads = parameter_names(LOSSES[name])
    for parameter in sorted(set(parameters) - set(reads)):
        raise UserError(
            f"MODEL.FOCAL.LOSS.{parameter} is set, but the loss {name} does not read it; "
            f"it reads {', '.join(reads) or 'no parameters'}"
        )
    check_choice("MODEL.FOCAL.LOSS.IMPLEMENTATION", implementation, IMPLEMENTATIONS)
    if implementation == "fused" and not LOSSES[name].has_fused:
        fused = ", ".join(sorted(key for key, loss in LOSSES.items() if loss.has_fused))
        raise UserError(
            f"MODEL.FOCAL.LOSS.IMPLEMENTATION is fused, but {name} has no such implementation; these have "
            f"one: {fused}"
        )
    arguments = {key.lower(): value for key, value in parameters.items()}
    try:
        loss = LOSSES[name](num_classes=num_classes, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"MODEL.FOCAL.LOSS ({name}): {error}") from error
    loss.implementation, loss.use_kernels = implementation, use_kernels
    return loss
