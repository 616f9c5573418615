from __future__ import annotations

import csv
import json
import os
import re

import cv2
import numpy as np
import pytest
import torch
import yaml
from detectron2.modeling import build_model
from PIL import Image

from focal_d2.commands.predict import _split
from focal_d2.data import FocalDatasetMapper
from focal_d2.data.readers.coco import read_coco
from focal_d2.data.readers.csv_file import read_csv
from focal_d2.data.readers.yolo import read_yolo
from focal_d2.engine import load_config
from focal_d2.evaluation.operating_point import OperatingPoint
from focal_d2.inference import Predictor
from focal_d2.inference.records import Records
from focal_d2.inference.strip import strip_file
from focal_d2.model_card import card_of
from tests.conftest import make_cfg
from tests.engine.runs import run_command
from tests.storage.test_weights import Evil


@pytest.fixture
def job(coco_dataset, tmp_path):
    """A config file with its dataset, and weights that find something everywhere."""
    data = coco_dataset(images=2)
    cfg = make_cfg(DATASETS__TEST=(data.name,), MODEL__RETINANET__SCORE_THRESH_TEST=0.001)
    cfg.DATASETS.FOCAL = [data.entry]
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    yaml.safe_load(config.read_text())
    return config, data


def predict(monkeypatch, config, *argv) -> int:
    return run_command(monkeypatch, "predict", "--config-file", config, "--threshold", 0.0, *argv)


def test_threshold_is_the_checkpoint_s_operating_point_or_0_3(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = ["--config-file", config, data.images / "0.png", "--json"]

    def run() -> tuple[list[float], str]:
        assert run_command(monkeypatch, "predict", *arguments) == 0
        out, err = capsys.readouterr()
        (scores,) = (json.loads(x)["scores"] for x in out.splitlines() if x.startswith("{"))
        return scores, next(x for x in err.splitlines() if x.startswith("threshold: "))

    scores, line = run()
    assert all(score >= 0.3 for score in scores)
    assert line.startswith("threshold: score 0.3, because the checkpoint has no operating point; --threshold")
    point = OperatingPoint(0.001, 0.8, 0.4, 0.53, "best F1", "mine_val", True)
    weights = tmp_path / "model.pth"
    torch.save({**torch.load(weights), "operating_point": point._asdict()}, weights)
    more, line = run()
    assert len(more) > len(scores)
    assert line.startswith(f"threshold: {point}; --threshold")


def test_dataset_is_drawn_beside_its_ground_truth(job, tmp_path, monkeypatch, capsys):
    config, data = job
    assert predict(monkeypatch, config, "--dataset", data.name, "--output", tmp_path / "out") == 0
    assert "2 images in" in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "out/pictures/0.png"))
    image = cv2.imread(str(data.images / "0.png"))
    assert picture.shape == (64, 64 + 8 + 64, 3)
    x, y, w, h = json.loads(data.annotations.read_text())["annotations"][0]["bbox"]
    assert not np.array_equal(picture[y : y + h, x : x + w], image[y : y + h, x : x + w])


def test_names_that_are_not_utf_8_are_read_and_written(job, tmp_path, monkeypatch, capfd):
    config, data = job
    folder, name = tmp_path / os.fsdecode(b"B\xe4ume"), os.fsdecode(b"f\xfcnf")
    folder.mkdir()
    (data.images / "0.png").rename(folder / f"{name}.png")
    formats = ["--format", "pictures,csv,coco,yolo"]
    assert predict(monkeypatch, config, folder, "--output", tmp_path / "out", "--json", *formats) == 0
    assert predict(monkeypatch, config, folder, "--output", folder / "out", *formats) == 0
    for file in (f"pictures/{name}.png", f"labels/{name}.txt", "detections.csv", "detections.json"):
        written = (folder / "out" / file).read_bytes()
        assert written == (tmp_path / "out" / file).read_bytes()
    assert b"f\xfcnf.png,0" in (folder / "out/detections.csv").read_bytes()
    written = (folder / "out" / f"pictures/{name}.png").read_bytes()
    assert cv2.imdecode(np.frombuffer(written, np.uint8), cv2.IMREAD_COLOR).shape == (64, 64, 3)
    (detections,) = [json.loads(x) for x in capfd.readouterr().out.splitlines() if x.startswith("{")]
    assert detections["file"] == str(folder / f"{name}.png")


