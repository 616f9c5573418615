"""Part 2: the kernels against their references, then all tests that are marked gpu."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

import focal_d2
from focal_d2.analysis.benchmark import Setting
from focal_d2.analysis.benchmark.models import build_ours, draw_boxes, empty_images
from focal_d2.analysis.benchmark.setting import DTYPES
from focal_d2.analysis.gpu_check import scenes
from focal_d2.analysis.gpu_check.lines import CHANNELS_LAST, Check, Line, Measurement
from focal_d2.ops import (
    dense_focal_loss,
    dense_quality_focal_loss,
    dense_varifocal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    varifocal_loss,
)
from focal_d2.ops.common import LOSS_KERNELS, MATCHING_KERNELS, find_kernels

# Largest relative errors: of the value, and by the logits' type of the gradient.
_VALUE_ERROR = 1e-5
_GRADIENT_ERRORS = {"fp32": 1e-5, "bf16": 8e-3, "fp16": 1e-3}
_LOG_FILE = "gpu_tests.txt"
_PROCESSES = 8  # for tests; each needs a few hundred MiB of the GPU's memory
_Losses = tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any]]


def measurements(check: Check) -> Iterator[Measurement]:
    """Yield the measurements of this part."""
    yield Measurement("kernels can run", partial(_can_run, check))
    for kind in _LOSSES:
        yield Measurement(f"loss {kind}", partial(_compare_losses, check, kind))
    yield Measurement("labels of one kind", partial(_compare_odd_labels, check))
    yield Measurement("many logits", partial(_compute_many_logits, check))
    yield Measurement("matching", partial(_compare_matches, check))
    yield Measurement("tests marked gpu", partial(_run_tests, check))


def _can_run(check: Check) -> list[Line]:
    x = torch.zeros(1, device=check.device)
    lines = []
    for name in (LOSS_KERNELS, MATCHING_KERNELS):
        runs = find_kernels(name, x) is not None
        met = runs if check.on_gpu else None
        lines.append(Line(f"kernels of {name}", "run" if runs else "do not run", aim="run", met=met))
    return lines


_LOSSES: dict[str, _Losses] = {
    "focal": (dense_focal_loss, sigmoid_focal_loss, {"alpha": 0.25, "gamma": 2.0}),
    "quality focal": (dense_quality_focal_loss, quality_focal_loss, {"beta": 2.0}),
    "varifocal": (dense_varifocal_loss, varifocal_loss, {"alpha": 0.75, "gamma": 2.0}),
}


def _compare_losses(check: Check, kind: str) -> list[Line]:
    """Compare value and gradient with the reference in float64, for all types, layouts and classes."""
    sizes, lines = check.sizes, []
    for precision in sizes.precisions:
        values, gradients, cases = [], [], []
        for layout in scenes.LAYOUTS:
            for classes in sizes.kernel_classes:
                levels = scenes.make_levels(
                    sizes.kernel_images, sizes.kernel_image, classes, DTYPES[precision], layout, check.device
                )
                labels = scenes.draw_labels(levels, classes, positive=0.01, ignored=0.02)
                value, gradient = _errors(kind, levels, labels, classes)
                values.append(value)
                gradients.append(gradient)
                cases.append({"layout": layout, "classes": classes, "value": value, "gradient": gradient})
        worst, limit = max(gradients), _GRADIENT_ERRORS[precision]
        lines.append(
            Line(
                f"loss {kind}, {precision}: largest relative error of gradients",
                worst,
                beside=f"of values {max(values):.2g}",
                aim=f"{limit:.0e}; values {_VALUE_ERROR:.0e}",
                met=worst <= limit and max(values) <= _VALUE_ERROR,
                details=cases,
            )
        )
    return lines


def _errors(kind: str, levels: list[Tensor], labels: Tensor, classes: int) -> tuple[float, float]:
    """Return the relative error of the value, and that of the gradient: of norms, all levels together."""
    dense, plain, parameters = _LOSSES[kind]
    soft = [] if kind == "focal" else [torch.rand(labels.shape, device=labels.device)]
    value = dense(levels, labels, *soft, num_classes=classes, use_kernels=True, **parameters)
    gradients = torch.autograd.grad(value, levels)
    exact = [x.detach().double().requires_grad_() for x in levels]
    expected = plain(scenes.flatten(exact, classes), labels, *soft, num_classes=classes, **parameters)
    wanted = torch.autograd.grad(expected, exact)
    difference = torch.stack([(g.double() - w).norm() for g, w in zip(gradients, wanted, strict=True)]).norm()
    size = torch.stack([w.norm() for w in wanted]).norm()
    return float((value - expected).detach().abs() / expected.detach()), float(difference / size)


def _compare_odd_labels(check: Check) -> list[Line]:
    """Compare where all anchors are ignored, background or positive."""
    sizes = check.sizes
    classes = sizes.kernel_classes[0]
    levels = scenes.make_levels(
        sizes.kernel_images, sizes.kernel_image, classes, torch.float32, "NCHW", check.device
    )
    lines = []
    ignored = scenes.draw_labels(levels, classes, positive=0.0, ignored=1.0)
    value = dense_focal_loss(levels, ignored, num_classes=classes, alpha=0.25, gamma=2.0, use_kernels=True)
    largest = max(float(g.abs().max()) for g in torch.autograd.grad(value, levels))
    total = float(value.detach()) + largest
    lines.append(Line("all anchors ignored: loss and largest gradient", total, aim="0", met=total == 0))
    for name, share in (("background", 0.0), ("positive", 1.0)):
        labels = scenes.draw_labels(levels, classes, positive=share, ignored=0.0)
        error = max(_errors("focal", levels, labels, classes))
        limit = _GRADIENT_ERRORS["fp32"]
        lines.append(
            Line(f"all anchors {name}: relative error", error, aim=f"{limit:.0e}", met=error <= limit)
        )
    return lines


def _compute_many_logits(check: Check) -> list[Line]:
    """Compute the loss of a level whose offsets need 64 bits. All logits are 0, so the result is known."""
    classes, most, lines = 64, check.sizes.most_logits, []
    cells = most // classes
    for layout in scenes.LAYOUTS:
        name = f"{cells * classes:,} logits, {layout}"
        if check.cuda.mem_get_info()[0] < 7 * most:
            lines.append(Line(name, problem=f"not measured: needs {7 * most >> 30} GiB of free memory"))
            continue
        shape = (1, classes, cells, 1)
        logits = torch.zeros(shape, dtype=torch.bfloat16, device=check.device).contiguous(
            memory_format=scenes.LAYOUTS[layout]
        )
        logits.requires_grad_()
        labels = torch.full((1, cells), classes, device=check.device)
        labels[0, -1] = classes - 1
        loss = dense_focal_loss(
            [logits], labels, num_classes=classes, alpha=-1.0, gamma=0.0, use_kernels=True
        )
        (gradient,) = torch.autograd.grad(loss, [logits])
        wrong = int((gradient != 0.5).sum())  # the last anchor's class has -0.5
        error = abs(float(loss.detach()) / (cells * classes * 0.6931471805599453) - 1)
        right = wrong == 1 and float(gradient[0, -1, -1, 0]) == -0.5 and error < 1e-5
        lines.append(Line(f"{name}: relative error", error, beside=f"{wrong - 1} wrong gradients", met=right))
        del logits, gradient, loss
        check.cuda.empty_cache()
    return lines


def _compare_matches(check: Check) -> list[Line]:
    """Compare the labels of the kernels with PyTorch's, to the bit, in a batch of three images."""
    sizes = check.sizes
    height, width = sizes.timed_image
    setting = Setting(check.device, height, 1, 3, 1, 1, "fp32", width)
    model = build_ours(check.config(*CHANNELS_LAST), setting)
    anchors = model.anchors_for(empty_images(setting))
    lines = []
    for count in sizes.kernel_boxes:
        boxes = draw_boxes(setting._replace(boxes=count), torch.Generator().manual_seed(count))
        corners = Boxes(boxes.gt_boxes.tensor.round())  # with ties
        rounded = Instances(boxes.image_size, gt_boxes=corners, gt_classes=boxes.gt_classes)
        results = []
        for use_kernels in (True, False):
            model.use_kernels = use_kernels
            results.append(model.label_anchors(anchors, [boxes, rounded, boxes[:0]]))
        ours, expected = results
        different = int((ours.labels != expected.labels).sum())
        different += int((ours.matched != expected.matched)[expected.positive].sum())
        name = f"matching {count} boxes with {len(anchors.boxes)} anchors: different labels"
        lines.append(Line(name, different, aim="0", met=different == 0))
    return lines


