"""YAML of bounded size, wherever it is read."""

from __future__ import annotations

import os
import re
import resource

import pytest

from focal_d2 import UserError
from focal_d2.analysis.study import load_grid
from focal_d2.data.readers.texts import class_names
from focal_d2.engine import load_config
from focal_d2.storage import yaml_text
from focal_d2.storage.yaml_text import parse_yaml, read_yaml


def merges(levels: int, links: str = "<<: [{}]", count: int = 9) -> str:
    """Mappings that merge the one before several times: each level has that many times more."""
    rows = ["a0: &a0 {K: 1}"]
    rows += [
        f"a{i}: &a{i} {{{links.format(', '.join([f'*a{i - 1}'] * count))}}}" for i in range(1, levels + 1)
    ]
    return "\n".join(rows)


BOMBS = {
    "merges of lists": merges(8),
    "merges of many": merges(3, count=60),
    "merges of one": merges(60, links="<<: {}, X: 1", count=1),
    "values": merges(8, links="X: [{}]"),
    "keys and values": merges(20, links="X: {0}, Y: {0}", count=1),
    "lists": "a0: &a0 [1]\n"
    + "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)),
    "an alias of itself": "a: &a {<<: *a}",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("reader", ["class names", "grid", "config", "text"])
def test_bombs_are_refused_wherever_yaml_is_read(tmp_path, name, reader):
    path = tmp_path / "a.yaml"
    path.write_text(BOMBS[name])
    read = {
        "class names": lambda: class_names(str(path)),
        "grid": lambda: load_grid(path),
        "config": lambda: load_config(str(path), ["MODEL.DEVICE", "cpu"]),
        "text": lambda: parse_yaml(BOMBS[name], "the config in a step"),
    }[reader]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="with what its aliases stand for|holds an alias of itself"):
        read()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10  # KiB


@pytest.mark.parametrize(
    "text, match",
    [
        ("names: [a]\nnames: [b]", "line 2: names is in line 1 already"),
        ("names: [!!python/name:os.system '']", "os.system is refused"),
        ("names: [" + "[" * 60 + "]" * 60 + "]", "or 50 levels"),
        ("names: " + "[" * 100_000, "not readable as YAML"),
        ("names: [" + "9" * 5000 + "]", "a number of more than 64 characters"),
        ("names: !!set {[a]: 1}", "line 1"),
        ("names: [!!timestamp x]", "not readable as YAML"),
        ('names: ["a\\0b"]', "line 1: a text with a NUL character"),
        ("names: [!!bool maybe]", "not readable as YAML: 'maybe'"),
        ("names: [!!int '']", "not readable as YAML"),
        ("names: [!!float '']", "not readable as YAML"),
        ("? [a]\n: 1", "unhashable"),
        ("#" * 2**20 + "#", "it has 1048577 bytes, more than 1048576"),
    ],
)
def test_class_names_are_read_like_configs(tmp_path, text, match):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=match) as error:
        class_names(str(tmp_path / "a.yaml"))
    assert str(error.value).startswith(str(tmp_path / "a.yaml"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["values", "bytes"])
def test_bases_are_bounded_together(tmp_path, monkeypatch, kind):
    """A chain of 61 files, each just within what one file may have."""
    monkeypatch.setattr(yaml_text, "MOST_NODES", 2000)
    own = "X: [" + "1," * 1800 + "]" if kind == "values" else "#" * 900_000
    for i in range(61):
        base = f"_BASE_: {i + 1}.yaml\n" if i < 60 else ""
        (tmp_path / f"{i}.yaml").write_text(f"{base}{own}")
    with pytest.raises(
        UserError, match=r"1\.yaml.*: (more than 100000 values|longer than 1048576 bytes).*_BASE_"
    ):
        load_config(str(tmp_path / "0.yaml"), ["MODEL.DEVICE", "cpu"])


def test_read_yaml_names_what_it_is_not(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reasons = {"pipe": "a named pipe", ".": "a folder", "none.yaml": "No such file"}
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=reason):
            read_yaml(str(tmp_path / name))
    (tmp_path / "a.yaml").write_bytes("\ufeffa: [é, 0.5]".encode())
    assert read_yaml(str(tmp_path / "a.yaml")) == {"a": ["é", 0.5]}
    (tmp_path / "a.yaml").write_bytes("a: é".encode("latin1"))
    with pytest.raises(UserError, match=r"a\.yaml: not UTF-8 text \(byte 3\)"):
        read_yaml(str(tmp_path / "a.yaml"))
    assert parse_yaml("", "nothing") is None


@pytest.mark.parametrize(
    "text, base", [("010", 8), ("-0_12", 8), ("1:30", 60), ("1:30.5", 60), ("+190:20:30", 60)]
)
def test_numbers_of_other_bases_are_refused(text, base):
    with pytest.raises(UserError, match=rf"a, line 2: {re.escape(text)} is a number of base {base} in YAML"):
        parse_yaml(f"SOLVER:\n  MAX_ITER: {text}", "a")
    assert parse_yaml(f"[0, 007, 0x10, 1_000, 1.50, -0.5, '{text}']", "a") == [
        0, 7, 16, 1000, 1.5, -0.5, text
    ]  # fmt: skip
