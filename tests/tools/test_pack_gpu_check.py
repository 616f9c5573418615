"""What travels to a GPU machine: its size, its pictures, detectron2's wheel, and the command."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import zipfile

import cv2
import numpy as np
import pytest

from tests.conftest import REPOSITORY

_SPEC = importlib.util.spec_from_file_location("pack_gpu_check", REPOSITORY / "tools/pack_gpu_check.py")
pack = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(pack)


def test_size_is_of_all_files_and_each_once(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/large.whl").write_bytes(bytes(700))
    (tmp_path / "a/small").write_bytes(bytes(200))
    (tmp_path / "beside").write_bytes(bytes(100))
    paths = [tmp_path / "a", tmp_path / "a/small", tmp_path / "beside"]
    assert pack.check_size(paths, 1000) == 1000
    with pytest.raises(SystemExit, match=r"at most 0\.0 may travel; the largest: large\.whl, small, beside"):
        pack.check_size(paths, 999)
    assert pack.MOST_BYTES == 64 * 2**20


def write_dataset(folder):
    """Two splits with one noisy picture each; the second one has no images."""
    (folder / "train").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "train/a.png"), pixels)
    (folder / "train.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "a.png"}]}))
    (folder / "recipe.json").write_text(json.dumps({"version": 1}))


@pytest.mark.parametrize("most_bytes, quality", [(15_000_000, 95), (4000, 85)])
def test_pictures_have_the_best_quality_that_fits(most_bytes, quality, tmp_path):
    write_dataset(tmp_path / "from")
    assert pack.repack_pictures(tmp_path / "from", tmp_path / "to", most_bytes) == quality
    picture = tmp_path / "to/train/a.jpg"
    assert cv2.imread(str(picture)).shape == (64, 64, 3)
    assert picture.stat().st_size <= most_bytes
    content = json.loads((tmp_path / "to/train.json").read_text())
    assert content["images"] == [{"id": 1, "file_name": "a.jpg"}]
    assert json.loads((tmp_path / "to/recipe.json").read_text()) == {"version": 1}


def test_pictures_that_are_too_large_are_refused(tmp_path):
    write_dataset(tmp_path / "from")
    with pytest.raises(SystemExit, match="at most 100 may travel"):
        pack.repack_pictures(tmp_path / "from", tmp_path / "to", 100)


def test_wheel_loses_what_is_for_another_python(tmp_path):
    wheel = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("detectron2/__init__.py", "detectron2/_C.cpython-310.so", "tools/train_net.py"):
            archive.writestr(name, "text")
    pack.thin_wheel(wheel, ("detectron2/_C", "tools/"))
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == ["detectron2/__init__.py"]
    assert list(tmp_path.iterdir()) == [wheel]


def test_pack_has_all_and_says_how_to_start_it(monkeypatch, tmp_path, capsys):
    script = tmp_path / "tools/start_gpu_check.sh"
    script.parent.mkdir()
    script.write_text("exit 0")
    monkeypatch.setattr(pack, "PACK", tmp_path / "pack")
    monkeypatch.setattr(pack, "tracked_files", lambda: [script])
    monkeypatch.setattr(pack, "fetch_wheels", lambda folder: (folder / "a.whl").write_bytes(bytes(1 << 20)))
    monkeypatch.setattr(pack, "REPOSITORY", tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit, match=f"{tmp_path} has no neon_trees: run `focal-d2 data neon_trees`"):
        pack.main()
    assert not (tmp_path / "pack").exists()
    write_dataset(tmp_path / "neon_trees")
    pack.main()
    files = {str(x.relative_to(tmp_path / "pack")) for x in (tmp_path / "pack").rglob("*.*") if x.is_file()}
    pictures = {"datasets/neon_trees/" + x for x in ("recipe.json", "train.json", "train/a.jpg")}
    assert files == {"repository/tools/start_gpu_check.sh", "wheels/a.whl", *pictures}
    out = capsys.readouterr().out
    assert "1.0 MiB with the repository beside it; pictures in JPEG quality 95" in out
    assert out.rstrip().endswith('bash pack/repository/tools/start_gpu_check.sh "$OUT" 9')


def test_command_starts_a_script_that_the_pack_has():
    command = pack.start_command()
    assert len(command) <= 2000
    script = command.split()[1].removeprefix("build/gpu_check/repository/")
    assert REPOSITORY / script in pack.tracked_files()
    subprocess.run(["bash", "-n", str(REPOSITORY / script)], check=True)
