"""`train_net.py` as its users run it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml

from focal_d2.commands.cli import command_line
from focal_d2.data.readers import read_coco
from tests.conftest import REPOSITORY
from tests.data import formats
from tests.engine.runs import metrics, mounted, run_command, run_main
from tests.storage.test_weights import Evil


def final_ap(folder: Path) -> dict:
    return {k: v for k, v in metrics(folder)[-1].items() if k.startswith("bbox/")}


def test_train_evaluate_resume(job, tmp_path, monkeypatch, capsys):
    config, data = job
    out = tmp_path / "out"
    assert run_main(monkeypatch, "--config-file", config) == 0
    trained = final_ap(out)
    assert trained["bbox/AR@100"] > 0
    assert {"model_0000003.pth", "model_final.pth", "config.yaml", "log.txt"} <= {
        p.name for p in out.iterdir()
    }
    console = capsys.readouterr().out
    assert "| " + data.name in console  # the table
    assert "Full config" not in console  # pages of it are in log.txt
    assert "Running with full config" in (out / "log.txt").read_text()

    # --eval-only gives the same figures to the last digit, from the written config as well.
    predictions = out / "inference" / data.name / "coco_instances_results.json"
    before = json.loads(predictions.read_text())
    weights = ["MODEL.WEIGHTS", out / "model_final.pth", "OUTPUT_DIR", tmp_path / "eval"]
    evaluate = ["--eval-only", "--config-file", out / "config.yaml", *weights]
    assert run_main(monkeypatch, *evaluate) == 0
    after = json.loads((tmp_path / "eval/inference" / data.name / "coco_instances_results.json").read_text())
    assert after == before
    assert "SOLVER:" in (tmp_path / "eval/config.yaml").read_text()

    # --resume continues from the last checkpoint, normaliser included.
    saved = torch.load(out / "model_final.pth")
    assert saved["iteration"] == 7
    assert saved["model"]["loss_normalizer.ema"].item() != 100
    saved["model"]["loss_normalizer.ema"].fill_(5000)
    torch.save(saved, out / "model_final.pth")
    assert run_main(monkeypatch, "--config-file", config, "--resume", "SOLVER.MAX_ITER", 11) == 0
    assert "Starting training from iteration 8" in (out / "log.txt").read_text()
    assert "MAX_ITER: 11\n" in (out / "config.yaml").read_text()
    resumed = torch.load(out / "model_final.pth")
    assert resumed["iteration"] == 10
    # Three steps of the saved moving average, not of one that starts at 100 again.
    assert resumed["model"]["loss_normalizer.ema"].item() > 0.9**3 * 5000

    # ... and refuses to continue with another optimizer.
    resume = ["--config-file", config, "--resume", "SOLVER.MAX_ITER", 12, "SOLVER.FOCAL.OPTIMIZER"]
    assert run_main(monkeypatch, *resume, "SGD") == 2


def test_the_same_data_in_four_formats_trains_to_the_same_weights(job, tmp_path, monkeypatch):
    config, data = job
    table = read_coco(str(data.annotations), str(data.images))
    # Boxes of whole pixels, some turned flat, an image without any; sides that are no power of two.
    flat = table.boxes * [1, 1, 1, 0.5] + [0, 3, 0, 0]
    keep = table.image != 2
    table = dataclasses.replace(
        table,
        boxes=flat[keep],
        image=table.image[keep],
        labels=table.labels[keep],
        ignored=table.ignored[keep],
    )
    content = yaml.safe_load(config.read_text())
    entries = [formats.write(style, tmp_path / style, table, data.images, style) for style in formats.STYLES]
    content["DATASETS"]["FOCAL"] = entries
    content["INPUT"] = {"MIN_SIZE_TRAIN": [57, 64, 75], "MIN_SIZE_TEST": 64, "FOCAL": {"VERTICAL_FLIP": True}}
    content["DATALOADER"]["FILTER_EMPTY_ANNOTATIONS"] = False
    content["SOLVER"]["MAX_ITER"] = 20
    config.write_text(yaml.safe_dump(content))
    weights, figures = [], []
    for style in formats.STYLES:
        out = tmp_path / f"out_{style}"
        names = ["DATASETS.TRAIN", f"('{style}',)", "DATASETS.TEST", f"('{style}',)"]
        overrides = ["MODEL.RETINANET.NUM_CLASSES", "auto", "OUTPUT_DIR", out, *names]
        assert run_main(monkeypatch, "--config-file", config, *overrides) == 0
        weights.append(torch.load(out / "model_final.pth")["model"])
        figures.append(final_ap(out))
    for other in weights[1:]:
        assert all(torch.equal(other[name], value) for name, value in weights[0].items())
    assert all(str(other) == str(figures[0]) for other in figures[1:])  # NaN is a text like any other
    start = yaml.safe_load((tmp_path / "out_coco/config.yaml").read_text())
    assert start["MODEL"]["RETINANET"]["NUM_CLASSES"] == 3


def test_keys_of_other_detectors_are_warned_of(job, monkeypatch, capsys):
    config, _ = job
    overrides = ["SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()", "MODEL.ROI_HEADS.NUM_CLASSES", 3]
    assert run_main(monkeypatch, "--config-file", config, *overrides) == 0
    warning = (
        "MODEL.ROI_HEADS.NUM_CLASSES is 3, which FocalRetinaNet does not read: it reads MODEL.RETINANET."
    )
    assert warning in capsys.readouterr().out


def test_annotations_are_checked_before_training(job, coco_dataset, tmp_path, monkeypatch, capsys):
    config, data = job
    content = json.loads(data.annotations.read_text())
    content["annotations"][0]["bbox"] = [70, 5, 10, 10]
    content["annotations"][1]["bbox"] = [5, 6, 0, 30]
    content["annotations"][2]["ignore"] = 1
    data.annotations.write_text(json.dumps(content))
    assert run_main(monkeypatch, "--config-file", config, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if data.name in x or "annotations have" in x]
    texts = ['1 of 18 annotations have "ignore": 1', "1 of 18 boxes have no area"]
    texts.append("1 of 18 boxes are outside their image")
    for text in texts:
        assert sum(text in line for line in lines) == 1, text

    test = coco_dataset("empty", images=6)
    test.annotations.write_text(json.dumps({**content, "annotations": []}))
    written = yaml.safe_load(config.read_text())
    written["DATASETS"]["FOCAL"].append(test.entry)
    config.write_text(yaml.safe_dump(written))
    args = ["--config-file", config, "OUTPUT_DIR", tmp_path / "second", "DATASETS.TEST", f"('{test.name}',)"]
    assert run_main(monkeypatch, *args) == 2
    assert f'dataset "{test.name}" has no box to test on' in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_a_refused_job_and_an_evaluation_keep_the_config_of_the_training(job, tmp_path, monkeypatch):
    config, _ = job
    written, weights = tmp_path / "out/config.yaml", tmp_path / "out/model_final.pth"
    train = ["--config-file", config, "--resume", "SOLVER.MAX_ITER", 1]
    assert run_main(monkeypatch, *train) == 0
    before = written.read_bytes()
    for refused in (
        ["TEST.EVAL_PERIOD", -5],
        ["TEST.FOCAL.PATIENCE", 3],
        ["DATALOADER.SAMPLER_TRAIN", "Even"],
        ["SOLVER.FOCAL.OPTIMIZER", "SGD"],  # known when the checkpoint is read
    ):
        assert run_main(monkeypatch, *train, *refused) == 2
        assert written.read_bytes() == before, refused
    evaluate = ["--eval-only", "--config-file", config, "SEED", 5, "MODEL.WEIGHTS"]
    assert run_main(monkeypatch, *evaluate, "nowhere.pth") == 2
    assert written.read_bytes() == before
    assert run_main(monkeypatch, *evaluate, weights) == 0
    assert written.read_bytes() == before


def test_resume_without_a_checkpoint_starts_anew(job, tmp_path, monkeypatch):
    config, _ = job
    args = ["--config-file", config, "--resume", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
    assert run_main(monkeypatch, *args) == 0
    assert (tmp_path / "out/model_final.pth").is_file()


@pytest.fixture
def small_output(job, tmp_path):
    """OUTPUT_DIR is a file system with room for one checkpoint, 1.3 MB without an optimizer's state."""
    with mounted(tmp_path / "out", "2m") as out:
        yield out


