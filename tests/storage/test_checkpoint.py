from __future__ import annotations

import errno
import math
import os
import pickle
import random
import re
import zipfile
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling import build_model

from focal_d2 import UserError
from focal_d2.storage.checkpoint import FocalCheckpointer
from tests.conftest import make_cfg, make_resnet_cfg
from tests.storage.test_weights import Evil


@pytest.fixture
def model():
    return build_model(make_cfg())


def save(model_or_state, path, drop=()) -> str:
    state = getattr(model_or_state, "state_dict", lambda: model_or_state)()
    state = {k: v for k, v in state.items() if not k.startswith(tuple(drop))}
    torch.save({"model": state}, path)
    return str(path)


@pytest.mark.parametrize("partial", [True, False])
def test_same_architecture_loads(model, tmp_path, partial):
    path = save(build_model(make_cfg()), tmp_path / "a.pth")
    FocalCheckpointer(model, partial=partial).load(path)
    saved = torch.load(path)["model"]
    assert all(torch.equal(saved[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("partial", [True, False])
def test_detectron2_checkpoint_loads_without_the_normaliser(model, tmp_path, partial):
    theirs = build_model(make_cfg(MODEL__META_ARCHITECTURE="RetinaNet"))
    FocalCheckpointer(model, partial=partial).load(save(theirs, tmp_path / "d2.pth"))
    assert torch.equal(model.head.cls_score.weight, theirs.head.cls_score.weight)
    assert model.loss_normalizer.ema.item() == 100


def test_backbone_alone_starts_training_but_does_not_evaluate(tmp_path):
    model = build_model(make_resnet_cfg())
    path = save(model, tmp_path / "a.pth", drop=("head.", "backbone.fpn", "backbone.top_block"))
    FocalCheckpointer(model, partial=True).load(path)
    with pytest.raises(UserError, match="lack backbone.fpn_lateral3.bias.* and .* more"):
        FocalCheckpointer(model, partial=False).load(path)


def test_other_number_of_classes_starts_training_but_does_not_evaluate(model, tmp_path):
    path = save(build_model(make_cfg(MODEL__RETINANET__NUM_CLASSES=5)), tmp_path / "a.pth")
    FocalCheckpointer(model, partial=True).load(path)
    with pytest.raises(UserError, match=r"a.pth was trained with 5 classes, but .*NUM_CLASSES is 3$"):
        FocalCheckpointer(model, partial=False).load(path)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("theirs, ours, match", [
    (18, 34, "lack backbone.bottom_up.res2.2.conv1"),
    (34, 18, "have backbone.bottom_up.res2.2.conv1.*, which the model does not have"),
])  # fmt: skip
def test_another_depth_is_refused(tmp_path, partial, theirs, ours, match):
    path = save(build_model(make_resnet_cfg(MODEL__RESNETS__DEPTH=theirs)), tmp_path / "a.pth")
    model = build_model(make_resnet_cfg(MODEL__RESNETS__DEPTH=ours))
    with pytest.raises(UserError, match=match):
        FocalCheckpointer(model, partial=partial).load(path)


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ({"MODEL__RETINANET__NUM_CONVS": 3}, {}),
        ({"MODEL__RETINANET__NORM": "GN", "MODEL__RETINANET__NUM_CONVS": 2}, {}),
        ({}, {"MODEL__FPN__NORM": "BN"}),  # running statistics are missing
        ({"MODEL__FPN__NORM": "BN"}, {}),
    ],
)
def test_another_head_or_norm_does_not_evaluate(tmp_path, theirs, ours):
    path = save(build_model(make_cfg(**theirs)), tmp_path / "a.pth")
    with pytest.raises(UserError, match="do not fit this model"):
        FocalCheckpointer(build_model(make_cfg(**ours)), partial=False).load(path)


def test_our_checkpoint_loads_into_detectron2s_retinanet(model, tmp_path):
    theirs = build_model(make_cfg(MODEL__META_ARCHITECTURE="RetinaNet"))
    FocalCheckpointer(theirs, partial=False).load(save(model, tmp_path / "a.pth"))
    assert torch.equal(model.head.cls_score.weight, theirs.head.cls_score.weight)


@pytest.mark.parametrize("partial", [True, False])
def test_foreign_weights_are_refused(model, tmp_path, partial):
    path = save({"layer.weight": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth do not fit this model: they lack"):
        FocalCheckpointer(model, partial=partial).load(path)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "pkl"])
@pytest.mark.parametrize(
    "change, match",
    [
        (lambda x: x.fill_(math.nan), "has 32 of 32 numbers that are NaN or infinite"),
        (lambda x: x.fill_(math.inf), "has 32 of 32 numbers that are NaN or infinite"),
        (lambda x: x.to(torch.int8), "has torch.int8 numbers; they must be floats"),
        (lambda x: x.to(torch.bool), "has torch.bool numbers; they must be floats"),
        (lambda x: x.to(torch.complex64), "has torch.complex64 numbers; they must be floats"),
    ],
)
def test_numbers_that_are_no_weights_are_refused(model, tmp_path, partial, suffix, change, match):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    name = "backbone.levels.0.bias"
    state = {**before, name: change(before[name].clone())}
    path = tmp_path / f"a.{suffix}"
    if suffix == "pth":
        save(state, path)
    else:
        content = {"model": {k: x.numpy() for k, x in state.items()}, "__author__": "a"}
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"{name} {match}"):
        FocalCheckpointer(model, partial=partial).load(str(path))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


