from __future__ import annotations

import json

import cv2
import pytest
import torch

from focal_d2.analysis import benchmark
from focal_d2.analysis.benchmark import cuda, memory, sweep, timing
from focal_d2.commands.benchmark import BENCHMARKS, PRECISIONS
from tests.conftest import make_cfg, runs_bfloat16
from tests.engine.runs import run_command

SMALL = [
    "MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "32",
    "MODEL.RETINANET.NUM_CONVS", "1",
]  # fmt: skip


def run(monkeypatch, capsys, *argv):
    # It would stay so for the whole process.
    monkeypatch.setattr(benchmark, "keep_memory", lambda: True)
    return run_command(monkeypatch, "benchmark", *argv), *capsys.readouterr()


def test_command_lists_every_benchmark():
    assert list(BENCHMARKS) == list(benchmark.BENCHMARKS)
    assert PRECISIONS == benchmark.PRECISIONS


def options(*more):
    return ["--device", "cpu", "--size", 64, "--batch", 1, "--classes", 3, "--repeats", 1, *more, *SMALL]


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=runs_bfloat16)])
@pytest.mark.parametrize("what", [x for x in benchmark.BENCHMARKS if x != "export"])
def test_each_measures_both_and_a_limit(what, precision, monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, what, *options("--precision", precision, "--json"))
    assert code == 0
    result = json.loads(out)
    assert result["hardware"]["torch"] == torch.__version__
    assert result["setting"]["precision"] == precision
    for row in result["rows"]:
        assert row["limit_is"]
        if what == "memory":
            assert row["memory_of_detectron2"] == row["ours_bytes"] / row["detectron2_bytes"]
            assert row["limit_bytes"] > 0
        else:
            assert row["speedup"] == row["detectron2"] / row["ours"]
            assert row["over_limit"] == row["ours"] / row["limit"]
    assert ("ours_bytes" in row and row["ours_bytes"] is not None) == (what in ("loss", "assign", "memory"))


def test_export_measures_every_format(monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    tiny = ["MODEL.BACKBONE.NAME", "TinyPyramid", "MODEL.BACKBONE.FREEZE_AT", 0]
    code, out, _ = run(monkeypatch, capsys, "export", *options("--json"), *tiny)
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [x["name"] for x in rows] == [f"{x}, 1 images" for x in ("TorchScript", "ONNX", "ONNX with int8")]
    assert all(x["speedup"] > 0 and x["over_limit"] > 0 for x in rows)
    assert len({x["limit"] for x in rows}) == len({x["detectron2"] for x in rows}) == 1


def results_of(monkeypatch, capsys, *argv) -> list[dict]:
    """What the sides that take turns return, a dict for each time that they do."""
    rounds = []

    def once(runs, setting):
        rounds.append({name: run() for name, run in runs.items()})
        return dict.fromkeys(runs, 1.0)

    monkeypatch.setattr(timing, "take_turns", once)
    run(monkeypatch, capsys, *argv)
    return rounds


def test_both_losses_are_the_same_loss(monkeypatch, capsys):
    (results,) = results_of(monkeypatch, capsys, "loss", *options())
    assert sum(x.abs().sum() for x in results["ours"]) > 0
    torch.testing.assert_close(results["ours"], results["detectron2"], rtol=1e-4, atol=1e-7)


def test_both_detect_the_same(monkeypatch, capsys):
    rounds = results_of(monkeypatch, capsys, "postprocessing", *options())
    found = [[results[who][0] for who in ("ours", "detectron2")] for results in rounds]
    assert [len(ours) for ours, _ in found] == [100, 100, 11, 0]
    for ours, theirs in found:
        assert torch.equal(ours.pred_classes, theirs.pred_classes)
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


def test_both_evaluations_have_the_same_figures(monkeypatch, capsys):
    rounds = results_of(monkeypatch, capsys, "evaluation", *options("--batch", 3))
    for results in rounds:
        theirs = results["detectron2"]["bbox"]
        assert theirs["AP"] > 10
        assert {k: results["ours"]["bbox"][k] for k in theirs} == pytest.approx(theirs, abs=1e-9, nan_ok=True)
    precision = rounds[0]["limit"].precision[..., 0, -1]
    assert 100 * precision[precision > -1].mean() == pytest.approx(theirs["AP"])


def test_text_has_figures_and_ratios(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "loss", *options())
    assert code == 0
    assert "× as fast as detectron2" in out
    assert "MiB" in out
    assert "one pass of sigmoid" in out


def test_a_sweep_runs_and_is_drawn(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sweep, "SWEEP", {"size": (64, 128)})
    code, out, err = run(monkeypatch, capsys, "sweep", "--plot", tmp_path / "a.png", *options("--json"))
    assert code == 0
    rows = json.loads(out)["rows"]
    assert [row["value"] for row in rows] == [64, 128]
    assert rows[0]["ours_bytes"] < rows[1]["ours_bytes"]
    assert err.splitlines() == ["size 64", "size 128"]
    assert cv2.imread(str(tmp_path / "a.png")).shape[2] == 3


def test_only_a_numbered_device_is_selected(monkeypatch):
    """PyTorch refuses "cuda" without a number."""
    selected = []
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    for device in ("cpu", "cpu:0", "cuda", "cuda:1"):
        cuda.select_device(device)
    assert selected == ["cuda:1"]


def test_peak_is_the_allocators():
    def work():
        a = torch.empty(1 << 20)
        b = torch.empty(1 << 19)
        del a
        return torch.empty(1 << 18) + b.sum()

    peak = timing.peak_bytes(work, "cpu")
    assert 6 << 20 <= peak < (6 << 20) + 4096


@pytest.mark.parametrize("boxes", [20, 100])
def test_assignment_and_losses_take_little_beside_the_gradient(boxes):
    """Of 2 images of 512 × 512 pixels at K = 80: all bytes, the gradient's included, of the logits'."""
    cfg = make_cfg(MODEL__FPN__OUT_CHANNELS=8)
    setting = benchmark.Setting("cpu", 512, 2, 80, boxes, 1, "fp32")
    row = memory.losses_memory(cfg, setting)
    assert row.limit_bytes == 2 * 9 * 80 * 5456 * 4  # 64² + 32² + 16² + 8² + 4² cells
    assert row.ours_bytes <= 1.2 * row.limit_bytes
    assert row.detectron2_bytes > 10 * row.limit_bytes


def test_mistakes_are_named(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "loss", "--size", "0")[0] == 2
    other = ["MODEL.FOCAL.LOSS.NAME", "varifocal"]
    assert "detectron2 has but one loss" in run(monkeypatch, capsys, "loss", *options(), *other)[2]
    code, _, err = run(monkeypatch, capsys, "step", *options(), "MODEL.FOCAL.HEAD.CHANNELS", "64")
    assert code == 2
    assert "not detectron2's RetinaNet" in err
    assert len(err.strip().splitlines()) == 1
