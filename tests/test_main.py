"""`focal-d2` without a command's work: help, mistakes, one module a command."""

from __future__ import annotations

import pkgutil

import pytest

import focal_d2
from focal_d2 import commands
from focal_d2.commands import COMMANDS
from focal_d2.commands.cli import command_parser
from tests.engine.runs import run_command


def test_help_lists_every_command(monkeypatch, capsys):
    assert run_command(monkeypatch, "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[0] for x in lines[lines.index("commands:") + 1 :] if x][:-1] == list(COMMANDS)


def test_every_command_is_a_module_and_every_module_a_command():
    modules = {module.name for module in pkgutil.iter_modules(commands.__path__)}
    assert modules - {"cli"} == {name.replace("-", "_") for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_its_description(name, monkeypatch, capsys):
    assert run_command(monkeypatch, name, "--help") == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith(f"usage: focal-d2 {name} ")
    assert str(command_parser(name).description).splitlines()[0] in lines


def test_an_unknown_command_is_a_mistake(monkeypatch, capsys):
    assert run_command(monkeypatch, "trian") == 2
    assert "'trian' (choose from" in capsys.readouterr().err


def test_version(monkeypatch, capsys):
    assert run_command(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"focal-d2 {focal_d2.__version__}\n"