WITHOUT_STATE = ["SOLVER.FOCAL.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "DATASETS.TEST", "()"]


def error_lines(capfd) -> list[str]:
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
    return [x for x in captured.err.splitlines() if x.startswith("train_net.py: error: ")]


def test_full_disk_stops_training_with_one_line_and_the_last_checkpoint_intact(
    job, small_output, monkeypatch, capfd
):
    config, _ = job
    args = ["--config-file", config, *WITHOUT_STATE, "SOLVER.FOCAL.KEEP_CHECKPOINTS", 1]
    assert run_main(monkeypatch, *args) == 2
    (line,) = error_lines(capfd)
    last = f"{small_output}/model_0000003.pth"
    assert f"cannot write {small_output}/model_0000007.pth: No space left on device, " in line
    assert line.endswith(f"; --resume continues from {last}")
    assert not list(small_output.glob("*.tmp"))
    # With room again, the run continues from it.
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_output)], check=True)
    assert run_main(monkeypatch, *args, "SOLVER.MAX_ITER", 5, "--resume") == 2  # flags come first
    assert run_main(monkeypatch, "--resume", *args) == 0
    assert "Starting training from iteration 4" in (small_output / "log.txt").read_text()
    assert {p.name for p in small_output.glob("model*")} == {"model_0000007.pth", "model_final.pth"}


