"""The parts of the check by their numbers, in the order in which they run."""

from __future__ import annotations

from focal_d2.analysis.gpu_check.lines import Part

PARTS = {
    1: Part("Versions and the first launch", "machine", seconds=20, least=5),
    2: Part("Kernels against their references, and the tests marked gpu", "kernels", seconds=120, least=10),
    3: Part("Waits of a step for the GPU", "waits", seconds=30, least=10),
    4: Part("Training with kernels beside the reference", "parity", seconds=30, least=10),
    5: Part("Kernel times beside the limit of the memory", "kernel_times", seconds=60, least=10),
    6: Part("Steps beside detectron2's", "steps", seconds=90, least=20),
    7: Part("Inference", "inference", seconds=60, least=15),
    8: Part("Trainings of the demo", "demo", seconds=None, least=20),
}
