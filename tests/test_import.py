"""What importing the package takes along, and what it registers; each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import focal_d2

# What a training in plain detectron2 does not need.
UNUSED = (
    "focal_d2.analysis", "focal_d2.commands", "focal_d2.data.mapper", "focal_d2.data.readers",
    "focal_d2.data.embedded.digits", "focal_d2.engine", "focal_d2.evaluation", "focal_d2.inference",
    "hotcoco", "wandb",
)  # fmt: skip


def modules_after(*arguments: str) -> set[str]:
    """The modules that a Python process has imported when it ends."""
    command = [sys.executable, "-X", "importtime", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [x.rsplit("|", 1) for x in result.stderr.splitlines() if x.startswith("import time:")]
    return {name.strip() for _, name in lines}


@pytest.mark.slow
def test_importing_the_package_registers_and_takes_nothing_else_along():
    names = ["FocalRetinaNet", "build_focal_resnet_fpn_backbone", "neon_trees_test", "digits_train"]
    code = (
        "import sys, json, detectron2.modeling as m, detectron2.data as d\n"
        "before = set(sys.modules)\n"
        "import focal_d2\n"
        "found = [m.META_ARCH_REGISTRY.get('FocalRetinaNet').__name__,\n"
        "         m.BACKBONE_REGISTRY.get('build_focal_resnet_fpn_backbone').__name__]\n"
        "found += [x for x in ('neon_trees_test', 'digits_train') if x in d.DatasetCatalog.list()]\n"
        "new = sorted(set(sys.modules) - before)\n"
        "focal_d2.add_focal_config, focal_d2.Predictor, focal_d2.build_focal_retinanet\n"
        "print(json.dumps([found, new]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found, new = json.loads(result.stdout)
    assert found == names
    assert "focal_d2.modeling.retinanet" in new
    assert [x for x in new if x.startswith(UNUSED)] == []
    # All that comes along is the package itself.
    assert {x.split(".")[0] for x in new} == {"focal_d2"}


@pytest.mark.parametrize("arguments", [["--help"], ["configs"], ["info"], ["train", "--help"]])
def test_light_commands_import_neither_torch_nor_detectron2(arguments):
    modules = modules_after("-m", "focal_d2", *arguments)
    assert "focal_d2.commands.cli" in modules
    assert not {"torch", "detectron2", "numpy", "focal_d2.modeling"} & modules


def test_console_script_imports_no_torch():
    code = "import sys; sys.argv = ['/bin/focal-d2', 'configs']; from focal_d2.__main__ import main; main()"
    assert not {"torch", "detectron2"} & modules_after("-c", code)


def test_engine_registers_in_the_process_of_a_command(tmp_path):
    code = (
        "import sys; sys.argv = ['focal-d2']; import focal_d2; assert 'torch' not in sys.modules\n"
        "import focal_d2.engine\n"
        "from detectron2.modeling import META_ARCH_REGISTRY as r\n"
        "from detectron2.data import DatasetCatalog as d\n"
        "print(r.get('FocalRetinaNet').__name__, 'digits_test' in d.list())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "FocalRetinaNet True\n"


@pytest.mark.parametrize(
    "argv, orig_argv, expected",
    [
        (["/usr/bin/focal-d2", "train"], ["python", "/usr/bin/focal-d2", "train"], True),
        (["-m", "train"], ["python", "-u", "-m", "focal_d2", "train"], True),
        (["-m", "focal_d2"], ["python", "-m", "another", "focal_d2"], False),
        (["-m"], ["python", "-mfocal_d2"], False),
        (["train_net.py", "focal-d2"], ["python", "train_net.py", "focal-d2"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_is_command_knows_the_ways_to_start_one(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert focal_d2._is_command() == expected


def test_every_public_name_is_there():
    assert all(getattr(focal_d2, name) for name in focal_d2.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = focal_d2.Nothing