def test_read_only_output_is_one_line(job, small_output, monkeypatch, capfd):
    config, _ = job
    subprocess.run(["mount", "-o", "remount,ro", str(small_output)], check=True)
    assert run_main(monkeypatch, "--config-file", config) == 2
    (line,) = error_lines(capfd)
    assert f"OUTPUT_DIR {small_output}: " in line
    assert "Read-only file system" in line


def test_malicious_weights_run_nothing_unless_trusted(job, tmp_path, monkeypatch, capfd):
    config, _ = job
    planted, path = tmp_path / "planted", tmp_path / "a.pth"
    torch.save({"model": {}, "more": Evil(planted)}, path)
    args = ["--config-file", config, "--eval-only", "MODEL.WEIGHTS", path]
    assert run_main(monkeypatch, *args) == 2
    (line,) = error_lines(capfd)
    assert f"cannot load weights {path}: it would import posix.mkdir; " in line
    assert "--trust-files" in line
    assert not planted.exists()
    assert run_main(monkeypatch, "--trust-files", *args) == 2
    (line,) = error_lines(capfd)
    assert "they lack backbone" in line
    assert planted.exists()


def test_resume_passes_over_a_damaged_checkpoint(job, tmp_path, monkeypatch, capfd):
    config, _ = job
    args = ["--config-file", config, *WITHOUT_STATE, "SOLVER.CHECKPOINT_PERIOD", 2]
    assert run_main(monkeypatch, *args, "SOLVER.MAX_ITER", 4) == 0
    out = tmp_path / "out"
    (out / "model_0000005.pth.tmp").write_bytes(b"half")
    final, third = out / "model_final.pth", out / "model_0000003.pth"
    final.write_bytes(final.read_bytes()[:-100])
    content = torch.load(third)
    del content["trainer"]["_trainer"]["optimizer"]["param_groups"][0]["params"]
    torch.save(content, third)
    capfd.readouterr()
    assert run_main(monkeypatch, "--resume", *args, "SOLVER.MAX_ITER", 5) == 0
    console = capfd.readouterr().out
    assert "--resume: cannot load weights" in console
    assert "cut short, or not of torch.save; trying model_0000003.pth" in console
    assert "; trying model_0000001.pth" in console
    assert "Starting training from iteration 2" in (out / "log.txt").read_text()
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("image_format, means", [("L", 1), ("L", 3), ("YUV-BT.601", 3)])
def test_a_format_that_trains_evaluates_predicts_and_is_examined(
    job, tmp_path, monkeypatch, capsys, image_format, means
):
    config, data = job
    content = yaml.safe_load(config.read_text())
    content["INPUT"] |= {"FORMAT": image_format}
    content["MODEL"] |= {"PIXEL_MEAN": [0.5] * means, "PIXEL_STD": [0.3] * means}
    config.write_text(yaml.safe_dump(content))
    assert run_main(monkeypatch, "--config-file", config, "SOLVER.MAX_ITER", 2, "VIS_PERIOD", 1) == 0
    evaluated = json.loads(
        (tmp_path / "out/inference" / data.name / "coco_instances_results.json").read_text()
    )
    given = ["--config-file", config, data.images, "--output", tmp_path / "drawn"]
    wanted = ["--json", "--threshold", 0, "MODEL.WEIGHTS", tmp_path / "out/model_final.pth"]
    capsys.readouterr()
    assert run_command(monkeypatch, "predict", *given, *wanted) == 0
    predicted = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [x["scores"] for x in predicted] == [
        pytest.approx([y["score"] for y in evaluated if y["image_id"] == i], abs=1e-6) for i in range(6)
    ]
    assert cv2.imread(str(tmp_path / "drawn/pictures/0.png")).shape == (64, 64, 3)
    assert run_command(monkeypatch, "doctor", *given[:2], "DATASETS.TEST", "()") == 0
    assert "Memory of a training step" in capsys.readouterr().out


