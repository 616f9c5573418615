from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from focal_d2.analysis.new import make
from focal_d2.analysis.new.facts import look
from focal_d2.analysis.new.make import make_config
from focal_d2.analysis.new.probe import Trial, rates_of, steps_within
from focal_d2.analysis.new.recipes import FROM_SCRATCH, Recipe
from focal_d2.analysis.new.sets import dataset_name
from focal_d2.analysis.new.weights import Start
from focal_d2.annotations import Table
from focal_d2.data.datasets import load_table
from focal_d2.data.entries import read_entry
from focal_d2.engine import load_config
from focal_d2.engine.job import run
from focal_d2.errors import UserError
from tests.analysis.new.folders import KINDS, coco, csv_table, voc, yolo

# A tiny network, and two iterations: half of 0.2 minutes at 2.9 seconds each.
TINY = Start(
    Recipe(
        FROM_SCRATCH.base,
        {
            **FROM_SCRATCH.keys,
            "MODEL.BACKBONE.NAME": "TinyPyramid",
            "MODEL.FPN.OUT_CHANNELS": 64,
            "MODEL.RETINANET.NUM_CONVS": 1,
            "DATALOADER.NUM_WORKERS": 0,
        },
        1e-3,
        "a test",
    ),
    "from scratch",
)
MEASURED = Trial(seconds=2.9, rates=[1e-4, 1e-3, 1e-2], losses=[3.0, 2.0, 1.0], test_seconds=1e-5)


# Levels, flips, whether images without boxes are left out, sizes, classes, sets: where the folders differ,
# the configs do.
CHOSEN = {
    "yolo": ("p2-p6", "horizontal", False, True, [104, 111, 119, 126, 133], 3, [1, 1, 0]),
    "voc": ("p3-p7", "horizontal", False, True, [105, 112, 120, 128, 135], 1, [1, 1, 0]),
    "coco": ("p3-p7", "none", False, True, [0], 2, [1, 1, 1]),
    "csv": ("p3-p7", "none", False, False, [88, 94, 100, 106, 112], 2, [1, 1, 0]),
    "tiles": ("p3-p7", "horizontal", True, True, [73, 79, 84, 89, 94], 1, [1, 1, 0]),
}


def new(folder, output, **options):
    options = {
        "minutes": 0.2,
        "trial": lambda cfg, seconds: MEASURED,
        "start": lambda device: TINY,
        **options,
    }
    return make_config(str(folder), str(output), **options)


def digest(folder: Path) -> dict[str, str]:
    return {str(x): hashlib.sha256(x.read_bytes()).hexdigest() for x in folder.rglob("*") if x.is_file()}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The search for anchors takes seconds; its own tests are in tests/analysis/anchors.
    monkeypatch.setattr("focal_d2.analysis.anchors.fit._GENERATIONS", 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_a_config_that_trains(tmp_path, kind):
    folder = KINDS[kind](tmp_path / "data")
    before = digest(folder)
    made = new("data", "mine.yaml")
    assert made.healthy
    assert digest(folder) == before
    check_reasons(made)
    if kind == "tiles":
        check_tiles(made)
    cfg = load_config("mine.yaml", ["DATALOADER.NUM_WORKERS", "0"])
    assert cfg.SOLVER.MAX_ITER == 2
    tables = {
        name: load_table(name).whole()
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.VAL, *cfg.DATASETS.TEST)
    }
    files = [x for table in tables.values() for x in table.file_names]
    assert len(files) == len(set(files))
    seen = (
        cfg.MODEL.FOCAL.FPN.LEVELS,
        cfg.INPUT.RANDOM_FLIP,
        cfg.INPUT.FOCAL.VERTICAL_FLIP,
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        list(cfg.INPUT.MIN_SIZE_TRAIN),
        cfg.MODEL.RETINANET.NUM_CLASSES,
        [len(cfg.DATASETS[x]) for x in ("TRAIN", "VAL", "TEST")],
    )
    assert seen == CHOSEN[kind]
    flags = dict.fromkeys(("resume", "eval_only", "trust_files", "allow_download"), False)
    run(
        argparse.Namespace(config_file="mine.yaml", imports=[], opts=["DATALOADER.NUM_WORKERS", "0"], **flags)
    )
    assert Path("output/mine/model_final.pth").exists()


