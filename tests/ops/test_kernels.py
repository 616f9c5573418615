"""The Triton kernels against plain references: on a GPU, and in Triton's interpreter on the CPU.

The interpreter has to be asked for before Triton is imported. So these tests run on the CPU in a process of
their own, which `test_all_in_the_interpreter` starts; without a GPU, this process skips them.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from unittest.mock import MagicMock, Mock

import pytest
import torch
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, Instances, pairwise_iou

from focal_d2 import ops
from focal_d2.modeling import targets
from focal_d2.modeling.anchors import Anchors
from focal_d2.modeling.assigners import IoUAssigner, iou
from focal_d2.ops import common, sigmoid_focal_loss
from focal_d2.ops.losses import dense
from focal_d2.ops.matching.match import inside_regions
from tests.conftest import REPOSITORY
from tests.ops.losses.test_dense import LAYOUTS, LOSSES, flatten, make_levels, value_and_gradient
from tests.ops.matching.test_match import make_anchors, random_boxes
from tests.waits import PretendedGPU

dense_focal_loss = partial(ops.dense_focal_loss, use_kernels=True)
dense_quality_focal_loss = partial(ops.dense_quality_focal_loss, use_kernels=True)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
on_gpu = [pytest.mark.gpu, needs_gpu, needs_triton]


@pytest.fixture(params=["cpu" if INTERPRETED else pytest.param("cuda", marks=on_gpu)])
def device(request):
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Several programs for small levels, the last ones not full."""
    from focal_d2.ops.losses import dense_triton
    from focal_d2.ops.matching import match_triton

    small = {"_LOSS_TILE": 64, "_LOSS_CELLS": 8, "_LOSS_CLASSES": 4, "_SCALE_TILE": 64, "_SCALE_PROGRAMS": 2}
    for name, value in small.items():
        monkeypatch.setattr(dense_triton, name, value)
    monkeypatch.setattr(match_triton, "_MATCH_TILE", 128)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="is in the interpreter already")
@needs_triton
def test_all_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=220,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout


def label_anchors(
    images, anchors, thresholds=(0.4, 0.5), labels=(0, -1, 1), low_quality=True, regions=None, kernels=True
):
    """Labels of images with these boxes, whose classes are 0, 1, 2, 0, 1, ..."""
    return targets.label_anchors(
        Anchors(anchors, None),
        [Instances((1, 1), gt_boxes=Boxes(x), gt_classes=torch.arange(len(x)) % 3) for x in images],
        IoUAssigner(Matcher(list(thresholds), list(labels), allow_low_quality_matches=low_quality)),
        3,
        regions=regions or [None] * len(images),
        region_share=0.5,
        use_kernels=kernels,
    )


@pytest.fixture
def fresh_kernels():
    """Kernels are looked for anew, in this test and after it."""

    def forget():
        common.import_kernels.cache_clear()
        common._can_launch.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.usefixtures("fresh_kernels")
def test_without_triton_pytorch_does_it_all(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # asks for kernels on the CPU
    monkeypatch.setitem(sys.modules, "triton", None)  # importing it fails
    for name in [name for name in sys.modules if name.startswith("focal_d2.ops") and "triton" in name]:
        monkeypatch.delitem(sys.modules, name)
    labels, box = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0.0, 0, 1, 1]])
    loss = dense_focal_loss([torch.zeros(1, 1, 1, 2)], labels, num_classes=1, alpha=-1.0, gamma=0.0)
    assert loss.item() == pytest.approx(1.386294)
    assert label_anchors([box], box).labels.tolist() == [[0]]
    assert not [name for name in sys.modules if name.startswith("focal_d2.ops") and "triton" in name]


@pytest.mark.skipif(INTERPRETED, reason="is in the interpreter")
def test_on_a_cpu_there_are_no_kernels():
    assert common.find_kernels(common.LOSS_KERNELS, torch.zeros(1)) is None


