"""The blocks of docs/prediction.md, in their order, in a folder with a small model and two images."""

from __future__ import annotations

import re
import shlex
import subprocess

import cv2
import numpy as np
import torch
from detectron2.modeling import build_model

from focal_d2.evaluation.operating_point import OperatingPoint
from focal_d2.model_card import card_of
from tests.conftest import REPOSITORY, make_cfg
from tests.engine.runs import run_command


def test_blocks_of_the_page_run(tmp_path, monkeypatch, capfd):
    cfg = make_cfg(MODEL__RETINANET__NUM_CLASSES=1, MODEL__RETINANET__SCORE_THRESH_TEST=0.001)
    card = {**card_of(cfg).as_dict(), "class_names": ["tree"]}
    point = OperatingPoint(0.001, 0.8, 0.4, 0.53, "best F1", "mine_val", True)
    for folder in ("output", "more_fields"):
        (tmp_path / folder).mkdir()
    content = {"model": build_model(cfg).state_dict(), "card": card, "operating_point": point._asdict()}
    torch.save(content, tmp_path / "output/model_final.pth")
    (tmp_path / "output/config.yaml").write_text(cfg.dump())
    rng = np.random.default_rng(0)
    for name in ("field.png", "more_fields/a.png", "more_fields/b.png"):
        cv2.imwrite(str(tmp_path / name), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs/prediction.md").read_text()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, re.DOTALL)
    assert [language for language, _ in blocks] == ["bash"] * 3 + ["python"] * 3
    names: dict[str, object] = {}
    for language, text in blocks:
        if language == "python":
            exec(text, names)
            continue
        for line in text.splitlines():
            program, *arguments = shlex.split(line)
            if program == "focal-d2":
                assert run_command(monkeypatch, *arguments) == 0
            else:
                subprocess.run([program, *arguments], check=True)
    assert "image,xmin,ymin,xmax,ymax,label,score\nfield.png," in capfd.readouterr().out
    assert (tmp_path / "field_with_boxes.png").is_file()
    assert (tmp_path / "out/pictures/more_fields/a.png").is_file()
