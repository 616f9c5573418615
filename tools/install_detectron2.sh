#!/usr/bin/env bash
# Install detectron2 into the environment of PYTHON, unless it is already there.
# usage: install_detectron2.sh PYTHON wheel|git COMMIT
#
# The registry has detectron2 only as a wheel tagged for CPython 3.10, because of one optional compiled
# extension that nothing here uses. Its Python files run on 3.10 to 3.13, so it is installed by target
# folder, without dependencies (those are pinned in constraints.txt) and without the extension.
set -euo pipefail
python=$1 source=$2 commit=$3

if "$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("detectron2") is None)'; then
  echo "detectron2 is already installed: left as it is"
  exit 0
fi

case $source in
  wheel)
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    echo 'sal-detectron2==0.7.2 --hash=sha256:491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561' >"$work/requirement"
    "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$work/wheel" \
      --python-version 3.10 --implementation cp --abi none --platform any \
      --only-binary=:all: --require-hashes -r "$work/requirement"
    # The extension is built for another interpreter and another torch: detectron2 falls back to Python
    # without it. The wheel's second top-level package, `tools`, would shadow everybody else's.
    rm -f "$work"/wheel/detectron2/_C*.so
    mv "$work"/wheel/detectron2 "$work"/wheel/sal_detectron2-*.dist-info "$site"/
    ;;
  git)
    "$python" -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation \
      "git+https://github.com/facebookresearch/detectron2.git@$commit"
    ;;
  *)
    echo "install_detectron2.sh: DETECTRON2=$source: legal values are wheel and git" >&2
    exit 2
    ;;
esac
