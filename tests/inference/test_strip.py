from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.evaluation.operating_point import OperatingPoint
from focal_d2.inference.strip import strip_file
from focal_d2.model_card import card_of
from focal_d2.storage.card import read_card
from tests.conftest import make_cfg

POINT = OperatingPoint(0.4, 0.8, 0.4, 0.53, "best F1", "mine_val", True)


def test_strip_keeps_what_a_model_needs(tmp_path):
    cfg = make_cfg()
    weights = build_model(cfg).state_dict()
    large = torch.zeros(10**6)
    weights["head.cls_score.bias"] = large[:27]  # a view, which torch.save writes whole
    card = card_of(cfg)
    full = {
        "model": weights,
        "card": card.as_dict(),
        "operating_point": POINT._asdict(),
        "trainer": {"optimizer": {"momentum": torch.zeros(10**6)}},
        "iteration": 7,
    }
    torch.save(full, tmp_path / "full.pth")
    assert strip_file(tmp_path / "full.pth", tmp_path / "new/small.pth") == card
    small = torch.load(tmp_path / "new/small.pth", weights_only=True)
    assert small.keys() == {"model", "card", "operating_point"}
    assert small["operating_point"] == POINT._asdict()
    assert all(torch.equal(small["model"][name], x) for name, x in weights.items())
    assert (tmp_path / "new/small.pth").stat().st_size < 0.4 * (tmp_path / "full.pth").stat().st_size


def test_strip_gives_an_older_checkpoint_the_card_of_its_config(tmp_path):
    torch.save({"model": build_model(make_cfg()).state_dict()}, tmp_path / "old.pth")
    assert strip_file(tmp_path / "old.pth", tmp_path / "a.pth") is None
    assert read_card(str(tmp_path / "a.pth")) is None
    card = card_of(make_cfg())
    assert strip_file(tmp_path / "old.pth", tmp_path / "b.pth", card=card) == card
    assert read_card(str(tmp_path / "b.pth")) == card


def test_strip_names_what_it_can_not_use(tmp_path):
    (tmp_path / "text.pth").write_text("no checkpoint")
    torch.save({"model": {"a": 3}}, tmp_path / "numbers.pth")
    for name, message in (
        ("text.pth", "cannot read .*text.pth: "),
        ("numbers.pth", "numbers.pth is no checkpoint of a training"),
        ("nowhere.pth", "cannot read .*nowhere.pth: .*No such file"),
    ):
        with pytest.raises(UserError, match=message):
            strip_file(tmp_path / name, tmp_path / "out.pth")
    with pytest.raises(UserError, match=r"text.pth exists; choose another --output"):
        strip_file(tmp_path / "text.pth", tmp_path / "text.pth")
    with pytest.raises(UserError, match=r"its name must end with \.pth"):
        strip_file(tmp_path / "text.pth", tmp_path / "out.bin")