def empty_all_images(data) -> None:
    coco = json.loads(data.annotations.read_text())
    data.annotations.write_text(json.dumps({**coco, "annotations": []}))


def test_images_without_boxes_train_if_the_config_says_so(job, tmp_path, monkeypatch):
    config, data = job
    empty_all_images(data)
    args = ["--config-file", config, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3]
    assert run_main(monkeypatch, *args, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False) == 0
    assert metrics(tmp_path / "out")[-1]["loss_box_reg"] == 0


def break_image(data) -> None:
    (data.images / "3.png").write_bytes(b"")


def edit(data, change) -> None:
    coco = json.loads(data.annotations.read_text())
    change(coco)
    data.annotations.write_text(json.dumps(coco))


def drop_optional_keys(data) -> None:
    for annotation in json.loads(data.annotations.read_text())["annotations"][:1]:
        assert {"area", "iscrowd"} <= set(annotation)
    edit(data, lambda coco: [(a.pop("area"), a.pop("iscrowd")) for a in coco["annotations"]])


def test_annotations_without_area_and_iscrowd_are_evaluated(job, tmp_path, monkeypatch):
    config, data = job
    drop_optional_keys(data)
    assert run_main(monkeypatch, "--config-file", config, "SOLVER.MAX_ITER", 1) == 0
    assert "bbox/AP" in final_ap(tmp_path / "out")


def break_annotations(data) -> None:
    data.annotations.unlink()


def other_architecture(data) -> None:
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, data.images.parent / "other.pth")