def test_half_precision_weights_load(model, tmp_path):
    path = save({name: x.half() for name, x in model.state_dict().items()}, tmp_path / "a.pth")
    FocalCheckpointer(model, partial=False).load(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", [1, 2], {"model": None}])
def test_damaged_file_is_named_in_one_line(model, tmp_path, content):
    path = tmp_path / "a.pth"
    if content == "truncated":
        save(model, path)
        content = path.read_bytes()[:10000]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"cannot load weights .*a\.pth") as error:
        FocalCheckpointer(model, partial=True).load(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["no/such.pth", "foo://bar.pth"])
def test_missing_file_is_named(model, path):
    with pytest.raises(UserError, match=path):
        FocalCheckpointer(model, partial=True).load(path)


@pytest.mark.parametrize(
    "folder", ["a#b", "a?b", "run:12", "c:/a", "a%20b", "a?matching_heuristics=True", "[a]*;\\"]
)
def test_no_character_of_a_path_makes_it_an_address(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    os.makedirs(f"{folder}/run")
    save_run(f"{folder}/run", 1, 2)
    (tmp_path / folder / "run/model_0000009.pth.tmp").write_text("half")
    assert resume(f"{folder}/run") == 2
    assert files(tmp_path / folder / "run") == ["last_checkpoint", "model_0000001.pth", "model_0000002.pth"]
    for path in (f"{folder}/run/model_0000001.pth", f"{tmp_path}/{folder}/run/model_0000001.pth"):
        for option in ("", "?matching_heuristics=True"):
            ours = checkpointer(tmp_path)
            ours.load(path + option, checkpointables=[])
            assert ours.model.value == 1
    # An option where a file has that very name is part of the name.
    os.rename(f"{folder}/run/model_0000002.pth", f"{folder}/run/b.pth?matching_heuristics=True")
    ours = checkpointer(tmp_path)
    ours.load(f"{folder}/run/b.pth?matching_heuristics=True", checkpointables=[])
    assert ours.model.value == 2


@pytest.mark.parametrize("loss", ["focal", "softmax_focal"])
def test_resuming_with_another_number_of_classes_is_named(tmp_path, loss):
    models = [
        build_model(make_cfg(MODEL__RETINANET__NUM_CLASSES=k, MODEL__FOCAL__LOSS__NAME=loss)) for k in (5, 3)
    ]
    FocalCheckpointer(models[0], str(tmp_path), partial=True).save("model_0000001", iteration=1)
    expected = (
        f"--resume: {tmp_path}/model_0000001.pth was trained with 5 classes, but MODEL.RETINANET.NUM_CLASSES "
        "is 3; to train other classes from it, choose another OUTPUT_DIR and set MODEL.WEIGHTS "
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        FocalCheckpointer(models[1], str(tmp_path), partial=True).resume_or_load("", resume=True)


def test_resuming_accepts_no_partial_fit(model, tmp_path):
    other = build_model(make_cfg(MODEL__RETINANET__NUM_CLASSES=5, MODEL__FPN__OUT_CHANNELS=16))
    FocalCheckpointer(other, str(tmp_path), partial=True).save("model_0000001", iteration=1)
    with pytest.raises(UserError, match="have another shape"):
        FocalCheckpointer(model, str(tmp_path), partial=True).resume_or_load("", resume=True)


def fill(module: torch.nn.Module, value: float) -> torch.nn.Module:
    with torch.no_grad():
        for x in module.parameters():
            x.fill_(value)
    return module


class Detector(torch.nn.Module):
    """Something with a state that takes no room."""

    def __init__(self, classes: int = 3, value: float = 0) -> None:
        super().__init__()
        self.body = torch.nn.Conv2d(3, 4, 3)
        self.head = torch.nn.Linear(4, classes)
        fill(self, value)

    @property
    def value(self) -> float:
        """What all weights are; an error if they differ."""
        (value,) = {v for x in self.parameters() for v in x.detach().flatten().tolist()}
        return value


class Trainer:
    """What a checkpoint has beside the model."""

    def __init__(self, iteration: int = 0) -> None:
        self.iteration = iteration

    def state_dict(self):
        return {"iteration": self.iteration}

    def load_state_dict(self, state):
        self.iteration = state["iteration"]


def checkpointer(folder, *, iteration: int = 0, classes: int = 3, **options) -> FocalCheckpointer:
    """Everything in it is the number of the iteration."""
    model = Detector(classes, iteration)
    return FocalCheckpointer(model, str(folder), partial=True, trainer=Trainer(iteration), **options)


def save_run(folder, *iterations: int, **options) -> None:
    for i in iterations:
        checkpointer(folder, iteration=i, **options).save(f"model_{i:07d}", iteration=i)


def files(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr("focal_d2.storage.checkpoint.logger.warning", messages.append)
    return messages


def resume(folder) -> int:
    """Resume; returns the iteration that all state is of."""
    ours = checkpointer(folder)
    extra = ours.resume_or_load("", resume=True)
    assert ours.model.value == ours.checkpointables["trainer"].iteration == extra["iteration"]
    return extra["iteration"]


def rewrite(path, change) -> None:
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def truncate(share: float):
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def zip_of_something(path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("README.md", "a zip file")


def replace_by(content: object, **options):
    return lambda path: torch.save(content, path, **options)


def replace_by_folder(path) -> None:
    path.unlink()
    path.mkdir()


def evil(path) -> object:
    return {"model": Evil(path.parent / "planted"), "iteration": 3, "trainer": {}}


draw = random.Random(0)
AS_INT8 = {"body.bias": Detector().state_dict()["body.bias"].to(torch.int8)}
DAMAGES = {
    **{f"truncated {share:.5f}": truncate(share) for share in sorted(draw.random() for _ in range(12))},
    "one byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": truncate(0),
    "a folder": replace_by_folder,
    "missing": lambda path: path.unlink(),
    "text": lambda path: path.write_text("<html>404 Not Found</html>"),
    "a zip file": zip_of_something,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a list": replace_by([1, 2]),
    "a tensor": replace_by(torch.zeros(2)),
    "weights alone": replace_by(Detector().state_dict()),
    "no model": lambda path: rewrite(path, lambda x: x.pop("model")),
    "no iteration": lambda path: rewrite(path, lambda x: x.pop("iteration")),
    "no trainer": lambda path: rewrite(path, lambda x: x.pop("trainer")),
    "another type of model": lambda path: rewrite(path, lambda x: x.update(model=[1])),
    "another type of weight": lambda path: rewrite(path, lambda x: x["model"].update({"body.bias": 3})),
    "whole numbers for weights": lambda path: rewrite(path, lambda x: x["model"].update(AS_INT8)),
    "a weight that is NaN": lambda path: rewrite(path, lambda x: x["model"]["body.bias"].fill_(math.nan)),
    "another type of iteration": lambda path: rewrite(path, lambda x: x.update(iteration="3")),
    "another type of trainer": lambda path: rewrite(path, lambda x: x.update(trainer=3)),
    "less in the trainer": lambda path: rewrite(path, lambda x: x.update(trainer={})),
    "malicious": lambda path: torch.save(evil(path), path),
    "malicious, old format": lambda path: torch.save(
        evil(path), path, _use_new_zipfile_serialization=False
    ),
    "malicious, a plain pickle": lambda path: path.write_bytes(pickle.dumps(evil(path))),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_checkpoint_is_passed_over(tmp_path, warnings, name):
    save_run(tmp_path, 1, 2, 3)
    DAMAGES[name](tmp_path / "model_0000003.pth")
    assert resume(tmp_path) == 2
    (warning,) = warnings
    assert "\n" not in warning
    assert len(warning) < 600
    assert warning.startswith("--resume: ")
    assert "model_0000003.pth" in warning
    assert warning.endswith("; trying model_0000002.pth")
    assert not (tmp_path / "planted").exists()


def test_flipped_bits_are_found_or_change_nothing(tmp_path, warnings):
    save_run(tmp_path, 1, 2)
    path = tmp_path / "model_0000002.pth"
    data = path.read_bytes()
    ends = {resume_with_flipped_bit(tmp_path, path, data, draw.randrange(8 * len(data))) for _ in range(150)}
    assert ends == {1, 2}
    assert len(warnings) > 30
    assert all("\n" not in warning for warning in warnings)


def resume_with_flipped_bit(folder, path, data: bytes, bit: int) -> int:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    return resume(folder)  # which checks every weight


def test_several_damaged_checkpoints_are_passed_over(tmp_path, warnings):
    save_run(tmp_path, 1, 2, 3, 4)
    for i in (2, 4):
        truncate(0.7)(tmp_path / f"model_000000{i}.pth")
    assert resume(tmp_path) == 3
    (tmp_path / "model_0000003.pth").unlink()
    assert resume(tmp_path) == 1
    assert [x.split("; trying ")[1] for x in warnings[1:]] == ["model_0000002.pth", "model_0000001.pth"]


def test_resume_without_a_usable_checkpoint_is_refused(tmp_path, warnings):
    save_run(tmp_path, 1, 2)
    for path in tmp_path.glob("*.pth"):
        truncate(0.5)(path)
    ours = checkpointer(tmp_path, iteration=7)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be used: .*2.pth: .*; and 1 more$"):
        ours.resume_or_load("", resume=True)
    assert ours.model.value == ours.checkpointables["trainer"].iteration == 7


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"nonsense", b"../model_0000001.pth", b"/etc/passwd", b"a\nb.pth", b"\0.pth", None],
)
def test_damaged_last_checkpoint_falls_back_to_the_newest(tmp_path, warnings, content):
    folder = tmp_path / "out"
    folder.mkdir()
    save_run(folder, 1, 2, 10)
    save_run(tmp_path, 1)
    last = folder / "last_checkpoint"
    last.unlink() if content is None else last.write_bytes(content)
    assert resume(folder) == 10
    reason = "last_checkpoint is missing or names no checkpoint of this folder"
    assert f"{reason}; trying model_0000010.pth" in warnings[0]
    for path in folder.glob("model*"):
        path.unlink()
    if content is not None:
        with pytest.raises(UserError, match=f"no checkpoint in .* can be used: .*{reason}"):
            resume(folder)


def test_last_resort_is_the_end_of_a_run(tmp_path, warnings):
    checkpointer(tmp_path, iteration=5).save("model_final", iteration=5)
    (tmp_path / "last_checkpoint").write_text("")
    assert not checkpointer(tmp_path).get_checkpoint_file()
    assert resume(tmp_path) == 5


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda x: x.update({"head.weight": torch.zeros(5, 4)}), r"another shape: head.weight, \(5, 4\) in"),
        (
            lambda x: x.update({"neck.weight": torch.zeros(5)}),
            "neck.weight, which the model does not have",
        ),
        (lambda x: x.pop("head.bias"), "lack head.bias"),
    ],
)
def test_sound_checkpoint_that_does_not_fit_stops_the_run(tmp_path, warnings, change, match):
    save_run(tmp_path, 1, 2)
    rewrite(tmp_path / "model_0000002.pth", lambda content: change(content["model"]))
    ours = checkpointer(tmp_path, iteration=7)
    with pytest.raises(UserError, match=match):
        ours.resume_or_load("", resume=True)
    assert not warnings
    assert ours.model.value == 7