def test_threshold_hides_what_is_below_it(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = [data.images, "--json", "--threshold", 0.99]
    assert predict(monkeypatch, config, *arguments) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [x["boxes"] for x in lines] == [[], []]


def test_detections_that_the_limit_cut_off_are_counted(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = [data.images, "--json"]

    def run(*more):
        assert predict(monkeypatch, config, *arguments, *more) == 0
        out, err = capsys.readouterr()
        warnings = [x for x in err.splitlines() if "DETECTIONS_PER_IMAGE" in x]
        return [json.loads(x)["scores"] for x in out.splitlines() if x.startswith("{")], warnings

    whole, _ = run("TEST.DETECTIONS_PER_IMAGE", 20)
    assert [len(scores) for scores in whole] == [20, 20]
    cut, warnings = run("TEST.DETECTIONS_PER_IMAGE", 5)
    assert cut == [scores[:5] for scores in whole]
    assert warnings == [
        f"TEST.DETECTIONS_PER_IMAGE 5 cuts off detections above the threshold in 2 of 2 images; the first is "
        f"{data.images / '0.png'}"
    ]
    # Five above the threshold are all that there are.
    threshold = (whole[0][4] + whole[0][5]) / 2
    assert whole[0][4] > threshold > whole[0][5]
    limited, warnings = run("--threshold", threshold, "TEST.DETECTIONS_PER_IMAGE", 5)
    assert len(limited[0]) == 5
    assert not any(str(data.images / "0.png") in x for x in warnings)


def test_folder_gives_json_lines(job, tmp_path, monkeypatch, capsys):
    config, data = job
    arguments = [data.images, "--output", tmp_path / "out", "--json"]
    assert predict(monkeypatch, config, *arguments) == 0
    lines = [json.loads(x) for x in capsys.readouterr().out.splitlines() if x.startswith("{")]
    assert [x["file"] for x in lines] == [str(data.images / f"{i}.png") for i in (0, 1)]
    for line in lines:
        assert len(line["boxes"]) == len(line["scores"]) == len(line["classes"]) > 0
        assert set(line["classes"]) <= {"class0", "class1", "class2"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["nowhere*.png"], "nowhere*.png: no image or video has such a name"),
        (["nothing"], "nothing: no images in this folder"),
        ([], "give images, folders or videos, or --dataset NAME, and not both"),
        ([".", "--dataset", "x"], "give images, folders or videos, or --dataset NAME, and not both"),
        ([".", "SEED"], "overrides must be KEY VALUE pairs; SEED has no value"),
        ([".", "--shard", "4/3"], "4/3 is not I/N with I from 1 to N"),
        ([".", "--format", "csv,voc"], '"voc" is none of pictures, csv, coco, yolo, none'),
        ([".", "--batch-size", "0"], "0 is not a whole number above 0"),
        ([".", "--join"], "--join takes --output and --format only"),
        (["--join"], "--join: out has no records of a run"),
        (["--dataset", "nowhere"], '"nowhere" is not registered'),
        (["--dataset", ""], '"" is not registered'),
        (["pictures/image.png", "--output", "."], "would be overwritten"),
        (["image.png", "--output", "file"], "output folder file"),
        (["image.png", "MODEL.WEIGHTS", ""], "MODEL.WEIGHTS is empty"),
    ],
)
def test_mistakes_give_one_line_and_status_2(job, tmp_path, monkeypatch, capsys, arguments, expected):
    (tmp_path / "file").touch()
    for folder in ("nothing", "pictures"):
        (tmp_path / folder).mkdir()
    for name in ("image.png", "pictures/image.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((64, 64, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    assert predict(monkeypatch, job[0], "--output", "out", *arguments) == 2
    assert expected in capsys.readouterr().err


def test_files_that_run_code_are_refused_unless_trusted(job, tmp_path, monkeypatch, capsys):
    config, data = job
    plain = config.read_text()
    arguments = [data.images, "--json"]
    planted = tmp_path / "planted"
    config.write_text(plain.replace("SEED: 1", f"SEED: !!python/object/apply:os.system ['mkdir {planted}']"))
    assert predict(monkeypatch, config, *arguments) == 2
    assert "the tag !!python/object/apply:os.system is refused" in capsys.readouterr().err
    assert not planted.exists()
    assert predict(monkeypatch, config, "--trust-files", *arguments) == 0
    assert planted.exists()

    config.write_text(plain)
    planted.rmdir()
    weights = tmp_path / "model.pth"
    torch.save({**torch.load(weights), "more": Evil(planted)}, weights)
    assert predict(monkeypatch, config, *arguments) == 2
    assert "it would import posix.mkdir" in capsys.readouterr().err
    assert not planted.exists()
    assert predict(monkeypatch, config, "--trust-files", *arguments) == 0
    assert planted.exists()


@pytest.fixture
def model(job, tmp_path):
    """A checkpoint that has its config in it."""
    cfg = load_config(str(job[0]))
    strip_file(tmp_path / "model.pth", tmp_path / "small.pth", card=card_of(cfg))
    return tmp_path / "small.pth"


def run_model(monkeypatch, model, *argv) -> int:
    return run_command(monkeypatch, "predict", "--model", model, "--threshold", 0.0, *argv)


def test_inputs_end_where_overrides_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _split(["a.png", "MODEL.DEVICE", "cpu", "SEED", "1"]) == (
        ["a.png"],
        ["MODEL.DEVICE", "cpu", "SEED", "1"],
    )
    assert _split(["IMG_1.JPG", "x"]) == (["IMG_1.JPG", "x"], [])
    (tmp_path / "TEST.PNG").touch()
    assert _split(["TEST.PNG", "TEST.DETECTIONS_PER_IMAGE", "5"])[0] == ["TEST.PNG"]


def test_options_may_stand_behind_inputs(model, job, monkeypatch, capsys):
    images = job[1].images
    assert (
        run_model(monkeypatch, model, images / "0.png", "--json", images / "1.png", "MODEL.DEVICE", "cpu")
        == 0
    )
    assert len([x for x in capsys.readouterr().out.splitlines() if x.startswith("{")]) == 2
    arguments = ["--model", "weights.bin", images, "--json"]
    assert run_command(monkeypatch, "predict", *arguments) == 2
    assert "a checkpoint of another name (not .pth) needs --config-file" in capsys.readouterr().err


def test_every_format_can_be_read_as_annotations(model, job, tmp_path, monkeypatch):
    """Detections become pre-labels: our own readers read them."""
    images = tmp_path / "deep"
    for i, name in enumerate(("a/x.png", "a/x.jpg", "b/c/y.png")):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        picture = cv2.imread(str(job[1].images / f"{i % 2}.png"))
        cv2.imwrite(str(images / name), picture[: 64 - 8 * i])
    out = images / "out"  # its pictures are no inputs of the second run
    arguments = [images, "--output", out, "--format", "csv,coco,yolo,pictures"]
    for _ in range(2):
        assert run_model(monkeypatch, model, *arguments, "TEST.DETECTIONS_PER_IMAGE", "7") == 0
    records = [json.loads(x) for x in (out / "records.jsonl").read_text().splitlines()]
    assert [x["file"] for x in records] == [
        f"{images}/{name}" for name in ("a/x.jpg", "a/x.png", "b/c/y.png")
    ]
    assert [(x["width"], x["height"], len(x["boxes"])) for x in records] == [
        (64, 56, 7),
        (64, 64, 7),
        (64, 48, 7),
    ]
    for name in ("a/x_jpg", "a/x_png", "b/c/y"):
        assert (out / f"pictures/{name}.png").is_file()
    names = [f"class{k}" for k in range(3)]
    from_csv = read_csv(str(out / "detections.csv"), str(images), classes=names)
    from_coco = read_coco(str(out / "detections.json"), str(images))
    for ending in ("png", "jpg"):
        (images / f"a/x.{ending}").rename(images / f"a/x_{ending}.{ending}")
    from_yolo = read_yolo(str(out / "labels"), str(images), classes=names)
    boxes = [box for x in records for box in x["boxes"]]
    expected = [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in boxes]
    for table in (from_csv, from_coco):
        np.testing.assert_allclose(table.boxes, expected, atol=0.006)
        assert table.labels.tolist() == [k for x in records for k in x["labels"]]
    assert len(from_yolo.problems) == 0
    np.testing.assert_allclose(from_yolo.boxes, expected, atol=0.01)
    rows = list(csv.DictReader((out / "detections.csv").open()))
    assert [float(x["score"]) for x in rows] == [score for x in records for score in x["scores"]]


def kinds_of_images(folder, picture):
    """Write a picture in many ways; return the names that can be read and those that can't."""
    image = Image.fromarray(picture[:, :, ::-1])
    image.save(folder / "plain.jpg")
    image.convert("RGBA").save(folder / "alpha.png")
    image.convert("LA").save(folder / "grey_alpha.png")
    image.convert("P").save(folder / "palette.gif")
    image.convert("L").save(folder / "grey.png")
    image.convert("1").save(folder / "bits.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    image.save(folder / "web.webp")
    cv2.imwrite(str(folder / "sixteen.png"), picture.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "sixteen_grey.tif"), picture[:, :, 0].astype(np.uint16) * 257)
    good = sorted(os.listdir(folder))
    data = (folder / "plain.jpg").read_bytes()
    (folder / "empty.png").touch()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "text.tif").write_text("no image")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(folder / "float.tif")
    return good, sorted({*os.listdir(folder)} - {*good})


