from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.engine import FocalTrainer, load_config
from focal_d2.engine.nonfinite import examine, load_step, replay, save_step
from tests.conftest import make_cfg, make_resnet_cfg
from tests.engine.nonfinite.test_nonfinite import NAN, make_sample, usual
from tests.engine.runs import run_command


def run(monkeypatch, *argv) -> int:
    return run_command(monkeypatch, "replay", *argv)


def save(folder, *, box: float = NAN, make=make_cfg, **overrides):
    """Fail a step as a training loop would, with a normaliser that the batch alone does not give."""
    overrides.setdefault("MODEL__FOCAL__LOSS__NAME", "ghm")
    cfg = make(**overrides)
    model = build_model(cfg).train()
    batch = [make_sample(i) for i in range(2)]
    batch[1]["instances"].gt_boxes.tensor[0, 2] = box
    report = examine(model, batch, steps=usual(), normalizer=37.5)
    return save_step(
        folder,
        cfg=cfg,
        model=model,
        batch=batch,
        losses=report.losses,
        steps=report.steps,
        normalizer=37.5,
        iteration=3,
        rank=0,
        report=report,
    )


def test_step_is_reproduced_and_explained(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    assert run(monkeypatch, folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Iteration 3, step_rank0.pth: reproduced"
    assert lines[1].startswith("  loss_cls: ")
    assert lines[1].endswith("equal to the bit")
    assert lines[2] == "  loss_box_reg: nan in training, nan now"
    assert "bad annotation: box 0 of image images/1.png (id 1) is (4, 4, nan, 30): not finite" in lines
    assert (folder / "report.txt").read_text().split("\n", 2)[2] == "\n".join(lines[4:]) + "\n"


def test_step_of_a_job_needs_no_dataset(job, tmp_path, monkeypatch, capsys):
    path, data = job
    cfg = load_config(str(path), ["MODEL.RETINANET.NUM_CLASSES", "auto"])
    trainer = FocalTrainer(cfg)
    batch = next(iter(trainer.data_loader))
    with torch.no_grad():
        trainer.model.head.bbox_pred.bias[3] = NAN
    report = examine(trainer.model, batch, steps=usual())
    facts = {"losses": report.losses, "steps": usual(), "normalizer": None, "iteration": 0, "rank": 0}
    folder = save_step(tmp_path, cfg=trainer.cfg, model=trainer.model, batch=batch, report=report, **facts)
    shutil.rmtree(data.images.parent)
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.remove(data.name)
    assert run(monkeypatch, folder) == 0
    out = capsys.readouterr().out
    assert "the parameter head.bbox_pred.bias; the batch is not to blame" in out
    assert "equal to the bit" in out  # the other loss
    assert str(data.images) in out


def test_json_is_the_whole_report(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path)
    assert run(monkeypatch, folder, "--json", "--device", "cpu") == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    stored = json.loads((folder / "report.json").read_text())
    assert {**stored, "iteration": 3, "reproduced": True, "terms": facts["terms"]} == facts


def test_plain_retinanet_is_replayed(tmp_path, monkeypatch, capsys):
    folder = save(tmp_path, MODEL__META_ARCHITECTURE="RetinaNet", MODEL__FOCAL__LOSS__NAME="focal")
    assert run(monkeypatch, folder) == 0
    assert "bad annotation" in capsys.readouterr().out


def test_step_that_does_not_fail_again_exits_1(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, save(tmp_path, box=40.0)) == 1
    out = capsys.readouterr().out
    assert "NOT reproduced" in out
    assert "not reproduced: repeated on this process's batch" in out


def test_replay_says_how_far_losses_agree(tmp_path):
    saved = load_step(save(tmp_path, box=40.0))
    now = saved.losses
    changed = {"loss_cls": now["loss_cls"] * (1 + 3e-5), "loss_box_reg": NAN, "loss_gone": 1.0}
    result = replay(saved._replace(losses=changed), device="cpu")
    assert not result.reproduced
    assert result.terms["loss_cls"].endswith("now: equal to 4 digits")
    assert result.terms["loss_box_reg"] == f"nan in training, {now['loss_box_reg']:.9g} now"
    assert result.terms["loss_gone"] == "1 in training, absent now"


def edit(file, **changes):
    torch.save({**torch.load(file, weights_only=True), **changes}, file)


class _Dangerous:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_mistakes_give_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    def refuses(*argv: object, line: str) -> None:
        assert run(monkeypatch, *argv) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert line in error

    refuses(tmp_path / "nowhere", line="nowhere has no saved step")
    folder = save(tmp_path)
    file = folder / "step_rank0.pth"
    good = file.read_bytes()
    for damaged in (b"", good[: len(good) // 2], b"x" * 100):
        file.write_bytes(damaged)
        refuses(folder, line="step_rank0.pth cannot be read: ")
    torch.save({"model": _Dangerous(tmp_path / "executed")}, file)
    refuses(folder, line="step_rank0.pth cannot be read: ")
    assert not (tmp_path / "executed").exists()
    torch.save([1, 2], file)
    refuses(folder, line="is no saved step: it must hold batch, config, ")

    config = load_step_config(good, file)
    for text, line in (
        (
            "!!python/object/apply:os.mkdir [executed]",
            "its config, line 1: the tag !!python/object/apply:os.mkdir is refused",
        ),
        ("a line", "its config is no YAML of KEY: value lines"),
        ("NOTHING: {A: 1}", "cannot build the model from this config"),
        (config.replace("NUM_CLASSES: 3", "NUM_CLASSES: 4"), "its weights do not fit its config"),
    ):
        file.write_bytes(good)
        edit(file, config=text)
        refuses(folder, line=line)


def sample(**changes):
    """Change the batch: of the first sample, or of its instances."""

    def change(content):
        first = content["batch"][0]
        (first["instances"] if changes.keys() <= first["instances"].keys() else first).update(changes)

    return change


# What another's file may hold in place of each field.
FOREIGN = {
    "iteration": [2**70, "x", -1, True],
    "rank": [None],
    "learning_rate": ["x"],
    "losses": [None, [1], {"loss_cls": "x"}, {1: 1.0}],
    "steps": [[[1]], 3, [[1, 2.0, {}, "x"]], [[1, 2.0, [], 3.0]]],
    "normalizer": ["x", {}, torch.ones(3)],
    "config": [{}],
    "model": [torch.zeros(3), {"a": 1}, []],
    "batch": [[1], [], {}, [{"instances": {}}]],
    "random": [
        None,
        {},
        torch.zeros(3),
        torch.zeros(4, dtype=torch.uint8),
        torch.ones(5056, dtype=torch.uint8),
    ],
    "cuda_random": [3, torch.zeros(3)],
}
SAMPLES = [
    {"image": [1]},
    {"image": torch.zeros(3, 0, 64)},
    {"image": torch.ones(3, 64, 64, dtype=torch.complex64)},
    {"height": "x"},
    {"file_name": 3},
    {"image_id": [1]},
    {"ignored_boxes": torch.zeros(3)},
    {"image_size": [64, 65]},
    {"boxes": {}},
    {"boxes": {"gt_boxes": torch.zeros(2, 7)}},
    {"tensors": {"gt_classes": torch.zeros(2)}},
    {"tensors": {"gt_classes": torch.zeros(9, dtype=torch.int64)}},
    {"tensors": {}},
]


def test_each_field_of_a_saved_step_is_checked(tmp_path):
    file = save(tmp_path) / "step_rank0.pth"
    good = file.read_bytes()
    changes = [(name, lambda c, n=name, x=x: c.update({n: x})) for name, bad in FOREIGN.items() for x in bad]
    changes += [("batch", sample(**bad)) for bad in SAMPLES]
    for name, change in changes:
        file.write_bytes(good)
        content = torch.load(file)
        change(content)
        torch.save(content, file)
        with pytest.raises(UserError, match=rf"step_rank0\.pth is no saved step: its {name} must be "):
            load_step(file.parent)


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("MODEL.FPN.OUT_CHANNELS", 8192, "its weights do not fit its config"),  # 20 GB, if it were built
        (
            "MODEL.FPN.OUT_CHANNELS",
            10**9,
            "MODEL.FPN.OUT_CHANNELS is 1000000000; it must be within 1 and 8192",
        ),
        ("MODEL.RETINANET.NUM_CONVS", 10**6, "MODEL.RETINANET.NUM_CONVS is 1000000"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[1e30]], "MODEL.ANCHOR_GENERATOR.SIZES is"),
    ],
)
def test_the_config_of_a_saved_step_takes_no_more_than_its_weights(tmp_path, key, value, line):
    folder = save(tmp_path, make=make_resnet_cfg)  # ranges are those of known backbones
    config = yaml.safe_load(load_step(folder).config)
    section, name = key.removeprefix("MODEL.").split(".")
    config["MODEL"][section][name] = value
    edit(folder / "step_rank0.pth", config=yaml.safe_dump(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=line):
        replay(load_step(folder))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 * 2**10  # KiB


def load_step_config(content: bytes, file) -> str:
    file.write_bytes(content)
    return load_step(file.parent).config
