"""Control characters in what is read: they show themselves, and do nothing to the terminal or the log."""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.modeling import build_model
from termcolor import colored

from focal_d2.console import prepare_output, tell, write
from focal_d2.engine import load_config
from focal_d2.errors import escaped
from tests.engine.runs import run_command, run_main

HOSTILE = {
    "colour": "\x1b[31m",
    "hidden text": "\x1b[8m",
    "title": "\x1b]0;owned\x07",
    "clipboard": "\x1b]52;c;cm0gLXJm\x1b\\",
    "link": "\x1b]8;;http://a\x1b\\",
    "answer that is typed": "\x1b[6n\x1bP$q\x1b\\",
    "another set of letters": "\x1b(0\x0e",
    "sequences of one byte": "\x9b2J\x90q\x9c\x9d0;x\x07",
    "backspaces": "error\b\b\b\b\bfine ",
    "carriage return": "error\rfine ",
    "new lines": "a\n[01/01 00:00:00 d2]: FAKE\x0b\x0c\x85\u2028\u2029",
    "order of letters": "\u202egnp\u202c\u2066x\u2069\u200f\u061c",
    "delete": "\x7f",
    "shift and others": "\x01\x0f\x05\x1c\x1d",
}
ALL = "".join(HOSTILE.values())
# detectron2's own: green and red, bold, underlined and blinking.
_COLOURS = re.compile(r"\x1b\[(0|1|4|5|31|32|36|3[89];5;\d+|39)m")
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def check(text: str, *, shows: bool = True) -> None:
    """See that a text has no control character but ours, that no line of it is faked, and that it says so."""
    plain = _COLOURS.sub("", text)
    assert not _CONTROL.search(plain), _CONTROL.search(plain)
    assert not re.search(r"^\S* *\S*: FAKE", plain, re.MULTILINE)
    assert not shows or r"\x1b]52;c;cm0gLXJm\x1b" in plain


@pytest.fixture
def hostile_job(job_file) -> Path:
    """A job whose class names and files have them all."""
    content = yaml.safe_load(job_file.read_text())
    (entry,) = content["DATASETS"]["FOCAL"]
    coco = json.loads(Path(entry["ANNOTATIONS"]).read_text())
    for i, category in enumerate(coco["categories"]):
        category["name"] = f"{ALL}{i}"
    for image in coco["images"]:
        name = ALL.replace("/", "") + image["file_name"]
        os.rename(Path(entry["IMAGES"], image["file_name"]), Path(entry["IMAGES"], name))
        image["file_name"] = name
    Path(entry["ANNOTATIONS"]).write_text(json.dumps(coco))
    content["DATALOADER"]["NUM_WORKERS"] = 1
    content["SOLVER"].update(MAX_ITER=1, CHECKPOINT_PERIOD=1)
    job_file.write_text(yaml.safe_dump(content))
    return job_file


def test_class_and_file_names(hostile_job, tmp_path, monkeypatch, capfd):
    assert run_main(monkeypatch, "--config-file", hostile_job) == 0
    out, err = capfd.readouterr()
    check(out)
    check(err, shows=False)
    check((tmp_path / "out/log.txt").read_text())
    figures = json.loads((tmp_path / "out/metrics.json").read_text().splitlines()[-1])
    assert f"bbox/AP-{ALL}1" in figures  # a file for programs has the name as it is
    run_command(monkeypatch, "doctor", "--config-file", hostile_job)
    out, err = capfd.readouterr()
    check(out)
    check(err, shows=False)
    images = next(tmp_path.glob("train/images"))
    for image in images.iterdir():
        image.write_bytes(b"broken")
    arguments = ["--config-file", hostile_job]
    assert run_main(monkeypatch, *arguments) == 2
    out, err = capfd.readouterr()
    check(out + err)
    assert "cannot read image" in err
    assert "Traceback" not in err
    run_command(monkeypatch, "doctor", *arguments)
    check("".join(capfd.readouterr()))
    weights = ["MODEL.WEIGHTS", tmp_path / "out/earlier_1/model_final.pth"]
    predict = [images, "--output", tmp_path / "pictures", *arguments, *weights]
    assert run_command(monkeypatch, "predict", *predict) == 1
    check("".join(capfd.readouterr()))