@pytest.mark.parametrize("backend", ["pil", "opencv"])
def test_images_of_every_kind_are_read_as_training_reads_them_or_named(
    model, job, tmp_path, monkeypatch, capsys, backend
):
    folder = tmp_path / "kinds"
    folder.mkdir()
    good, bad = kinds_of_images(folder, cv2.imread(str(job[1].images / "0.png")))
    seen = []
    prepare = Predictor.prepare
    monkeypatch.setattr(Predictor, "prepare", lambda self, x: seen.append((x, y := prepare(self, x))) or y)
    options = ["--json", "--output", tmp_path / "out", "INPUT.FOCAL.BACKEND", backend]
    assert run_model(monkeypatch, model, folder, *options) == 1
    out, err = capsys.readouterr()
    records = {os.path.basename(x["file"]): x for x in map(json.loads, out.splitlines())}
    assert sorted(name for name, x in records.items() if "error" in x) == bad
    assert sorted(name for name, x in records.items() if "boxes" in x) == good
    for name in bad:
        assert re.search(f"^cannot read image .*{name}: ", err, re.MULTILINE)
    assert f"4 of {len(good + bad)} files can't be read; {tmp_path}/out names them" in err
    cfg = load_config(str(model), ["INPUT.FOCAL.BACKEND", backend])
    mapper = FocalDatasetMapper(cfg, is_train=False)
    assert len(seen) == len(good)
    for file, prepared in seen:
        assert torch.equal(prepared.tensor, mapper({"file_name": file})["image"])


