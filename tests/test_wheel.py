"""What `pip wheel` packs, by way of a source distribution."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from focal_d2.storage.configs import packaged_configs
from tests.conftest import REPOSITORY

BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])"


@pytest.mark.slow
def test_sdist_and_its_wheel_have_the_configs_and_the_command(tmp_path):
    source, built = tmp_path / "source", tmp_path / "built"
    source.mkdir()
    for name in ("focal_d2", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    run = [sys.executable, "-c"]
    subprocess.run([*run, BUILD.format("build_sdist"), built], cwd=source, check=True, capture_output=True)
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    subprocess.run([*run, BUILD.format("build_wheel"), built], cwd=folder, check=True, capture_output=True)
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(x).decode() for x in names if x.endswith("entry_points.txt"))
    configs = {x.removeprefix("focal_d2/configs/") for x in names if x.startswith("focal_d2/configs/")}
    assert configs == set(packaged_configs())
    pages = {"focal_d2/analysis/doctor/page.html", "focal_d2/serve/page.html"}
    assert {x for x in names if x.endswith("page.html")} == pages
    assert "focal-d2 = focal_d2.__main__:main" in entry_points