def _run_tests(check: Check) -> list[Line]:
    """Run the tests marked gpu for the rest of the part's time."""
    if importlib.util.find_spec("pytest") is None:
        return [Line("tests marked gpu", problem="not measured: pytest is not installed")]
    if not check.on_gpu:
        with tempfile.TemporaryDirectory() as folder:
            test = Path(folder, "test_rehearsal.py")
            test.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_nothing():\n    pass\n")
            return [_test_line([test], Path(folder), check)]
    root = Path(focal_d2.__file__).parent.parent
    files = files_with_mark(root / "tests")
    if not files:
        return [Line("tests marked gpu", problem=f"not measured: {root} has no tests/")]
    return [_test_line(files, root, check)]


def files_with_mark(folder: Path) -> list[Path]:
    """Return the files of a folder with tests marked gpu. Others need packages that may be absent."""
    return sorted(
        path for path in folder.rglob("test_*.py") if "mark.gpu" in path.read_text(encoding="utf-8")
    )


def _test_line(files: list[Path], root: Path, check: Check) -> Line:
    """Run pytest on files, and return its summary."""
    log = check.folder / _LOG_FILE
    # Compiling kernels takes most of the time, and each process compiles with one core.
    parallel = check.on_gpu and importlib.util.find_spec("xdist") is not None
    command = pytest_command(files, root, processes=_PROCESSES if parallel else 1)
    # No plugins but those that are named: a machine may have many.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    seconds = max(1.0, check.seconds_left())
    with log.open("wb") as file:
        try:
            result = subprocess.run(
                command,
                cwd=root,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            problem = f"stopped after {seconds:.0f} s; {_LOG_FILE} has the output"
            return Line("tests marked gpu", problem=problem)
    return summary(log.read_text(errors="replace"), result.returncode)


def pytest_command(files: list[Path], root: Path, *, processes: int) -> list[str]:
    """Return the command that runs the tests marked gpu of some files."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "-m", "gpu", "-p", "no:cacheprovider"]
    if processes > 1:
        command += ["-p", "xdist.plugin", "-n", str(processes), "--dist", "worksteal"]
    # The options of setup.cfg need plugins.
    return [*command, "--override-ini", "addopts=", "--rootdir", str(root), *map(str, files)]


def summary(output: str, status: int) -> Line:
    """Return the line about a run of pytest from its output and its exit status."""
    last = (output.strip().splitlines() or [""])[-1]
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    passed = counts.get("passed", 0)
    if not counts:
        problem = f"pytest ended with status {status}; {_LOG_FILE} has the output"
        return Line("tests marked gpu", problem=problem)
    others = ", ".join(f"{n} {kind}" for kind, n in counts.items() if kind != "passed")
    failures = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return Line(
        "tests marked gpu: passed",
        passed,
        beside=others,
        aim="no test fails",
        met=status == 0 and passed > 0,
        details=failures,
    )