@pytest.mark.parametrize(
    "spoil, arguments, expected",
    [
        (None, ["--config-file", "nowhere.yaml"], "config file not found: nowhere.yaml"),
        (None, ["SOLVER.MAX_ITERS", "3"], "unknown key SOLVER.MAX_ITERS; did you mean"),
        (None, ["SOLVER.MAX_ITER", "three"], "SOLVER.MAX_ITER"),
        (None, ["DATASETS.TRAIN", "('qq',)"], '"qq" is not registered; registered: '),
        (None, ["DATASETS.TRAIN", "('Squares_trian',)"], "is not registered; did you mean squares_train?"),
        (None, ["SEED", "1", "--resume"], "--resume must come before the KEY VALUE pairs"),
        (None, ["MODEL.RETINANET.NUM_CLASSES", "80"], "has 3 classes (class0, class1, class2) but "
         "MODEL.RETINANET.NUM_CLASSES is 80: set it to 3, or to auto"),
        (None, ["MODEL.WEIGHTS", "nowhere.pth"], "weights file not found: nowhere.pth"),
        (other_architecture, ["MODEL.WEIGHTS", "{folder}/other.pth"], "they lack backbone."),
        (break_image, [], "cannot read image {folder}/images/3.png"),
        (break_image, ["DATALOADER.NUM_WORKERS", "2"], "cannot read image {folder}/images/3.png"),
        (empty_all_images, ["DATASETS.TEST", "()"], "set DATALOADER.FILTER_EMPTY_ANNOTATIONS False"),
        (empty_all_images, [], "has no box to test on"),
        (None, ["--eval-only", "--resume"], "--resume finds none in"),
        (None, ["--num-machines", "2"], "--num-machines 2 needs --dist-url tcp://HOST:PORT"),
        (None, ["MODEL.FPN.NORM", "XN"], "cannot build the trainer from this config: KeyError"),
        (None, ["MODEL.FOCAL.HEAD.CHANNELS", "48"], "HEAD.CHANNELS is 48"),
        (None, ["MODEL.RETINANET.FOCAL_LOSS_ALPHA", "2.0"], "FOCAL_LOSS_ALPHA is 2.0"),
        (None, ["INPUT.FOCAL.BRIGHTNESS", "1.5"], "INPUT.FOCAL.BRIGHTNESS is 1.5"),
        (None, ["DATALOADER.SAMPLER_TRAIN", "Even"], 'SAMPLER_TRAIN is "Even"; legal values: '),
        (None, ["SOLVER.IMS_PER_BATCH", "0"], "SOLVER.IMS_PER_BATCH is 0"),
        (break_annotations, [], "annotation file not found: {folder}/annotations.json"),
        (None, ["--num-gpus", "64"], "--num-gpus 64"),
        (None, ["--eval-only"], "--eval-only needs a checkpoint"),
        (None, ["OUTPUT_DIR", ""], "OUTPUT_DIR is empty; it must be the path of a folder"),
        (None, ["OUTPUT_DIR", "/proc/nowhere"], "OUTPUT_DIR /proc/nowhere"),
        pytest.param(
            None, ["MODEL.DEVICE", "cuda"], "no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
)  # fmt: skip
def test_bad_input_gives_one_line_and_status_2(job, monkeypatch, capfd, spoil, arguments, expected):
    config, data = job
    if spoil:
        spoil(data)
    folder = data.images.parent
    arguments = [a.format(folder=folder) for a in arguments]
    if "--config-file" not in arguments:
        arguments = ["--config-file", str(config), *arguments]
    assert run_main(monkeypatch, *arguments) == 2
    captured = capfd.readouterr()
    errors = [x for x in captured.err.splitlines() if x.startswith("train_net.py: error: ")]
    assert len(errors) == 1
    assert expected.format(folder=folder) in errors[0]
    assert "Traceback" not in captured.err + captured.out


@pytest.mark.slow
def test_bad_input_in_a_shell(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", "nowhere.yaml"]
    result = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "train_net.py: error: config file not found: nowhere.yaml\n"
    assert result.stdout == ""


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), command_line("train_net.py"):
        _ = 1 / 0


def test_progress_bar_shows_loss_and_time_left_on_a_terminal(job, monkeypatch, capsys):
    config, _ = job
    for module in ("trainer", "hooks.arrangement"):
        monkeypatch.setattr(f"focal_d2.engine.{module}.on_terminal", lambda: True)
    args = ["--config-file", config, "DATASETS.TEST", "()", "SOLVER.MAX_ITER", 3]
    assert run_main(monkeypatch, *args) == 0
    captured = capsys.readouterr()
    bar = captured.err.split("\r")[-1]
    assert "training: 100%" in bar
    assert "3/3 [" in bar
    assert "loss=" in bar
    assert "total_loss" not in captured.out  # the bar replaces the lines
