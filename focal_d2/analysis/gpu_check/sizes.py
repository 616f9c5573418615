"""The sizes of all measurements: on a GPU, and small ones for rehearsals on a CPU."""

from __future__ import annotations

from typing import NamedTuple


class Sizes(NamedTuple):
    """The sizes of the parts; (height, width) are pixels, K classes, M boxes in an image."""

    # The detectors that are built.
    config: str
    overrides: tuple[str, ...]
    precisions: tuple[str, ...]  # of `benchmark.PRECISIONS`
    fast: str  # the one for training
    # Part 2: images, their size, K and M; and the logits of the largest level.
    kernel_images: int
    kernel_image: tuple[int, int]
    kernel_classes: tuple[int, ...]
    kernel_boxes: tuple[int, ...]
    most_logits: int
    # Parts 3 and 4; the losses of part 3 are classification and box losses, None: all.
    waits_losses: tuple[str, ...] | None
    waits_size: int
    parity_size: int
    parity_batch: int
    # Part 5: (N, K) of losses; the image and N of matching; bytes of the copy; calls in a row, and rounds.
    timed_image: tuple[int, int]
    timed_losses: tuple[tuple[int, int], ...]
    timed_batch: int
    copied_bytes: int
    calls: int
    rounds: int
    # Part 6: (height, width, N) of steps.
    steps: tuple[tuple[int, int, int], ...]
    step_classes: int
    # Part 7.
    depths: tuple[int, ...]
    inference_sizes: tuple[int, ...]
    inference_batches: tuple[int, ...]
    # Part 8: iterations of the short trainings, of their first part, and of the demo; None: the config's.
    iterations: int
    stopped_after: int
    demo_iterations: int | None


GPU = Sizes(
    config="focal_retinanet_R_50_FPN_1x.yaml",
    overrides=(),
    precisions=("fp32", "bf16", "fp16"),
    fast="bf16",
    kernel_images=2,
    kernel_image=(256, 320),
    kernel_classes=(1, 20, 80, 1203),
    kernel_boxes=(1, 7, 100, 1000),
    most_logits=2**31 + 2**13,
    waits_losses=None,
    waits_size=256,
    parity_size=512,
    parity_batch=4,
    timed_image=(800, 1344),
    timed_losses=((16, 80), (2, 1203)),
    timed_batch=16,
    copied_bytes=1 << 30,
    calls=10,
    rounds=5,
    steps=((800, 1344, 16), (512, 512, 2)),
    step_classes=80,
    depths=(50, 101),
    inference_sizes=(400, 500, 600, 700, 800),
    inference_batches=(1, 16),
    iterations=20,
    stopped_after=10,
    demo_iterations=None,
)

REHEARSAL = Sizes(
    config="focal_retinanet_R_50_FPN_1x.yaml",
    overrides=(
        # Thin, but deep: random weights of shallow networks diverge under frozen norms.
        *("MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
        *("MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
        *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.RETINANET.NUM_CONVS", "1"),
    ),
    # Convolutions in bfloat16 are wrong on some CPUs; none has float16.
    precisions=("fp32",),
    fast="fp32",
    kernel_images=2,
    kernel_image=(64, 64),
    kernel_classes=(3,),
    kernel_boxes=(5,),
    most_logits=1 << 13,
    waits_losses=("ohem", "giou"),
    waits_size=64,
    parity_size=64,
    parity_batch=2,
    timed_image=(64, 64),
    timed_losses=((1, 3),),
    timed_batch=1,
    copied_bytes=1 << 16,
    calls=1,
    rounds=1,
    steps=((64, 64, 1),),
    step_classes=3,
    depths=(50,),
    inference_sizes=(64,),
    inference_batches=(1,),
    iterations=4,  # detectron2 times the fourth one first
    stopped_after=2,
    demo_iterations=4,
)