def check_reasons(made):
    """Each choice has its reason above its first key."""
    lines = Path("mine.yaml").read_text().splitlines()
    assert lines[0].startswith("# Written by focal-d2 new data --minutes 0.2")
    for choice in made.choices:
        if choice.keys and choice.name != "run":
            assert choice.reason, choice.name
            assert any(line.strip().startswith(f"# {choice.name}: ") for line in lines), choice.name
    assert max(len(x) for x in lines if x.strip().startswith("#")) <= 112


def check_tiles(made):
    """No pixel of the two pictures is on both sides."""
    spans = {}
    for dataset in made.sets.datasets:
        for path in dataset.table.file_names:
            name, y, x = Path(path).stem.split("_")
            spans.setdefault(dataset.use, []).append((name, int(y), int(x)))
    for name, y, x in spans["val"]:
        assert all(n != name or abs(y - b) >= 64 or abs(x - a) >= 64 for n, b, a in spans["train"])
    assert "tiles of 2 pictures" in made.sets.reason
    assert "left out" in made.sets.reason


def test_the_same_folder_and_seed_give_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "available_memory", lambda: 10**10)
    monkeypatch.setattr(make, "_busy", lambda: "")
    monkeypatch.setattr(make, "_MOST_CLASSES", 1)  # more are in a file
    csv_table(tmp_path / "data")
    texts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        new("data", f"{name}/mine.yaml")
        texts.append([x.read_text().replace(f"{name}/", "") for x in sorted((tmp_path / name).rglob("*.*"))])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 4
    assert Path("one/mine_lists/classes.txt").read_text() == "3\n7\n"
    assert load_config("one/mine.yaml").MODEL.RETINANET.NUM_CLASSES == 2