@pytest.mark.parametrize("key", ["OUTPUT_DIR", "MODEL.WEIGHTS", "TEST.FOCAL.BEST_METRIC"])
def test_values_of_a_config_have_no_control_characters(hostile_job, monkeypatch, capfd, key):
    assert run_main(monkeypatch, "--config-file", hostile_job, key, "a\x1b]0;t\x07") == 2
    err = capfd.readouterr().err
    check(err, shows=False)
    assert f"{key} has the text" in err


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_keys_names_and_arguments(job, tmp_path, monkeypatch, capfd, hostile):
    config, _ = job
    broken = tmp_path / f"{hostile.replace('/', '')}.yaml"
    runs = [[config, hostile, 1], [config, f"MODEL.{hostile}", 1], [broken], [config, "SEED", hostile]]
    runs += [[config, "SEED", 1, f"--{hostile}"], [config, "DATASETS.TRAIN", f"['{hostile}']"]]
    for text in (
        "a: [",
        yaml.safe_dump({hostile: 1}),
        yaml.safe_dump({"MODEL": {hostile: 1}, "SEED": hostile}),
    ):
        broken.write_text(text)
        for arguments in runs:
            assert run_main(monkeypatch, "--config-file", *arguments) == 2
            out, err = capfd.readouterr()
            check(out + err, shows=False)
            assert len(err.splitlines()) == 1 or "usage:" in err
    assert run_command(monkeypatch, "doctor", "--config-file", config, f"--{hostile}") == 2
    check("".join(capfd.readouterr()), shows=False)


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_log_records(capfd, hostile):
    prepare_output()
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))
    for name in ("focal_d2.data", "detectron2.x", "fvcore.x", "other"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        try:
            logger.warning(f"class {hostile}")
            logger.warning("class %s", hostile)
            try:
                raise ValueError(hostile)
            except ValueError:
                logger.exception("failed")
        finally:
            logger.removeHandler(handler)
        assert lines
        for line in lines:
            # A line break is an attack on our records only.
            assert not _CONTROL.search(line)
        if name.startswith("focal_d2"):
            assert all("\n" not in line for line in lines[:2])
        lines.clear()


def test_log_records_keep_colours_and_lines_that_are_meant(caplog):
    prepare_output()
    with caplog.at_level(logging.INFO):
        for name in ("detectron2.engine.defaults", "detectron2.data.build", "fvcore.x"):
            logging.getLogger(name).info("a\n" + colored("b", "blue", attrs=["bold"], force_color=True))
        logging.getLogger("focal_d2.x").info("a\nb", extra={"lines": True})
        logging.getLogger("focal_d2.x").info("a\nb %s", "ü·")
    assert caplog.messages == ["a\n\x1b[1m\x1b[34mb\x1b[0m", "a\nb", "a\nb", "a\nb", "a\\nb ü·"]


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_what_is_printed(capfd, hostile):
    prepare_output()
    tell(hostile)
    write(f"a\t{escaped(hostile)}\nb")
    check(warnings.formatwarning(RuntimeWarning(hostile), RuntimeWarning, "a.py", 1), shows=False)
    out, err = capfd.readouterr()
    check(out + err, shows=False)
    assert out.count("\n") == 2
    assert out.endswith("\nb\n")
    assert escaped(escaped(hostile)) == escaped(hostile) != hostile


def test_names_that_are_not_utf_8_reach_the_log(job_file, tmp_path, monkeypatch, capfd):
    folder = tmp_path / os.fsdecode(b"f\xfcnf")
    model = build_model(load_config(str(job_file)))
    folder.mkdir()
    torch.save({"model": model.state_dict()}, folder / "a.pth")
    weights = ["MODEL.WEIGHTS", folder / "a.pth", "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"]
    assert run_main(monkeypatch, "--config-file", job_file, *weights) == 0
    assert r"Loading from " + escaped(str(folder)) in (tmp_path / "out/log.txt").read_text()


def test_names_of_weights_have_no_control_characters(job_file, tmp_path, monkeypatch, capfd):
    for hostile in (HOSTILE["new lines"], HOSTILE["colour"]):
        torch.save({"model": {hostile: torch.zeros(1)}}, tmp_path / "a.pth")
        weights = ["MODEL.WEIGHTS", tmp_path / "a.pth"]
        assert run_main(monkeypatch, "--config-file", job_file, *weights) == 2
        out, err = capfd.readouterr()
        check(out + err, shows=False)
        assert "control characters are refused" in err