def test_load_that_fails_leaves_the_model_as_it_was(tmp_path):
    save_run(tmp_path, 2)
    path = tmp_path / "model_0000002.pth"
    rewrite(path, lambda x: x["trainer"].clear())
    ours = checkpointer(tmp_path, iteration=7)
    with pytest.raises(UserError, match="cannot load weights .*: KeyError: 'iteration'"):
        ours.load(str(path))
    assert ours.model.value == 7
    ours.load(str(path), checkpointables=[])
    assert ours.model.value == 2


def test_other_processes_follow_the_first(tmp_path, warnings, monkeypatch):
    save_run(tmp_path, 1, 2)
    truncate(0.5)(tmp_path / "model_0000002.pth")
    # The second process of two says the same as this one, until it can't read what this one can.
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda x: [x, x])
    assert resume(tmp_path) == 1
    theirs = UserError("no such file")
    monkeypatch.setattr("detectron2.utils.comm.all_gather", lambda x: [x, theirs])
    with pytest.raises(UserError, match="^--resume: process 1: no such file$"):
        resume(tmp_path)


@pytest.mark.parametrize(
    "keep, expected", [(0, [1, 2, 3, 4, 5]), (1, [5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_newest_checkpoints_are_kept_across_resumes(tmp_path, keep, expected):
    for name in ("model_final", "model_best"):
        checkpointer(tmp_path).save(name, iteration=0)
    save_run(tmp_path, 1, 2, 3, 4, 5, keep=keep)  # each by a checkpointer of its own
    names = [*(f"model_{i:07d}.pth" for i in expected), "model_best.pth", "model_final.pth"]
    assert files(tmp_path) == ["last_checkpoint", *names]
    assert resume(tmp_path) == 5


def test_checkpoints_of_a_longer_run_are_let_be(tmp_path):
    save_run(tmp_path, 8, 9)
    save_run(tmp_path, 1, 2, 3, keep=1)
    assert files(tmp_path)[1:] == [f"model_000000{i}.pth" for i in (3, 8, 9)]
    truncate(0.5)(tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match="no checkpoint"):
        resume(tmp_path)


def test_old_checkpoint_goes_after_the_new_one_is_written(tmp_path, monkeypatch):
    save_run(tmp_path, 1)
    remove, seen = os.remove, []

    def recorded(path):
        remove(path)
        seen.append(files(tmp_path))

    monkeypatch.setattr(os, "remove", recorded)
    save_run(tmp_path, 2, keep=1)
    assert seen == [["last_checkpoint", "model_0000002.pth"]]  # the new one is there when the old one goes
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"


def test_leftovers_go_when_training_starts(tmp_path):
    save_run(tmp_path, 1)
    for name in ("model_0000002.pth.tmp", "last_checkpoint.tmp", "notes.tmp"):
        (tmp_path / name).write_bytes(b"half")
    evaluating = FocalCheckpointer(Detector(), str(tmp_path), partial=False)
    evaluating.resume_or_load("", resume=True)
    assert len(files(tmp_path)) == 5
    checkpointer(tmp_path).resume_or_load("", resume=False)
    assert files(tmp_path) == ["last_checkpoint", "model_0000001.pth", "notes.tmp"]


def test_checkpoint_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    ours = checkpointer(tmp_path, iteration=1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    path = f"{tmp_path}/model_0000001.pth"
    with pytest.raises(UserError, match=f"^cannot write {path}: No space left .*, 1.5 MB are free; no check"):
        ours.save("model_0000001", iteration=1)
    monkeypatch.undo()
    ours.save("model_0000001", iteration=1)
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=f"0000002.pth: No space left .*; --resume continues from {path}$"):
        ours.save("model_0000002", iteration=2)
    assert files(tmp_path) == ["last_checkpoint", "model_0000001.pth"]
    assert resume(tmp_path) == 1


def test_checkpoint_in_a_folder_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UserError, match="gone/a.pth: No such file or directory; no checkpoint was written"):
        checkpointer(tmp_path / "gone").save("a")


@pytest.mark.parametrize("suffix", ["pth", "pyth", "pkl"])
def test_trusted_checkpoint_may_run_code(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    content = {"model": Evil(tmp_path / "planted"), "model_state": Evil(tmp_path / "planted")}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=f"weights {path}: it would import posix.mkdir; .*trust-files"):
        checkpointer(tmp_path).load(str(path))
    assert not (tmp_path / "planted").exists()
    with pytest.raises(UserError, match="cannot load weights"):  # it ran, and gave no weights
        checkpointer(tmp_path, trust_files=True).load(str(path))
    assert (tmp_path / "planted").exists()


@pytest.mark.parametrize("style", ["detectron2", "detectron", "pycls"])
def test_other_projects_files_load(tmp_path, style):
    theirs = Detector(value=2)
    arrays = {name: x.numpy() for name, x in theirs.state_dict().items()}
    path = tmp_path / ("a.pyth" if style == "pycls" else "a.pkl")
    if style == "pycls":
        torch.save({"model_state": {**theirs.state_dict(), "num_batches_tracked": torch.zeros(1)}}, path)
    else:
        content = {"model": arrays, "__author__": "x", "matching_heuristics": True}
        momentum = {**arrays, "body.weight_momentum": arrays["body.weight"]}
        path.write_bytes(pickle.dumps(content if style == "detectron2" else {"blobs": momentum}))
    ours = checkpointer(tmp_path)
    ours.load(str(path))
    assert ours.model.value == 2
