"""Hostile and odd configs: none runs anything, each is one line."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import get_cfg

from focal_d2 import UserError
from focal_d2.engine import load_config
from focal_d2.storage.yaml_text import MOST_STEPS, calculate
from tests.conftest import REPOSITORY

CPU = ["MODEL.DEVICE", "cpu"]


def sizes(expression: str) -> str:
    return f"MODEL: {{ANCHOR_GENERATOR: {{SIZES: !!python/object/apply:eval [{expression!r}]}}}}"


def bomb(levels: int, links: str = "[{}]") -> str:
    rows = ["a0: &a0 {X: 1}"]
    rows += [f"a{i}: &a{i} {links.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, levels)]
    return "\n".join(rows)


# What each would leave behind if it ran is the file PLANTED.
HOSTILE = {
    "address without a file": ('_BASE_: "catalog://nothing"', "catalog://nothing: detectron2's catalog has"),
    "os.system": ("X: !!python/object/apply:os.system ['touch PLANTED']", "apply:os.system is refused"),
    "subprocess": ("X: !!python/object/apply:subprocess.call [[touch, PLANTED]]", "subprocess.call is"),
    "a class": ("X: !!python/object/new:pathlib.Path ['PLANTED']", "new:pathlib.Path is refused"),
    "an object": ("X: !!python/object:collections.OrderedDict {}", "OrderedDict is refused"),
    "a name": ("X: !!python/name:os.system ''", "!!python/name:os.system is refused: a config is no code"),
    "a module": ("X: !!python/module:antigravity ''", "!!python/module:antigravity is refused"),
    "a tuple": ("X: !!python/tuple [1, 2]", "!!python/tuple is refused: write the tuple as [a, b]"),
    "another tag": ("X: !mine 3", "the tag !mine is refused"),
    "a key": ("? !!python/object/apply:os.system ['touch PLANTED']\n: 1", "apply:os.system is refused"),
    "merged": ("X: {<<: !!python/object/apply:os.system ['touch PLANTED']}", "expected a mapping"),
    "eval: import": (sizes("__import__('os').system('touch PLANTED')"), "eval: Call is refused: numbers, +"),
    "eval: open": (sizes("open('PLANTED', 'w')"), "Call is refused"),
    "eval: lambda": (sizes("(lambda: open('PLANTED', 'w'))()"), "Call is refused"),
    "eval: attribute": (sizes("().__class__.__base__.__subclasses__"), "Attribute is refused"),
    "eval: name": (sizes("exit"), 'the name "exit" is refused'),
    "eval: in a loop": (sizes("[x for x in __import__('os').popen('touch PLANTED')]"), "Call is refused"),
    "eval: power": (sizes("9**9**9**9"), "an exponent beyond 64"),
    "eval: product": (sizes("2**62 * 2**62"), "a finite number up to 9e+18"),
    "eval: repetition": (sizes("[0] * 10**12"), "list where a finite number"),
    "eval: nested loops": (
        sizes("[0 " + "for x in [1,2,3,4,5,6,7,8,9] " * 12 + "]"), f"more than {MOST_STEPS} steps"
    ),
    "eval: doubling": (
        sizes("[1]".join(f"[[{v},{v},{v}] for {v} in " for v in "abcdefghijklmnop") + "[1]" + "]" * 16),
        "eval: ",
    ),
    "eval: long": (sizes("1+" * 999 + "1"), "longer than 1000 characters"),
    "eval: deep": (sizes("(" * 490 + "1" + ")" * 490), "SyntaxError: too many nested parentheses"),
    "eval: not one text": ("X: !!python/object/apply:eval ['1', '2']", "must have one text"),
    "eval: a mapping": ("X: !!python/object/apply:eval {args: ['1']}", "must have one text"),
    "alias bomb": (bomb(12), "line 6: more than 100000 values or 50 levels, with what its aliases stand for"),
    "merge bomb": (bomb(12, "{{<<: [{}]}}"), "with what its aliases stand for"),
    "an alias of itself": ("X: &a [*a]", "it holds an alias of itself"),
    "deep": ("X: " + "[" * 60 + "]" * 60, "more than 100000 values or 50 levels"),
    "deeper": ("X: " + "[" * 100_000, "not readable as YAML: maximum recursion depth"),
    "long": ("X: " + "1" * 2**20, "it has 1048579 bytes, more than 1048576"),
    "many digits": ("X: " + "9" * 5000, "a number of more than 64 characters"),
    "base 60": ("X: 1" + ":1" * 5000, "a number of more than 64 characters"),
    "a date": ("X: 2020-99-99", "not readable as YAML: month must be in"),
    "a key twice": ("SEED: 1\nMODEL: {}\nSEED: 2", "{config}, line 3: SEED is in line 1 already"),
    "a key twice in a line": ("SOLVER: {STEPS: [1], 'STEPS': [2]}", "STEPS is in line 1 already"),
    "tabs": ("MODEL:\n\tDEVICE: cpu", "{config}, line 2: while scanning for the next token: found character"),
    "binary": (b"\x80\x04\x95\xff\xfe", "not UTF-8 text (byte 0)"),
    "NUL": ("SEED: 1\0", "not text (character 0x0)"),
    "two documents": ("SEED: 1\n---\nSEED: 2", "line 2: expected a single document"),
    "_BASE_ with a tag": ("_BASE_: base.yaml", "base.yaml, line 1: the tag !!python/object/apply:os.system"),
    "_BASE_ of itself": ("_BASE_: ./config.yaml", "its _BASE_ leads back to it"),
    "_BASE_ in a circle": ("_BASE_: [round.yaml]", "config.yaml: its _BASE_ leads back to it"),
    "_BASE_ twice, and twice, …": ("_BASE_: [fan0.yaml, fan0.yaml]", "_BASE_ leads to more than 64 files"),
    "_BASE_ of a folder": ("_BASE_: .", "a folder, where a file is needed"),
    "_BASE_ of a pipe": ("_BASE_: pipe", "a named pipe, where a file is needed"),
    "_BASE_ of a device": ("_BASE_: /dev/zero", "/dev/zero: a device, where a file is needed"),
    "_BASE_ of no scheme": ("_BASE_: foo://a.yaml", "foo://a.yaml"),
    "_BASE_ of a number": ("_BASE_: 3", "_BASE_ must be the name of a file, or a list of them"),
    "_BASE_ of another shape": ("_BASE_: shape.yaml\nSEED: {A: 1}", "SEED is a section here, but a value in"),
}  # fmt: skip


def write(folder: Path, content: str | bytes) -> tuple[Path, Path]:
    """Write a config and what it may name; returns it and the file that must not appear."""
    config, planted = folder / "config.yaml", folder / "planted"
    if isinstance(content, str):
        content = content.replace("PLANTED", str(planted)).encode()
    config.write_bytes(content)
    (folder / "base.yaml").write_text(HOSTILE["os.system"][0].replace("PLANTED", str(planted)))
    (folder / "round.yaml").write_text("_BASE_: config.yaml")
    (folder / "shape.yaml").write_text("SEED: 1")
    for i in range(20):
        (folder / f"fan{i}.yaml").write_text(f"_BASE_: [fan{i + 1}.yaml, fan{i + 1}.yaml]")
    (folder / "fan20.yaml").write_text("SEED: 1")
    os.mkfifo(folder / "pipe")
    return config, planted


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_one_line_and_runs_nothing(tmp_path, name):
    content, expected = HOSTILE[name]
    config, planted = write(tmp_path, content)
    with pytest.raises(UserError) as error:
        load_config(str(config), CPU)
    message = str(error.value)
    assert expected.format(config=config) in message
    assert "\n" not in message
    assert len(message) < 600
    assert "antigravity" not in sys.modules
    assert not planted.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["os.system", "eval: import"])
def test_hostile_yaml_on_the_command_line(tmp_path, name):
    config, planted = write(tmp_path, HOSTILE[name][0])
    command = [sys.executable, str(REPOSITORY / "train_net.py"), "--config-file", str(config)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"train_net.py: error: {config}, line 1: ")
    assert result.stderr.count("\n") == 1
    assert not planted.exists()


@pytest.mark.parametrize(
    "value",
    [
        "__import__('os').system('touch PLANTED')",
        "!!python/name:os.system",
        "[" * 5000,
        "-" * 50_000,
        "0x" + "f" * 10_000,
    ],
)
def test_overrides_run_nothing(tmp_path, value):
    planted = tmp_path / "planted"
    for key in ("SOLVER.MAX_ITER", "DATASETS.FOCAL"):
        with pytest.raises(UserError):
            load_config("", [*CPU, key, value.replace("PLANTED", str(planted))])
    assert not planted.exists()


def test_trusted_files_may_run_code(tmp_path):
    config, planted = write(tmp_path, "SEED: !!python/object/apply:os.system ['touch PLANTED']")
    with pytest.raises(UserError, match="unless you trust the file: --trust-files"):
        load_config(str(config), CPU)
    assert load_config(str(config), CPU, trust_files=True).SEED == 0
    assert planted.exists()


def test_detectron2s_configs_load_as_detectron2_loads_them():
    path = model_zoo.get_config_file("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    theirs = get_cfg()
    theirs.merge_from_file(path)
    assert theirs.MODEL.ANCHOR_GENERATOR.SIZES[1][2] == 64 * 2 ** (2 / 3)
    ours = load_config(path, CPU)
    del ours.MODEL["FOCAL"], ours.INPUT["FOCAL"], ours.DATASETS["FOCAL"], ours.DATASETS["VAL"]
    del ours.DATALOADER["FOCAL"], ours.SOLVER["FOCAL"], ours.TEST["FOCAL"]
    theirs.MODEL.DEVICE = "cpu"
    assert ours == theirs


def test_configs_of_version_1_are_converted(tmp_path):
    config, _ = write(tmp_path, "MODEL: {WEIGHT: a.pth, FOCAL: {LOSS: {MY_OWN: 3}}}")
    cfg = load_config(str(config), CPU)
    assert cfg.MODEL.WEIGHTS == "a.pth"
    assert cfg.MODEL.FOCAL.LOSS.MY_OWN == 3  # new keys are allowed there still
    assert cfg.clone() == cfg


def test_bases_and_what_is_odd_but_fine(tmp_path):
    (tmp_path / "a.yaml").write_text("SEED: 3\nSOLVER: {MAX_ITER: 5, STEPS: [2, 3]}")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\nSEED: 4")
    config, _ = write(tmp_path, "_BASE_: [a.yaml, b.yaml]\nSOLVER: {STEPS: [1]}")
    cfg = load_config(str(config), CPU)
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (4, 5, (1,))
    (tmp_path / "a.yaml").write_text("MODEL: {FPN: &same {NORM: GN}, RETINANET: *same}")
    config.write_text("_BASE_: a.yaml\nMODEL: {FPN: {NORM: BN}}")
    cfg = load_config(str(config), CPU)
    assert (cfg.MODEL.FPN.NORM, cfg.MODEL.RETINANET.NORM) == ("BN", "GN")
    # A byte order mark; a merged key that is given again.
    config.write_text("\ufeffMODEL:\n  RPN: {<<: {LOSS_WEIGHT: 2.0}, LOSS_WEIGHT: 3.0}")
    cfg = load_config(str(config), CPU)
    assert cfg.MODEL.RPN.LOSS_WEIGHT == 3.0


@pytest.mark.parametrize(
    "expression",
    [
        "[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]",
        "[[x, x * 2 ** 0.5] for x in [32, 64]]",
        "[x * 2 ** (i / 3) for x in (8, 16) for i in [0, 1, 2]]",
        "[[y / x for x, (y, z) in [(1, (2, 3))]], -7 // 2, -7 % 3, +1 - 2.5, (1, 2)]",
    ],
)
def test_calculate_is_pythons_arithmetic(expression):
    assert calculate(expression) == eval(expression, {"__builtins__": {}})


@pytest.mark.parametrize(
    "expression", ["1/0", "1e999", "True", "'a'", "x", "[1][0]", "(-8)**0.5", "[x for x in 3]"]
)
def test_calculate_refuses(expression):
    with pytest.raises(ValueError, match="number|division|refused|comprehension"):
        calculate(expression)


def test_computed_values_reach_the_config(tmp_path):
    config, _ = write(tmp_path, sizes("[[x * 2 ** 0.5] for x in [32, 64]]"))
    computed = load_config(str(config), CPU).MODEL.ANCHOR_GENERATOR.SIZES
    assert computed == [[32 * math.sqrt(2)], [64 * math.sqrt(2)]]
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load(config.read_text())
