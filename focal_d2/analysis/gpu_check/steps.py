"""Part 6: whole steps of our trainer and of detectron2's, in turns; where a step leaves the GPU idle."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.models import build_ours, build_pair, make_batch
from focal_d2.analysis.benchmark.step import detectron2_trainer_step, trainer_step
from focal_d2.analysis.benchmark.timing import peak_bytes, take_turns
from focal_d2.analysis.gpu_check.lines import CHANNELS_LAST, FUSED, Check, Line, Measurement

_BOXES = 20
# Hardly a change of the weights, so that random ones do not diverge.
_RATE = ("SOLVER.BASE_LR", "0.00001")
_AIMS = (1.5, 2.0)  # speed beside detectron2's AMP: of large steps, and of small ones
_MEMORY_AIM = 0.6
_PROFILED = 3
_TRACE_FILE = "profile.json.gz"
_LISTED = 20
_COMPILE_SECONDS = 60.0
_Size = tuple[int, int, int]  # height, width, N


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    sizes = check.sizes.steps
    for size, aim in zip(sizes, _AIMS, strict=False):
        yield Measurement(f"step {_name(size)}", partial(_compare, check, size, aim))
    yield Measurement("profile", partial(_profile, check, sizes[0]))
    yield Measurement("TF32", partial(_compare_tf32, check, sizes[0]))
    seconds = _COMPILE_SECONDS if check.on_gpu else 0.0
    yield Measurement("torch.compile", partial(_compare_compiled, check, sizes[-1]), seconds)


def _name(size: _Size) -> str:
    return f"{size[0]} × {size[1]}, batch {size[2]}"


def _setting(check: Check, size: _Size, precision: str) -> Setting:
    height, width, batch = size
    sizes = check.sizes
    return Setting(check.device, height, batch, sizes.step_classes, _BOXES, sizes.rounds, precision, width)


def _compare(check: Check, size: _Size, aim: float) -> list[Line]:
    setting = _setting(check, size, check.sizes.fast)
    cfg = check.config(*FUSED, *CHANNELS_LAST, *_RATE)
    pair, batch = build_pair(cfg, setting), make_batch(setting)
    ours = trainer_step(cfg, pair.ours, batch, setting)
    theirs = detectron2_trainer_step(cfg, pair.detectron2, batch, setting)
    times = take_turns({"ours": ours, "detectron2": theirs}, setting)
    speed, name = times["detectron2"] / times["ours"], f"{_name(size)}, {setting.precision}"
    rates = {who: setting.batch / seconds for who, seconds in times.items()}
    lines = [
        Line(
            f"speed of a step, {name}",
            speed,
            "× detectron2's with its AMP",
            beside=f"{1000 * times['ours']:.1f} and {1000 * times['detectron2']:.1f} ms; "
            f"{rates['ours']:.0f} and {rates['detectron2']:.0f} images a second",
            aim=f"at least {aim}",
            met=speed >= aim if check.on_gpu else None,
            details=times,
        )
    ]
    peaks = [peak_bytes(step, check.device) for step in (ours, theirs)]
    ratio = peaks[0] / peaks[1]
    beside = f"{peaks[0] / 2**20:.0f} and {peaks[1] / 2**20:.0f} MiB"
    lines.append(
        Line(
            f"peak memory of a step, {name}",
            ratio,
            "× detectron2's",
            beside=beside,
            aim=f"at most {_MEMORY_AIM}",
            met=ratio <= _MEMORY_AIM if check.on_gpu else None,
            details=peaks,
        )
    )
    return lines


class Span(NamedTuple):
    """What a device did: a kernel or a copy."""

    start: float  # microseconds
    end: float
    name: str


class Gap(NamedTuple):
    """A time in which the device did nothing."""

    length: float  # microseconds
    after: str
    before: str


def find_gaps(spans: Sequence[Span]) -> list[Gap]:
    """Return the gaps between spans, which may overlap, the longest first."""
    gaps, ordered = [], sorted(spans)
    if not ordered:
        return []
    last = ordered[0]
    for span in ordered[1:]:
        if span.start > last.end:
            gaps.append(Gap(span.start - last.end, last.name, span.name))
        if span.end > last.end:
            last = span
    return sorted(gaps, reverse=True)


def _profile(check: Check, size: _Size) -> list[Line]:
    setting = _setting(check, size, check.sizes.fast)
    cfg = check.config(*FUSED, *CHANNELS_LAST, *_RATE)
    step = trainer_step(cfg, build_ours(cfg, setting), make_batch(setting), setting)
    step()  # iteration 0, which writes metrics
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * check.on_gpu]
    check.cuda.synchronize()
    with profile(activities=activities) as profiler:
        for _ in range(_PROFILED):
            step()
        check.cuda.synchronize()
    profiler.export_chrome_trace(str(check.folder / _TRACE_FILE))
    kind = DeviceType.CUDA if check.on_gpu else DeviceType.CPU
    events: list[Any] = [x for x in profiler.events() if x.device_type == kind and not x.is_user_annotation]
    spans = [Span(x.time_range.start, x.time_range.end, x.name) for x in events]
    gaps = find_gaps(spans)
    total = max(x.end for x in spans) - min(x.start for x in spans)
    idle = sum(gap.length for gap in gaps)
    times: dict[str, float] = defaultdict(float)
    for span in spans:
        times[span.name] += span.end - span.start
    kernels = sorted(times.items(), key=lambda x: x[1], reverse=True)
    longest = "; ".join(f"{gap.length:.0f} µs before {gap.before[:40]}" for gap in gaps[:3])
    return [
        Line(
            f"idle share of {_PROFILED} steps, {_name(size)}",
            100 * idle / total,
            "%",
            beside=f"{total / 1000:.1f} ms; {longest}",
            details={"gaps": gaps[:_LISTED], "kernels": kernels[:_LISTED]},
        )
    ]


def _compare_tf32(check: Check, size: _Size) -> list[Line]:
    """Compare float32 steps with and without inputs rounded to TF32."""
    setting = _setting(check, size, "fp32")
    cfg = check.config(*FUSED, *CHANNELS_LAST, *_RATE)
    step = trainer_step(cfg, build_ours(cfg, setting), make_batch(setting), setting)

    def run(allowed: bool) -> None:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
        step()

    times = take_turns({"with": partial(run, True), "without": partial(run, False)}, setting)
    beside = f"{1000 * times['with']:.1f} and {1000 * times['without']:.1f} ms"
    speed = times["without"] / times["with"]
    return [Line(f"speed with TF32, {_name(size)}, fp32", speed, "× without", beside=beside, details=times)]


def _compare_compiled(check: Check, size: _Size) -> list[Line]:
    """Compare steps with and without a compiled network. A rehearsal compiles nothing: it takes a minute."""
    setting = _setting(check, size, check.sizes.fast)
    with torch.compiler.set_stance("default" if check.on_gpu else "force_eager"):
        steps = {}
        for name, value in (("compiled", "True"), ("eager", "False")):
            cfg = check.config(*FUSED, *CHANNELS_LAST, *_RATE, "MODEL.FOCAL.COMPILE", value)
            steps[name] = trainer_step(cfg, build_ours(cfg, setting), make_batch(setting), setting)
        first = take_turns({"compiled": steps["compiled"]}, setting._replace(repeats=1))["compiled"]
        times = take_turns(steps, setting)
    beside = f"{1000 * times['compiled']:.1f} and {1000 * times['eager']:.1f} ms"
    speed = times["eager"] / times["compiled"]
    details = {**times, "first": first}
    return [Line(f"speed compiled, {_name(size)}", speed, "× eager", beside=beside, details=details)]