def test_kernels_are_not_looked_for_unless_asked_for(monkeypatch):
    asked = []
    for module in (dense, iou):
        monkeypatch.setattr(module, "find_kernels", lambda name, _: asked.append(name))
    labels, box = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0.0, 0, 1, 1]])
    for wanted in (False, True):
        logits = [torch.zeros(1, 1, 1, 2)]
        ops.dense_focal_loss(logits, labels, num_classes=1, alpha=-1.0, gamma=0.0, use_kernels=wanted)
        label_anchors([box], box, kernels=wanted)
        assert len(asked) == 2 * wanted


@pytest.mark.skipif(INTERPRETED, reason="the interpreter launches nothing")
@needs_triton
@pytest.mark.usefixtures("fresh_kernels")
def test_a_first_launch_that_fails_is_one_warning_and_pytorchs_path(monkeypatch, caplog):
    def no_compiler(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable.")

    trial = common.import_kernels("trial_triton")
    monkeypatch.setattr(trial, "run_trial", Mock(side_effect=no_compiler))
    logits, labels = make_levels(dtype=torch.float32)
    expected = ops.dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    box = torch.tensor([[5.0, 5, 37, 37]])
    with PretendedGPU(), torch.no_grad():
        logits, labels, box = [x.to("cuda") for x in logits], labels.to("cuda"), box.to("cuda")
        for _ in range(3):
            loss = dense_focal_loss(logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
            assert common.find_kernels(common.MATCHING_KERNELS, box) is None
        assert loss.item() == expected.item()
    trial.run_trial.assert_called_once_with(torch.device("cuda:0"))
    (line,) = caplog.messages
    assert line == (
        "MODEL.FOCAL.KERNELS: a first kernel on cuda:0 failed (RuntimeError: Failed to find C compiler. "
        "Please specify via CC environment variable.), so PyTorch's operators are used instead; Triton needs "
        "a C compiler and Python's header files"
    )


def compile_for_a_gpu(module, name, signature, constants, **options):
    """PTX of a kernel for compute capability 9.0, with aligned pointers; this needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"focal_d2.ops.{module}"), name)
    types = {n: "constexpr" if n in constants else signature.get(n, "i32") for n in kernel.arg_names}
    places = {}  # of all arguments, those in tuples one by one
    for i, kind in enumerate(types.values()):
        places.update({(i, j): x for j, x in enumerate(kind)} if isinstance(kind, tuple) else {(i,): kind})
    aligned = {place: [["tt.divisibility", 16]] for place, kind in places.items() if kind.startswith("*")}
    source = ASTSource(kernel, types, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "kind, powers",
    [("focal", [2, -1]), ("focal, α a class", [2]), ("quality", [2, -1]), ("varifocal", [2])],
)
def test_loss_compiles_without_float64_and_with_wide_loads(
    kind, powers, channels_last, monkeypatch, tmp_path
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kind, per_class = kind.split(",")[0], "," in kind
    weight = "*fp32" if per_class else "fp32"
    types = {
        **dict.fromkeys(["logits", "gradients"], ("*bf16",) * 3),
        **dict.fromkeys(["first", "sizes"], ("i32",) * 3),
        **dict.fromkeys(["negative_weight", "positive_weight"], weight),
        **dict.fromkeys(["quality", "upstream", "partial"], "*fp32"),
        **{"labels": "*i64", "gamma": "fp32"},
    }
    constants = {"A": 9, "K": 20, "KIND": kind, "PER_CLASS": per_class, "CHANNELS_LAST": channels_last}
    constants |= {"TILE": 1024, "CLASSES": 10, **({"quality": None} if kind == "focal" else {})}
    for power in powers:
        ptx = compile_for_a_gpu(
            common.LOSS_KERNELS, "_loss_kernel", types, {**constants, "POWER": power}, num_warps=4
        )
        assert ".f64" not in ptx
        assert "ld.global.v4" in ptx
        assert "st.global.v4" in ptx


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
def test_scaling_compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"gradients": ("*bf16",) * 3, "sizes": ("i32",) * 3, "upstream": "*fp32", "expected": "*fp32"}
    compile_for_a_gpu(common.LOSS_KERNELS, "_rescale_kernel", types, {"TILE": 2048})


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k", [1, 3, 20, 80, 90, 1203])
def test_hardly_a_lane_computes_nothing(k, layout, monkeypatch):
    from focal_d2.ops.losses import dense_triton

    kernel = MagicMock()
    monkeypatch.setattr(dense_triton, "_loss_kernel", kernel)
    sizes = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # 800 × 1344 pixels
    levels = [
        torch.empty(2, 9 * k, h, w, device="meta").contiguous(memory_format=LAYOUTS[layout]) for h, w in sizes
    ]
    dense_triton.dense_loss(
        levels,
        levels,
        torch.empty(2, 201_600, dtype=torch.int64, device="meta"),
        None,
        torch.ones(()),
        num_classes=k,
        kind="focal",
        gamma=2.0,
        negative_weight=0.75,
        positive_weight=0.25,
    )
    ((programs,),) = (call.args[0] for call in kernel.__getitem__.call_args_list)  # one launch
    (launch,) = kernel.__getitem__.return_value.call_args_list
    tiles = 1 if layout == "channels_last" else launch.kwargs["CLASSES"]
    assert programs * tiles * launch.kwargs["TILE"] <= 1.1 * sum(x.numel() for x in levels)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@needs_triton
def test_matching_compiles_to_the_operations_it_names(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {
        **dict.fromkeys(["boxes", "regions", "anchors", "highest"], "*fp32"),
        **dict.fromkeys(["matched", "classes", "labels"], "*i64"),
        **dict.fromkeys(["first", "first_box", "first_region"], "*i32"),
        **{"positive": "*i1", "share": "fp32"},
    }
    rules = {"THRESHOLDS": (0.4, 0.5), "LABELS": (0, -1, 1)}
    for name, best, constants in (("_match_kernel", "*i32", {}), ("_label_kernel", "*fp32", rules)):
        constants = {**constants, "BEST": True, "TILE": 512}
        ptx = compile_for_a_gpu(
            common.MATCHING_KERNELS, name, {**types, "best": best}, constants, enable_fp_fusion=False
        )
        assert "div.rn.f32" in ptx
        assert "fma" not in ptx
        assert ".ftz" not in ptx


def on(device, logits):
    """Copies that want gradients."""
    return [x.detach().to(device).requires_grad_() for x in logits]


def in_float64(loss, logits, labels, *soft, num_classes, **more):
    """Value and gradients of a reference."""
    logits = [x.detach().double().requires_grad_() for x in logits]
    total = loss(flatten(logits, num_classes), labels, *soft, num_classes=num_classes, **more)
    return value_and_gradient(total, logits)


# The interpreter cuts off digits for bfloat16, where a GPU rounds.
ROUNDING = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def assert_close(got, expected, **tolerance):
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g.cpu().double(), e, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("small_tiles")
def test_loss_is_the_reference(name, layout, dtype, device):
    dense, plain, draw = LOSSES[name]
    # Rows that start at multiples of 8 elements, and others; full tiles, and others; a level of one cell.
    for n, a, k, sizes in (
        (2, 1, 5, [(4, 4), (3, 3), (1, 1)]),
        (1, 2, 3, [(5, 1)]),
        (1, 1, 1, [(1, 7), (8, 1)]),
    ):
        logits, labels = make_levels(n, a, k, sizes, dtype=dtype, layout=layout)
        more = draw(k)
        soft = []
        if "quality" in name or "varifocal" in name:
            soft = [(torch.rand(labels.shape) * 1.4 - 0.2).clamp(0, 1)]
        expected = in_float64(plain, logits, labels, *soft, num_classes=k, **more)
        more = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in more.items()}
        inputs = on(device, logits)
        soft = [x.to(device) for x in soft]
        loss = dense(inputs, labels.to(device), *soft, num_classes=k, **more, use_kernels=True)
        got = value_and_gradient(loss, inputs)
        assert got[0].dtype == torch.float32
        assert_close(got[:1], expected[:1], rtol=2e-6, atol=1e-6)
        for gradient, x in zip(got[1:], inputs, strict=True):
            assert (gradient.dtype, gradient.stride()) == (dtype, x.stride())
        assert_close(got[1:], expected[1:], rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.usefixtures("small_tiles")
def test_levels_of_several_layouts(device):
    logits, labels = make_levels(sizes=[(4, 6), (3, 5), (1, 1)], dtype=torch.float32)
    expected = in_float64(sigmoid_focal_loss, logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    inputs = on(device, logits)
    inputs[1] = inputs[1].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    loss = dense_focal_loss(inputs, labels.to(device), num_classes=4, alpha=0.25, gamma=2.0)
    assert_close(value_and_gradient(loss, inputs), expected, rtol=5e-6, atol=1e-7)


@pytest.fixture
def launches(monkeypatch):
    """A list of the kernels that are launched, by name."""
    from focal_d2.ops.losses import dense_triton
    from focal_d2.ops.matching import match_triton

    names = []
    for module in (dense_triton, match_triton):
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                noted = MagicMock()
                noted.__getitem__.side_effect = lambda grid, n=name, k=kernel: names.append(n) or k[grid]
                monkeypatch.setattr(module, name, noted)
    return names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_launch_forward_and_one_backward(layout, device, launches):
    logits, labels = make_levels(
        1, 1, 2, [(4, 4), (2, 2), (1, 1), (1, 0)], dtype=torch.float32, layout=layout
    )
    inputs = on(device, logits)
    loss = dense_focal_loss(inputs, labels.to(device), num_classes=2, alpha=0.25, gamma=2.0)
    assert launches == ["_loss_kernel"]
    loss.backward()
    assert launches == ["_loss_kernel", "_rescale_kernel"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_backward_touches_nothing_if_its_gradient_was_expected(dtype, layout, device, monkeypatch):
    from focal_d2.ops.losses import dense_triton

    logits, labels = make_levels(1, 2, 3, [(5, 4), (2, 2)], dtype=dtype, layout=layout)
    inputs, labels_there = on(device, logits), labels.to(device)
    expected = in_float64(sigmoid_focal_loss, logits, labels, num_classes=3, alpha=0.25, gamma=2.0)
    normalizer = torch.tensor(7.0, device=device)
    upstream = 1024.0 / normalizer

    def gradients(factor):
        loss = dense_focal_loss(inputs, labels_there, num_classes=3, alpha=0.25, gamma=2.0, upstream=upstream)
        return torch.autograd.grad(loss / normalizer * factor, inputs)

    for factor in (1024.0, 3.0):  # as expected, and another
        wanted = [factor / 7 * x for x in expected[1:]]
        assert_close(gradients(factor), wanted, rtol=2 * ROUNDING[dtype], atol=factor * 1e-6)
    rescale = dense_triton.rescale

    def fill_first(written, *arguments):
        for x in written:
            x.fill_(7)
        rescale(written, *arguments)

    monkeypatch.setattr(dense_triton, "rescale", fill_first)
    assert all((x == 7).all() for x in gradients(1024.0))
    assert all((x == 14).all() for x in gradients(2048.0))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.25, 1.0, "a class"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.7])
def test_special_parameters(alpha, gamma, layout, device):
    logits, labels = make_levels(1, 2, 4, [(5, 6)], dtype=torch.float32, layout=layout)
    alpha = torch.tensor([0.0, 1.0, 0.3, 0.9]) if alpha == "a class" else alpha
    expected = in_float64(sigmoid_focal_loss, logits, labels, num_classes=4, alpha=alpha, gamma=gamma)
    inputs = on(device, logits)
    alpha = alpha.to(device) if isinstance(alpha, torch.Tensor) else alpha
    loss = dense_focal_loss(inputs, labels.to(device), num_classes=4, alpha=alpha, gamma=gamma)
    assert_close(value_and_gradient(loss, inputs), expected, rtol=5e-6, atol=1e-9)


EXTREMES = [-1e4, -88.0, -17.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 17.0, 88.0, 1e4]


@pytest.mark.parametrize("focus", [0.0, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("kind", ["focal", "quality", "varifocal"])
def test_terms_are_precise_for_any_logit(kind, focus, device):
    from tests.ops.term_kernel import terms

    # Background, and positives of several qualities.
    cases = [(x, q) for x in EXTREMES for q in (None, 0.0, 1e-3, 0.3, 0.999, 1.0)]
    x = torch.tensor([x for x, _ in cases])
    is_class = torch.tensor([q is not None for _, q in cases])
    quality = torch.tensor([q or 0.0 for _, q in cases])
    got = terms(
        x.to(device), is_class.to(device), quality.to(device), kind=kind, gamma=focus, alpha=0.75
    ).cpu()
    x = x.double().requires_grad_()
    arguments = {"num_classes": 1, "reduction": "none"}
    labels = (~is_class).long()
    if kind == "focal":
        value = sigmoid_focal_loss(x[:, None], labels, alpha=0.75, gamma=focus, **arguments)
    elif kind == "quality":
        value = ops.quality_focal_loss(x[:, None], labels, quality, beta=focus, **arguments)
    else:
        value = ops.varifocal_loss(x[:, None], labels, quality, alpha=0.75, gamma=focus, **arguments)
    (slope,) = torch.autograd.grad(value.sum(), x)
    # A GPU's exponential is as far off as if the last bit of x had changed.
    error = 3e-6 + (0 if INTERPRETED else 1.2e-7) * x.detach().abs().clamp(max=88) * (1 + focus)
    for g, e in zip(got.double(), (value.detach().squeeze(1), slope), strict=True):
        assert ((g - e).abs() <= error * e.abs() + 1e-30).all()


def test_ignored_anchors_are_silent_whatever_their_logits(device):
    logits, labels = make_levels(1, dtype=torch.float32)
    labels.fill_(-1)
    with torch.no_grad():
        logits[0].fill_(float("nan"))
    inputs = on(device, logits)
    loss = dense_focal_loss(inputs, labels.to(device), num_classes=4, alpha=0.25, gamma=2.0)
    for y in value_and_gradient(loss, inputs):
        assert (y == 0).all()


def test_a_nan_that_counts_is_seen(device):
    logits, labels = make_levels(1, dtype=torch.float32)
    labels.fill_(4)
    with torch.no_grad():
        logits[0][0, 0, 0, 0] = float("nan")
    loss = dense_focal_loss(on(device, logits), labels.to(device), num_classes=4, alpha=0.25, gamma=2.0)
    assert loss.isnan()


@pytest.mark.parametrize("n, sizes", [(0, [(3, 2)]), (2, [(0, 3)]), (2, [(3, 2), (0, 3), (1, 1)])])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_sum(n, sizes, layout, device):
    logits, labels = make_levels(n, sizes=sizes, dtype=torch.float32, layout=layout)
    expected = in_float64(sigmoid_focal_loss, logits, labels, num_classes=4, alpha=0.25, gamma=2.0)
    inputs = on(device, logits)
    loss = dense_focal_loss(inputs, labels.to(device), num_classes=4, alpha=0.25, gamma=2.0)
    assert_close(value_and_gradient(loss, inputs), expected, rtol=5e-6, atol=1e-9)


def test_gradient_only_where_wanted(device):
    logits, labels = make_levels(1, dtype=torch.float32)
    more = {"num_classes": 4, "beta": 2.0}
    labels, quality = labels.to(device), torch.rand(labels.shape, device=device)
    inputs = on(device, logits)
    expected = value_and_gradient(dense_quality_focal_loss(inputs, labels, quality, **more), inputs)
    inputs[0].requires_grad_(False)
    loss = dense_quality_focal_loss(inputs, labels, quality, **more)
    (2 * loss).backward()
    assert inputs[0].grad is None
    assert torch.equal(inputs[1].grad, 2 * expected[2])
    with torch.no_grad():
        assert torch.equal(dense_quality_focal_loss(inputs, labels, quality, **more), expected[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_sum_does_not_depend_on_the_run(layout, device):
    logits, labels = make_levels(1, sizes=((8, 12), (5, 5)), dtype=torch.float32, layout=layout)
    inputs, labels = on(device, logits), labels.to(device)
    losses = [dense_focal_loss(inputs, labels, num_classes=4, alpha=0.25, gamma=2.0) for _ in range(3)]
    assert len({loss.item() for loss in losses}) == 1


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_than_2_to_the_31_logits(layout):
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GiB of GPU memory")
    k, cells = 64, (1 << 25) + 8
    logits = torch.zeros(1, 1, cells, k, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    logits = logits.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    labels = torch.full((1, cells), k, device="cuda")
    labels[0, -1] = k - 1
    loss = dense_focal_loss([logits], labels, num_classes=k, alpha=-1.0, gamma=0.0)
    loss.backward()
    assert loss.item() == pytest.approx(k * cells * 0.69314718, rel=1e-5)
    assert logits.grad[0, -1, 0, -1] == -0.5
    logits.grad[0, -1, 0, -1] = 0.5
    assert (logits.grad == 0.5).all()


def assert_labelled(images, anchors, device, *rules, low_quality=True, regions=None):
    got = label_anchors(images, anchors.to(device), *rules, low_quality=low_quality, regions=regions)
    thresholds, labels = rules or ((0.4, 0.5), (0, -1, 1))
    matcher = Matcher(list(thresholds), list(labels), allow_low_quality_matches=low_quality)
    first = 0
    for i, boxes in enumerate(images):
        expected = torch.full((len(anchors),), 3)
        if regions and regions[i] is not None:
            expected[inside_regions(anchors, regions[i], share=0.5)] = -1
        outcome = torch.zeros(len(anchors))
        if len(boxes):
            matched, outcome = matcher(pairwise_iou(Boxes(boxes), Boxes(anchors)))
            assert torch.equal(got.matched[i].cpu(), matched + first)
            expected[outcome == -1] = -1
            expected[outcome == 1] = matched[outcome == 1] % 3
        assert torch.equal(got.labels[i].cpu(), expected)
        assert torch.equal(got.positive[i].cpu(), outcome == 1)
        first += len(boxes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("small_tiles")
def test_labels_are_detectron2s(seed, device):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(16, 60, (2,), generator=generator).tolist()
    anchors, _ = make_anchors(height, width, offset=0.5 * (seed % 2))
    # Boxes of all sizes, none, tiny ones, and some larger than the image.
    images = [
        random_boxes(count, height, width, low, high, generator)
        for low, high, count in ((4, 100, 5), (4, 8, 0), (1, 8, 4), (300, 3000, 3))
    ]
    if seed % 2 == 0:
        images = [torch.cat([x.round(), x[:2].round()]) for x in images]  # ties, and identical boxes
    regions = [None, random_boxes(2, height, width, 20, 60, generator), torch.zeros(0, 4), images[3]]
    assert_labelled(images, anchors, device, low_quality=seed % 4 < 3, regions=regions)


ODD_BOXES = [
    [[-16, -16, 16, 16], [-16, -16, 16, 16]],  # an anchor, twice
    [[20.5, 20.5, 20.51, 20.52]],
    [[-5000, -5000, -4000, -4000]],  # overlaps nothing: every anchor is its best
    [[10, 10, 60, 60], [9000, 10, 9100, 60]],
    [[5, 5, 5, 5]],  # no area
    [[5, 5, 37, 37], [5, 5, 37, 37], [4, 4, 36, 36]],
    [[float("nan"), 5, 37, 37], [5, 5, 37, 37]],
    [[5, 5, float("inf"), 37], [5, 5, 37, 37]],
]


@pytest.mark.parametrize("low_quality", [True, False])
def test_labels_of_odd_boxes(low_quality, device):
    anchors, _ = make_anchors(40, 50)
    images = [torch.tensor(boxes, dtype=torch.float32) for boxes in ODD_BOXES]
    assert_labelled(images, anchors, device, low_quality=low_quality)


@pytest.mark.parametrize(
    "thresholds, labels",
    [((0.3, 0.7), (0, -1, 1)), ((0.5,), (0, 1)), ((0.2, 0.5), (1, -1, 0)), ((0.1, 0.2, 0.6), (-1, 0, -1, 1))],
)
def test_labels_with_other_thresholds(thresholds, labels, device):
    generator = torch.Generator().manual_seed(0)
    anchors, _ = make_anchors(40, 50)
    images = [random_boxes(6, 40, 50, 8, 100, generator), torch.zeros(0, 4)]
    assert_labelled(images, anchors, device, thresholds, labels)


def test_no_anchors_have_no_labels(device):
    got = label_anchors([torch.tensor([[0.0, 0, 1, 1]])], torch.zeros(0, 4, device=device))
    assert got.labels.shape == got.positive.shape == got.matched.shape == (1, 0)


@needs_triton
def test_a_batch_is_labelled_in_two_launches_however_many_images(monkeypatch):
    from focal_d2.ops.matching import match_triton

    kernels = {name: MagicMock() for name in ("_match_kernel", "_label_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(match_triton, name, kernel)
    monkeypatch.setattr(iou, "find_kernels", lambda *_: match_triton)
    monkeypatch.setattr(targets, "_count", Mock())
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    counts = []
    for images in (1, 16):
        with PretendedGPU() as gpu:
            anchors = torch.rand(100, 4).to("cuda")
            gpu.clear()
            label_anchors([torch.tensor([[2.0, 3, 18, 20]])] * images, anchors)
            assert not gpu.waits
            counts.append(gpu.operations.total())
    assert counts[0] == counts[1] <= 20
    assert all(kernel.__getitem__.return_value.call_count == 2 for kernel in kernels.values())


@pytest.mark.skipif(not INTERPRETED, reason="a GPU's kernels can't be looked into")
def test_ious_are_computed_only_where_a_box_overlaps_a_tile(monkeypatch):
    from focal_d2.ops.matching import match_triton

    computed = []
    iou = match_triton._iou
    monkeypatch.setattr(match_triton, "_MATCH_TILE", 16)
    monkeypatch.setattr(match_triton, "_iou", lambda *corners: computed.append(1) or iou(*corners))
    left = torch.arange(64.0)[:, None] * 10
    anchors = torch.cat([left, left * 0, left + 10, left * 0 + 10], dim=1)  # a row, in four tiles
    boxes = torch.tensor([[5.0, 2, 12, 9], [155, 1, 165, 8], [320, 20, 330, 30]])  # in 1, 2 and 0 tiles
    assert_labelled([boxes], anchors, "cpu", low_quality=False)
    assert len(computed) == 3


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_labels_of_large_scenes():
    generator = torch.Generator().manual_seed(0)
    anchors, _ = make_anchors(800, 1344)
    boxes = random_boxes(200, 800, 1344, 4, 800, generator)
    assert_labelled([boxes, boxes.round(), boxes[:7]], anchors, "cuda")


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_gpu(layout):
    logits, labels = make_levels(dtype=torch.bfloat16, layout=layout)
    inputs, labels = on("cuda", logits), labels.cuda()
    quality, alpha = torch.rand(labels.shape, device="cuda"), torch.rand(4, device="cuda")
    anchors = make_anchors(64, 96)[0].cuda()
    boxes = torch.tensor([[5.0, 5, 37, 37], [-500, 0, -400, 10]])
    for mode in ("default", "error"):  # first, kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for x in (alpha, 0.25):
                dense_focal_loss(inputs, labels, num_classes=4, alpha=x, gamma=2.0).backward()
            dense_quality_focal_loss(inputs, labels, quality, num_classes=4, beta=2.0).backward()
            label_anchors([boxes, boxes[:0], boxes], anchors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
