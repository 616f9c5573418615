"""Configs and the files that their `_BASE_` names, without code."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode

from focal_d2.errors import UserError
from focal_d2.storage.configs import check_config_file, packaged_config
from focal_d2.storage.downloads import fetch, is_address, join_address
from focal_d2.storage.files import LONGEST_YAML
from focal_d2.storage.yaml_text import Budget, parse_yaml, read_yaml

MOST_FILES = 64  # that _BASE_ leads to

_BASE = "_BASE_"


def merge_file(cfg: CfgNode, path: str, *, allow_download: bool = False) -> None:
    """Merge a YAML file and those that its `_BASE_` names into a config; it may be of an older version.

    Args:
        cfg: changed in place.
        path: of the file.
        allow_download: let `_BASE_` name addresses outside detectron2's stores.

    Raises:
        UserError: if a file can't be read, or holds what only code could make.
    """
    _merge_content(cfg, path, _Files(allow_download).load)


def merge_text(cfg: CfgNode, text: str, path: str) -> None:
    """Merge a YAML text that names no other files into a config.

    Args:
        cfg: changed in place.
        text: the YAML.
        path: of the file that the text is from.

    Raises:
        UserError: naming the file, if the text can't be read.
    """
    content = parse_yaml(text, path)
    if not isinstance(content, dict) or _BASE in content:
        raise UserError(f"{path}: the config in it must be nested lines of KEY: value, without {_BASE}")
    _merge_content(cfg, path, lambda _: content)


def _merge_content(cfg: CfgNode, path: str, load: Callable[[str], dict[str, Any]]) -> None:
    # detectron2 takes a file's content from this method, and its own runs code that the YAML names. It is
    # hidden on this one object: a subclass would have to replace every node of the tree.
    cfg.__dict__["load_yaml_with_base"] = lambda name, allow_unsafe: load(name)
    try:
        cfg.merge_from_file(path)
    finally:
        del cfg.__dict__["load_yaml_with_base"]


class _Files:
    """The number and the total size of the files that a config is made of, which are limited."""

    def __init__(self, allow_download: bool) -> None:
        self._allow_download = allow_download
        self._number = 0
        self._budget = Budget()

    def load(self, path: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read a file over those that its `_BASE_` names.

        Args:
            path: a file or an address.
            below: the files that led here.
        """
        local = path
        if is_address(path):
            local = fetch(path, allow_download=self._allow_download, limit=LONGEST_YAML)
        real = os.path.realpath(local)
        if real in below:
            raise UserError(f"{path}: its {_BASE} leads back to it")
        self._number += 1
        if self._number > MOST_FILES:
            raise UserError(f"{path}: {_BASE} leads to more than {MOST_FILES} files")
        check_config_file(local, path)
        content = read_yaml(local, name=path, budget=self._budget)
        if not isinstance(content, dict):
            raise UserError(f"{path}: not a config; it must be nested lines of KEY: value")
        bases = content.pop(_BASE, [])
        merged: dict[str, Any] = {}
        for base in bases if isinstance(bases, list) else [bases]:
            if not isinstance(base, str):
                raise UserError(f"{path}: {_BASE} must be the name of a file, or a list of them")
            _merge(self.load(_resolve(base, path), (*below, real)), merged, path)
        _merge({key: _unshared(value) for key, value in content.items()}, merged, path)
        return merged


def _resolve(base: str, path: str) -> str:
    if is_address(path):
        return join_address(path, base)  # a file from elsewhere names no file of this machine
    if is_address(base):
        return base
    beside = os.path.join(os.path.dirname(path), os.path.expanduser(base))
    return beside if os.path.exists(beside) else packaged_config(base) or beside


def _merge(upper: dict[str, Any], lower: dict[str, Any], path: str) -> None:
    for key, value in upper.items():
        if not (isinstance(value, dict) and key in lower):
            lower[key] = value
        elif isinstance(lower[key], dict):
            _merge(value, lower[key], path)
        else:
            raise UserError(f"{path}: {key} is a section here, but a value in the file of its {_BASE}")


def _unshared(value: Any) -> Any:
    """Copy the value of each alias, so that another file can change one of them without the others."""
    if isinstance(value, dict):
        return {key: _unshared(x) for key, x in value.items()}
    return [_unshared(x) for x in value] if isinstance(value, list) else value
