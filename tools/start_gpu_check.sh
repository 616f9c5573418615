#!/usr/bin/env bash
# Run `focal-d2 gpu-check` in a folder that tools/pack_gpu_check.py made, on a machine without a network.
# usage: start_gpu_check.sh OUTPUT MINUTES [OPTIONS of gpu-check]
#
# The machine has Python 3.12, PyTorch, torchvision, Triton, NumPy, OpenCV and pytest; the pack has the rest.
set -euo pipefail
mkdir -p "$1"
output=$(cd "$1" && pwd) minutes=$2
shift 2
pack=$(cd "$(dirname "$0")/../.." && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

# Wheels are archives of folders for a path of modules. pip would refuse detectron2's, which is for Python 3.10.
python3 - "$site" "$pack"/wheels/*.whl <<'PYTHON'
import sys
import zipfile

for wheel in sys.argv[2:]:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(sys.argv[1])
PYTHON

cd "$pack/repository"
export PYTHONPATH="$PWD:$site" DETECTRON2_DATASETS="$pack/datasets" PYTHONUNBUFFERED=1
python3 -m focal_d2 gpu-check --minutes "$minutes" --output "$output" "$@" 2>&1 | tee "$output/log.txt"