@pytest.fixture
def many(job, tmp_path):
    """A folder of 26 images of two sizes, of which 3 are damaged."""
    folder = tmp_path / "many"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(26):
        size = (64, 96 if i % 3 else 64, 3)
        cv2.imwrite(str(folder / f"{i:02d}.png"), rng.integers(0, 256, size, dtype=np.uint8))
    for i in (0, 9, 10):
        (folder / f"{i:02d}.png").write_bytes(b"damaged")
    return folder


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_twice_is_resumed_to_the_bit(model, many, tmp_path, monkeypatch, capsys):
    arguments = [many, "--batch-size", 4, "TEST.DETECTIONS_PER_IMAGE", "5"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_model(monkeypatch, model, *arguments, "--output", whole) == 1
    forwarded = []
    detect = Predictor.detect
    monkeypatch.setattr(Predictor, "detect", lambda self, x: forwarded.extend(x) or detect(self, x))
    write = Records.write
    calls = []

    def killed(self, lines):
        """Write half of the last line of the third batch, and no more."""
        calls.append(lines := list(lines))
        if len(calls) < 3:
            return write(self, lines)
        self._file.write("\n".join([*lines[:-1], lines[-1][: len(lines[-1]) // 2]]).encode())
        self._file.flush()
        raise Killed

    for _ in range(2):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Records, "write", killed)
            with pytest.raises(Killed):
                run_model(patch, model, *arguments, "--output", broken, "--resume")
        assert not (broken / "records.jsonl").read_bytes().endswith(b"\n")
    capsys.readouterr()
    # Without --resume, what was done is not lost; and what changed is named.
    for changed, message in (
        ([], "is of a run that has not ended (19 of 26 images): --resume continues it"),
        (["--resume", "--threshold", 0.5], "--resume: the threshold (0.0, now 0.5) changed since"),
        (["--resume", "--format", "csv"], "--resume: whether pictures are written (True, now False) changed"),
        (["--resume", model.parent / "train/images/0.png"], "the number of inputs (26, now 27) changed"),
        (["--resume", "--batch-size", 5], "the batch size (4, now 5) changed"),
        (["--resume", "MODEL.RETINANET.NMS_THRESH_TEST", "0.4"], "the config changed"),
    ):
        command = [many, "--batch-size", 4, *changed, "TEST.DETECTIONS_PER_IMAGE", "5"]
        assert run_model(monkeypatch, model, *command, "--output", broken) == 2
        assert message in capsys.readouterr().err
    content = torch.load(model)
    content["model"]["head.cls_score.bias"] += 0.01
    torch.save(content, tmp_path / "other.pth")
    assert run_model(monkeypatch, tmp_path / "other.pth", *arguments, "--output", broken, "--resume") == 2
    assert "the weights changed" in capsys.readouterr().err

    assert run_model(monkeypatch, model, *arguments, "--output", broken, "--resume") == 1
    assert "3 of 26 files can't be read" in capsys.readouterr().err
    for file in ("records.jsonl", "detections.csv", "pictures/05.png"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
    # 23 images can be read. Each of the two stops cost at most a batch of 4.
    assert len(forwarded) <= 23 + 2 * 4
    # A run that has ended does nothing when it is resumed.
    forwarded.clear()
    assert run_model(monkeypatch, model, *arguments, "--output", broken, "--resume") == 1
    assert len(forwarded) == 0
    assert (broken / "records.jsonl").read_bytes() == (whole / "records.jsonl").read_bytes()


def test_shards_join_to_the_records_of_one_run(model, many, tmp_path, monkeypatch, capsys):
    arguments = [many, "--batch-size", 4, "TEST.DETECTIONS_PER_IMAGE", "5"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    formats = ["--format", "csv,coco,pictures"]
    assert run_model(monkeypatch, model, *arguments, *formats, "--output", whole) == 1
    join = ["predict", "--join", "--output", parts, *formats]
    for i, status in ((3, 0), (1, 1)):
        shard = ["--shard", f"{i}/3", *formats]
        assert run_model(monkeypatch, model, *arguments, *shard, "--output", parts) == status
    assert run_command(monkeypatch, *join) == 2
    assert f"--join: {parts} lacks shard 2 of 3" in capsys.readouterr().err
    run_model(monkeypatch, model, *arguments, *formats, "--shard", "2/3", "--output", parts)
    records = parts / "records_2_of_3.jsonl"
    content = records.read_bytes()
    records.write_bytes(content[:-5])
    assert run_command(monkeypatch, *join) == 2
    assert "--join: shard 2 of 3 has 7 of 8 images: --resume continues it" in capsys.readouterr().err
    run_model(monkeypatch, model, *arguments, *formats, "--shard", "2/3", "--resume", "--output", parts)
    assert records.read_bytes() == content
    run = parts / "run_3_of_3.json"
    text = run.read_text()
    run.write_text(text.replace("0.0", "0.25"))
    assert run_command(monkeypatch, *join) == 2
    assert "--join: shard 3 of 3 differs from shard 1 in the threshold" in capsys.readouterr().err
    run.write_text(text)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)  # names do not depend on the working folder
    assert run_command(monkeypatch, *join) == 0
    assert "26 images in" in capsys.readouterr().out
    for file in ("records.jsonl", "detections.csv", "detections.json", "run.json", "pictures/05.png"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes()
    # The same command makes other formats of a run that has ended.
    assert run_command(monkeypatch, "predict", "--join", "--output", whole, "--format", "yolo") == 0
    assert (whole / "labels/05.txt").is_file()
    run.write_text("{}")
    assert run_command(monkeypatch, *join) == 2
    assert "run_3_of_3.json is damaged" in capsys.readouterr().err


def test_names_are_the_same_from_every_folder(model, many, tmp_path, monkeypatch):
    """Relative paths are resolved without the working folder of the run."""
    monkeypatch.chdir(many)
    assert (
        run_model(monkeypatch, model, "01.png", "../many/02.png", "--output", "../out", "--format", "csv")
        == 0
    )
    text = (tmp_path / "out/detections.csv").read_bytes()
    assert {x.split(b",")[0] for x in text.splitlines()[1:]} == {b"01.png", b"02.png"}
    monkeypatch.chdir("/")
    assert run_command(monkeypatch, "predict", "--join", "--output", tmp_path / "out", "--format", "csv") == 0
    assert (tmp_path / "out/detections.csv").read_bytes() == text


def write_video(path, frames: int = 5) -> None:
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (96, 64))
    for i in range(frames):
        writer.write(np.full((64, 96, 3), 4 * i, np.uint8))
    writer.release()


def test_a_video_gives_a_record_a_frame_and_a_video(model, job, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "a.mp4")
    inputs = [job[1].images / "0.png", tmp_path / "a.mp4", job[1].images / "1.png"]
    out = tmp_path / "out"
    formats = ["--format", "csv,coco,yolo,pictures", "--batch-size", 2]
    assert run_model(monkeypatch, model, *inputs, "--output", out, *formats) == 0
    records = [json.loads(x) for x in (out / "records.jsonl").read_text().splitlines()]
    assert [x.get("frame") for x in records] == [None, 0, 1, 2, 3, 4, None]
    assert [x["seconds"] for x in records[1:6]] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert (records[1]["width"], records[1]["height"]) == (96, 64)
    capture = cv2.VideoCapture(str(out / "pictures/a.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 5
    assert (out / "labels/a_000004.txt").is_file()
    assert "a.mp4#000004" in (out / "detections.csv").read_text()
    for option in ("--resume", "--shard=1/2"):
        assert run_model(monkeypatch, model, *inputs, "--output", tmp_path / "other", option) == 2
        assert "a.mp4 is a video; --resume and --shard are for images" in capsys.readouterr().err


def test_videos_that_can_not_be_read_are_named(model, tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "good.avi")
    (tmp_path / "list.mp4").write_text("#EXTM3U\nhttps://example.org/a.ts\n")
    (tmp_path / "empty.mkv").touch()
    write_video(tmp_path / "cut.mp4", frames=60)
    whole = (tmp_path / "cut.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    assert (
        run_model(monkeypatch, model, tmp_path / "*.[ma]*", "--json", "INPUT.FOCAL.MAX_PIXELS", "9999") == 1
    )
    out, err = capsys.readouterr()
    records = [json.loads(x) for x in out.splitlines()]
    assert sum("frame" in x for x in records) == 5
    assert "list.mp4: its content is not of a format that is read (AVI, Matroska, MP4" in err
    assert "empty.mkv: its content is not of a format" in err
    assert "cut.mp4" in err
    assert (
        run_model(monkeypatch, model, tmp_path / "good.avi", "--json", "INPUT.FOCAL.MAX_PIXELS", "100") == 1
    )
    assert "its frames have 96 × 64 pixels, more than INPUT.FOCAL.MAX_PIXELS 100" in capsys.readouterr().err


def test_an_image_that_memory_is_too_small_for_is_named(model, many, tmp_path, monkeypatch, capsys):
    forward = Predictor._forward

    def too_small(self, images, indices):
        if any(images[i].width == 64 for i in indices):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images, indices)

    monkeypatch.setattr(Predictor, "_forward", too_small)
    assert run_model(monkeypatch, model, many, "--json", "--batch-size", 4) == 1
    out, err = capsys.readouterr()
    assert "06.png: out of memory; the image has 64 × 64 pixels" in err
    assert sum("boxes" in x for x in map(json.loads, out.splitlines())) == 16


def test_pictures_in_tiles_have_no_limit_and_damaged_ones_are_named(model, many, monkeypatch, capsys):
    cv2.imwrite(str(many / "large.png"), np.random.default_rng(0).integers(0, 256, (200, 400, 3), np.uint8))
    options = [
        "TEST.FOCAL.TILES.ENABLED",
        "True",
        "TEST.FOCAL.TILES.WINDOW",
        256,
        "TEST.FOCAL.TILES.OVERLAP",
        128,
    ]
    limit = ["TEST.DETECTIONS_PER_IMAGE", 5]
    inputs = [many / name for name in ("large.png", "00.png", "01.png")]
    assert run_model(monkeypatch, model, *inputs, "--json", *options, *limit) == 1
    out, err = capsys.readouterr()
    large, damaged, small = map(json.loads, out.splitlines())
    assert 5 < len(large["boxes"]) <= 15
    assert len(small["boxes"]) == 5
    assert "cannot read image" in damaged["error"]
    assert "DETECTIONS_PER_IMAGE" not in err