def test_nothing_is_replaced(tmp_path):
    csv_table(tmp_path / "data")
    Path("mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="mine.yaml is there already, and is not replaced"):
        new("data", "mine.yaml")
    Path("yours_lists").mkdir()
    with pytest.raises(UserError, match="yours_lists is there already"):
        new("data", "yours.yaml")
    with pytest.raises(UserError, match="mine.txt; it must end in .yaml"):
        new("data", "mine.txt")
    with pytest.raises(UserError, match="no/mine.yaml: no is no folder"):
        new("data", "no/mine.yaml")
    assert Path("mine.yaml").read_text() == "mine"


def test_a_failure_leaves_no_file(tmp_path):
    csv_table(tmp_path / "data")

    def fail(cfg, seconds):
        raise UserError("out of memory")

    with pytest.raises(UserError, match="out of memory"):
        new("data", "mine.yaml", trial=fail)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["data"]


def test_data_that_stop_a_training_are_findings(tmp_path):
    csv_table(tmp_path / "data")
    (tmp_path / "data/scenea.png").write_bytes(b"no image")
    # Its size is not in the table: the reader cannot tell it.
    made = new("data", "mine.yaml")
    assert "scenea.png" in made.problems[0]
    assert (made.config, made.healthy) == (None, False)
    coco(tmp_path / "other")
    (tmp_path / "other/photos/train_a.png").unlink()
    made = new("other", "mine.yaml")
    assert [x.code for x in made.report.findings if x.severity == "error"] == ["image-missing"]
    assert made.config is None
    assert not list(tmp_path.glob("mine*"))


def test_an_unreadable_test_set_of_a_data_file_is_left_out(tmp_path):
    yolo(tmp_path / "data")
    with open("data/data.yaml", "a") as file:
        file.write("test: images/test\n")
    made = new("data", "mine.yaml")
    assert made.healthy
    assert made.notes[0].startswith("left out: data/data.yaml: test: 'images/test' is not there")


def test_a_validation_set_that_is_the_training_set_is_replaced(tmp_path):
    yolo(tmp_path / "data")
    (tmp_path / "data/data.yaml").write_text(
        "train: images/train\nval: images/train\nnames: [ant, bee, fly]\n"
    )
    made = new("data", "mine.yaml")
    assert made.notes[0] == "left out: data.yaml: val has the same images as data.yaml: train"
    assert [(x.use, len(x.table)) for x in made.sets.datasets] == [("train", 5), ("val", 1)]
    assert len(load_table("data_train")) == 5  # through its LIST


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_set_to_train_on_is_needed(tmp_path, name):
    coco(tmp_path / "data")
    (tmp_path / "data/train.json").unlink()
    (tmp_path / "data/test.json").rename(tmp_path / f"data/{name}.json")
    with pytest.raises(
        UserError, match=f"there is only a set called {name} .{name}.json., and none to train on"
    ):
        new("data", "mine.yaml")


def test_xml_files_that_name_their_image_are_listed(tmp_path):
    folder = voc(tmp_path / "data")
    # The image of this file has another name than the file.
    (folder / "Annotations/north/pb.xml").rename(folder / "Annotations/north/other.xml")
    made = new("data", "mine.yaml")
    lines = [x for dataset in made.sets.datasets for x in dataset.images]
    assert "north/other" in lines
    assert len(lines) == len(set(lines)) == 10
    assert len(Table.joined([load_table("data_train"), load_table("data_val")])) == 10


def test_a_trial_trains_and_writes_nothing(tmp_path):
    csv_table(tmp_path / "data")
    made = new("data", "mine.yaml", trial=make.try_training)
    trial = made.trial
    assert trial.seconds > 0
    assert trial.test_seconds > 0
    assert 1 <= len(trial.losses) == len(trial.rates) <= 80
    assert np.isfinite(trial.losses).all()
    assert sorted(x.name for x in tmp_path.iterdir()) == ["data", "mine.yaml", "mine_lists"]


def test_rates_of_a_trial_rise_evenly():
    assert rates_of(3) == pytest.approx([1e-5, (1e-5 * 3e-2) ** 0.5, 3e-2])
    assert [steps_within(60, x) for x in (100, 2, 1e-9)] == [8, 30, 80]


def test_copies_on_both_sides_are_said(tmp_path):
    """Roboflow's augmented copies of one image, in train and in test."""
    coco(tmp_path / "data")
    for split, old in (("train", "train_a"), ("test", "test_a")):
        name = f"cup.rf.{'0' * 15}{split[0]}{'0' * 16}"
        (tmp_path / f"data/photos/{old}.png").rename(tmp_path / f"data/photos/{name}.png")
        text = (tmp_path / f"data/{split}.json").read_text()
        (tmp_path / f"data/{split}.json").write_text(
            text.replace(old, name).replace('"test.json"', '"val.json"')
        )
    (tmp_path / "data/test.json").rename(tmp_path / "data/val.json")
    made = new("data", "mine.yaml")
    assert any("1 of 3 images of val.json show, by their names, the same as" in x for x in made.notes)


def test_georeferenced_tiles_are_cut_by_their_place(tmp_path):
    from PIL import Image, TiffImagePlugin

    lines = ["image,xmin,ymin,xmax,ymax,label"]
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    for i, name in enumerate("qwertzuiop"):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[33550], tags[33922] = (0.5, 0.5, 0.0), (0.0, 0.0, 0.0, 1000.0 + 20 * i, 500.0, 0.0)
        tags.tagtype[33550] = tags.tagtype[33922] = 12
        image = Image.fromarray(rng.integers(60, 120, (64, 64, 3), dtype=np.uint8))
        image.save(tmp_path / f"data/{name}.tif", tiffinfo=tags)
        lines.append(f"{name}.tif,10,10,40,40,roof")
    (tmp_path / "data/boxes.csv").write_text("\n".join(lines) + "\n")
    assert cv2.imread("data/q.tif") is not None
    made = new("data", "mine.yaml")
    assert "positions on a map" in made.sets.reason
    # Images are 32 m wide and 20 m apart: one is left out between two in a row and the others.
    stems = {x.use: "".join(sorted(Path(f).stem for f in x.table.file_names)) for x in made.sets.datasets}
    assert stems in (
        {"val": "qw", "train": "".join(sorted("rtzuiop"))},
        {"val": "op", "train": "".join(sorted("qwertzu"))},
    )


def test_names_of_other_datasets_are_not_taken(tmp_path):
    assert [dataset_name(f"{tmp_path}/{x}") for x in ("coco_2017", "my fields!", "...")] == [
        "my_coco_2017",
        "my_fields",
        "mine",
    ]


def test_copies_of_an_image_stay_on_one_side_also_of_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr("focal_d2.analysis.new.facts._MOST_PIXELS", 1)
    folder = csv_table(tmp_path / "data")
    for old, other in zip("bcdef", "hijkl", strict=True):
        (folder / f"scene{other}.png").write_bytes((folder / f"scene{old}.png").read_bytes())
    table = read_entry({"FORMAT": "csv", "IMAGES": "data", "ANNOTATIONS": "data/boxes.csv"})
    looked = look(table, search=True, max_pixels=None)
    assert looked.shared == [(i, i + 6) for i in range(1, 6)]
    assert not looked.searched
