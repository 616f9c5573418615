"""Part 7: pictures a second, from images on the host to detections, of ours and of detectron2's, in turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial

import torch

from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.inference import prepare_for_inference, whole_inference
from focal_d2.analysis.benchmark.models import Pair, build_pair, make_batch
from focal_d2.analysis.benchmark.timing import take_turns
from focal_d2.analysis.gpu_check.lines import CHANNELS_LAST, FUSED, Check, Line, Measurement

_ASPECT = 4 / 3  # of most of COCO's images
_CLASSES = 80


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    sizes = check.sizes
    for depth in sizes.depths:
        build = cache(partial(_build, check, depth))
        for batch in sizes.inference_batches:
            for size in sizes.inference_sizes:
                setting = _setting(check, size, batch)
                name = f"R{depth}, {size} × {setting.width}, batch {batch}"
                yield Measurement(name, partial(_compare, name, setting, build))


def _setting(check: Check, size: int, batch: int) -> Setting:
    sizes = check.sizes
    return Setting(
        check.device, size, batch, _CLASSES, 1, sizes.rounds, sizes.fast, width=round(size * _ASPECT)
    )


def _build(check: Check, depth: int) -> Pair:
    setting = _setting(check, check.sizes.inference_sizes[0], 1)
    cfg = check.config(*FUSED, *CHANNELS_LAST, "MODEL.RESNETS.DEPTH", str(depth))
    pair = build_pair(cfg, setting)
    with torch.no_grad():
        prepare_for_inference(pair, make_batch(setting))
    return pair


def _compare(name: str, setting: Setting, build: Callable[[], Pair]) -> list[Line]:
    pair = build()
    with torch.no_grad():
        times = take_turns(whole_inference(pair, make_batch(setting), setting), setting)
    rates = {who: setting.batch / seconds for who, seconds in times.items()}
    beside = f"detectron2 {rates['detectron2']:.1f}: {rates['ours'] / rates['detectron2']:.2f} × as fast"
    return [Line(f"{name}, {setting.precision}", rates["ours"], "pictures/s", beside=beside, details=times)]
