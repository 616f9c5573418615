"""Pack what `focal-d2 gpu-check` needs on a machine without a network, and print the command to run there.

    python tools/pack_gpu_check.py

The pack, build/gpu_check/, has the tracked files of this repository, wheels for Python 3.12, and the pictures
of the demo as JPEG. The machine has PyTorch, torchvision, Triton, NumPy, OpenCV and pytest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACK = REPOSITORY / "build" / "gpu_check"

MOST_BYTES = 64 * 2**20  # of the pack and the repository beside it
MOST_PICTURE_BYTES = 15_000_000
MOST_COMMAND = 2000  # characters
_MINUTES = 9  # a call may take 10
_QUALITIES = (95, 92, 90, 85, 80)  # of JPEG; the first one that is small enough

# With the versions of constraints.txt, where it has them. The requirements of PyTorch and torchvision are on
# the machine; of these, detectron2 needs an older setuptools. Only matplotlib's PDF needs fonttools.
_BINARY = (
    "absl-py", "cloudpickle", "contourpy", "cycler", "execnet", "grpcio", "hotcoco", "hydra-core",
    "kiwisolver", "Markdown", "matplotlib", "msgspec", "omegaconf", "packaging", "portalocker", "protobuf",
    "pycocotools", "pyparsing", "pytest-xdist", "python-dateutil", "PyYAML", "setuptools", "six", "tabulate",
    "tensorboard", "termcolor", "tqdm", "Werkzeug", "yacs",
)  # fmt: skip
# They have no wheels; theirs are built here, and fit every Python.
_SOURCE = ("antlr4-python3-runtime", "fvcore", "iopath")
_DETECTRON2 = "sal-detectron2==0.7.2"
# What of it is left out: an extension for another Python, and a package whose name anybody may use.
_LEFT_OUT = ("detectron2/_C", "tools/")


def main() -> None:
    """Make the pack anew."""
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", REPOSITORY / "datasets"))
    if not (datasets / "neon_trees").is_dir():
        raise SystemExit(f"{datasets} has no neon_trees: run `focal-d2 data neon_trees`")
    shutil.rmtree(PACK, ignore_errors=True)
    wheels = PACK / "wheels"
    wheels.mkdir(parents=True)
    copy_repository(PACK / "repository")
    fetch_wheels(wheels)
    quality = repack_pictures(datasets / "neon_trees", PACK / "datasets" / "neon_trees")
    size = check_size([PACK, *tracked_files()])
    command = start_command()
    print(f"{PACK}: {size / 2**20:.1f} MiB with the repository beside it; pictures in JPEG quality {quality}")
    print(f"Carry {PACK.relative_to(REPOSITORY)} to the GPU machine, and run in the repository's root:")
    print(command)


def tracked_files() -> list[Path]:
    """Return the files that git tracks here."""
    result = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    files = [REPOSITORY / name for name in result.stdout.split("\0") if name]
    return [file for file in files if file.is_file()]


def copy_repository(target: Path) -> None:
    """Copy the tracked files as they are in the working tree."""
    for file in tracked_files():
        place = target / file.relative_to(REPOSITORY)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, place)


def fetch_wheels(folder: Path) -> None:
    """Download wheels for Python 3.12 on x86-64 Linux, and build those that the registry does not have."""
    constraints = ["--constraint", str(REPOSITORY / "constraints.txt")]
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in (34, 28, 27, 17, 12)] + ["manylinux2014_x86_64"]
    target = ["--python-version", "3.12", "--implementation", "cp", "--only-binary=:all:"]
    for platform in platforms:
        target += ["--platform", platform]
    _pip("download", *constraints, *target, "--dest", str(folder), *_BINARY)
    _pip("wheel", *constraints, "--wheel-dir", str(folder), *_SOURCE)
    target = ["--python-version", "3.10", "--implementation", "cp", "--abi", "none", "--platform", "any"]
    _pip("download", *target, "--only-binary=:all:", "--dest", str(folder), _DETECTRON2)
    (wheel,) = folder.glob("sal_detectron2-*.whl")
    thin_wheel(wheel, _LEFT_OUT)


def _pip(command: str, *arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments], check=True, cwd=PACK
    )


def thin_wheel(wheel: Path, left_out: tuple[str, ...]) -> None:
    """Rewrite a wheel without the members whose names begin so."""
    thin = wheel.with_suffix(".thin")
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(thin, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            if not member.filename.startswith(left_out):
                new.writestr(member.filename, old.read(member))
    thin.replace(wheel)


def repack_pictures(source: Path, target: Path, most_bytes: int = MOST_PICTURE_BYTES) -> int:
    """Write a dataset of COCO files with pictures as JPEG, of the best quality that is small enough.

    Args:
        source: with NAME.json and a folder NAME of pictures, for each split.
        target: a new folder.
        most_bytes: of all pictures together.

    Returns:
        The quality.
    """
    import cv2

    for quality in _QUALITIES:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        total = 0
        for file in sorted(source.glob("*.json")):
            content = json.loads(file.read_text())
            for image in content.get("images", ()):  # recipe.json has none
                picture = source / file.stem / image["file_name"]
                image["file_name"] = f"{picture.stem}.jpg"
                place = target / file.stem / image["file_name"]
                place.parent.mkdir(exist_ok=True)
                cv2.imwrite(str(place), cv2.imread(str(picture)), [cv2.IMWRITE_JPEG_QUALITY, quality])
                total += place.stat().st_size
            (target / file.name).write_text(json.dumps(content))
        if total <= most_bytes:
            return quality
    raise SystemExit(f"{source}: {total} bytes of JPEG of quality {quality}; at most {most_bytes} may travel")


def check_size(paths: Iterable[Path], most_bytes: int = MOST_BYTES) -> int:
    """Return the bytes of files, and of all files in folders; exit if they are too many to travel."""
    sizes: dict[Path, int] = {}
    for path in paths:
        files = [x for x in path.rglob("*") if x.is_file()] if path.is_dir() else [path]
        sizes.update({x: x.stat().st_size for x in files})
    total = sum(sizes.values())
    if total > most_bytes:
        largest = ", ".join(x.name for x in sorted(sizes, key=lambda x: -sizes[x])[:5])
        sizes_in_mib = f"{total / 2**20:.1f} MiB, and at most {most_bytes / 2**20:.1f}"
        raise SystemExit(f"{sizes_in_mib} may travel; the largest: {largest}")
    return total


def start_command() -> str:
    """Return the command for the GPU machine, where OUT is the folder of the results."""
    script = (PACK / "repository" / "tools" / "start_gpu_check.sh").relative_to(REPOSITORY)
    command = f'bash {script} "$OUT" {_MINUTES}'
    assert len(command) <= MOST_COMMAND
    return command


if __name__ == "__main__":
    main()
