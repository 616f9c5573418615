"""YAML configs without code: plain YAML, and detectron2's computed anchor sizes by arithmetic alone."""

from __future__ import annotations

import ast
import math
import operator
import os
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from detectron2.config import CfgNode

from focal_d2.errors import UNLESS_TRUSTED, UserError
from focal_d2.storage.downloads import fetch, is_address, join_address

# Far above any config, and low enough that a hostile file costs seconds and megabytes at most.
LONGEST_FILE = 2**20  # bytes
MOST_NODES = 100_000  # values and keys, with everything that aliases stand for
DEEPEST = 50  # levels
MOST_FILES = 64  # that _BASE_ leads to
LONGEST_NUMBER = 64  # characters of a whole number

LONGEST_EXPRESSION = 1000  # characters
MOST_STEPS = 10_000  # operators, names, numbers and lists that are evaluated
LARGEST_NUMBER = 2.0**63
LARGEST_EXPONENT = 64

_BASE = "_BASE_"
_PYTHON = "tag:yaml.org,2002:python/"
_EVAL = f"{_PYTHON}object/apply:eval"
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def merge_file(cfg: CfgNode, path: str, *, allow_download: bool = False) -> None:
    """Merge a YAML file and those that its `_BASE_` names into a config; it may be of an older version.

    Args:
        cfg: changed in place.
        path: of the file.
        allow_download: let `_BASE_` name addresses outside detectron2's stores.

    Raises:
        UserError: if a file can't be read, or holds what only code could make.
    """
    # detectron2 takes a file's content from this method, and its own runs code that the YAML names. It is
    # hidden on this one object: a subclass would have to replace every node of the tree.
    cfg.__dict__["load_yaml_with_base"] = lambda name, allow_unsafe: _load_with_bases(
        name, (), [], allow_download
    )
    try:
        cfg.merge_from_file(path)
    finally:
        del cfg.__dict__["load_yaml_with_base"]


def _load_with_bases(
    path: str, below: tuple[str, ...], seen: list[str], allow_download: bool
) -> dict[str, Any]:
    """Read a file over those that its `_BASE_` names.

    Args:
        path: a file or an address.
        below: the files that led here.
        seen: all files read so far, each time they were; this one is added.
        allow_download: accept addresses outside detectron2's stores.
    """
    local = path
    if is_address(path):
        local = fetch(path, allow_download=allow_download, limit=LONGEST_FILE)
    place = os.path.realpath(local)
    if place in below:
        raise UserError(f"{path}: its {_BASE} leads back to it")
    seen.append(place)
    if len(seen) > MOST_FILES:
        raise UserError(f"{path}: {_BASE} leads to more than {MOST_FILES} files")
    own = _parse(local, path)
    bases = own.pop(_BASE, [])
    content: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str):
            raise UserError(f"{path}: {_BASE} must be the name of a file, or a list of them")
        upper = _load_with_bases(_resolve(base, path), (*below, place), seen, allow_download)
        _merge(upper, content, path)
    _merge(own, content, path)
    return content


def _resolve(base: str, path: str) -> str:
    if is_address(path):
        return join_address(path, base)  # a file from elsewhere names no file of this machine
    return base if is_address(base) else os.path.join(os.path.dirname(path), os.path.expanduser(base))


def _merge(upper: dict[str, Any], lower: dict[str, Any], path: str) -> None:
    for key, value in upper.items():
        if not (isinstance(value, dict) and key in lower):
            lower[key] = value
        elif isinstance(lower[key], dict):
            _merge(value, lower[key], path)
        else:
            raise UserError(f"{path}: {key} is a section here, but a value in the file of its {_BASE}")


def _parse(local: str, path: str) -> dict[str, Any]:
    """Read a file, called `path` in messages."""
    if not os.path.isfile(local):
        raise UserError(f"config file not found: {path}")  # or a folder, or a pipe, which would be waited for
    try:
        with open(local, "rb") as file:
            data = file.read(LONGEST_FILE + 1)
        if len(data) > LONGEST_FILE:
            raise UserError(f"{path}: longer than {LONGEST_FILE} bytes: not a config")
        content = _load(data.decode("utf-8-sig"), path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except yaml.reader.ReaderError as error:
        raise UserError(f"{path}: not text (character {error.character:#x})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reasons = [" ".join(x.split()) for x in (error.context, error.problem) if x]
        raise UserError(f"{path}{line}: {': '.join(reasons)}") from error
    except (RuntimeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        # Too many levels, or a date or number that Python can't hold.
        raise UserError(f"{path}: not a config: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a config; it must be nested lines of KEY: value")
    return {key: _unshared(value) for key, value in content.items()}


def _unshared(value: Any) -> Any:
    """Give each alias a copy of its own: another file may change one place and not the others."""
    if isinstance(value, dict):
        return {key: _unshared(x) for key, x in value.items()}
    return [_unshared(x) for x in value] if isinstance(value, list) else value


def _load(text: str, path: str) -> Any:
    loader = _Loader(text)
    loader.name = path
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """Plain YAML of bounded size without keys given twice, and detectron2's arithmetic."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        # Of each node the values it holds and its levels, aliases written out. The nodes are all kept.
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Measure a node when it is whole; an alias brings one that was measured."""
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._extents:
                raise self._mistake(node, "it holds an alias of itself")
            return node
        children: list[yaml.Node] = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [x for pair in node.value for x in pair]
        extents = [self._extents[id(child)] for child in children]
        size, depth = 1 + sum(n for n, _ in extents), 1 + max((d for _, d in extents), default=0)
        if size > MOST_NODES or depth > DEEPEST:
            raise self._mistake(
                node, f"more than {MOST_NODES} values or {DEEPEST} levels, with what its aliases stand for"
            )
        self._extents[id(node)] = size, depth
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that stands twice in a mapping: the later would silently replace the earlier."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    raise self._mistake(key, f"{key.value} stands in line {first} already")
                lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Read an int; PyYAML takes any number of digits, and base 60, in time that grows quadratically."""
        if len(node.value) > LONGEST_NUMBER:
            raise self._mistake(node, f"a number of more than {LONGEST_NUMBER} characters")
        return int(self.construct_yaml_int(node))

    def arithmetic(self, node: yaml.Node) -> Any:
        """Read `!!python/object/apply:eval ["…"]`, detectron2's computed anchor sizes, as arithmetic."""
        texts = [x.value for x in node.value] if isinstance(node, yaml.SequenceNode) else []
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise self._mistake(node, '!!python/object/apply:eval must have one text: ["…"]')
        try:
            return calculate(texts[0])
        except ValueError as error:
            raise self._mistake(node, f"!!python/object/apply:eval: {error}") from error

    def refuse(self, node: yaml.Node) -> Any:
        """Name a tag that would make an object of some class."""
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        if node.tag == f"{_PYTHON}tuple":
            raise self._mistake(node, f"the tag {tag} is refused: write the tuple as [a, b]")
        raise self._mistake(node, f"the tag {tag} is refused: a config is no code{UNLESS_TRUSTED}")

    def _mistake(self, node: yaml.Node, text: str) -> UserError:
        return UserError(f"{self.name}, line {node.start_mark.line + 1}: {text}")


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)
_Loader.add_constructor(_EVAL, _Loader.arithmetic)
_Loader.add_constructor(None, _Loader.refuse)


def calculate(text: str) -> Any:
    """Evaluate arithmetic.

    Numbers, + - * / // % **, signs, lists, tuples, and `[… for name in list]` over such values. Nothing else
    has a meaning here: there are no functions, attributes, subscripts or names but those of the `for`.

    Args:
        text: of the expression.

    Raises:
        ValueError: for anything else, and for what would take long or become large.

    Example:
        >>> calculate("[[x, x * 2 ** 0.5] for x in [32, 64]]")
        [[32, 45.254833995939045], [64, 90.50966799187809]]
    """
    if len(text) > LONGEST_EXPRESSION:
        raise ValueError(f"longer than {LONGEST_EXPRESSION} characters")
    try:
        return _Arithmetic().value(ast.parse(text.strip(), mode="eval").body, {})
    except (SyntaxError, RecursionError, MemoryError, ArithmeticError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


class _Arithmetic:
    def __init__(self) -> None:
        self.steps = 0

    def value(self, node: ast.AST, names: Mapping[str, Any]) -> Any:
        self.steps += 1
        if self.steps > MOST_STEPS:
            raise ValueError(f"more than {MOST_STEPS} steps")
        if isinstance(node, ast.Constant):
            return _number(node.value)
        if isinstance(node, ast.Name) and node.id in names:
            self.steps += _extent(names[node.id])  # or lists of one list, over and over, would explode
            return names[node.id]
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
            operand = _number(self.value(node.operand, names))
            return -operand if isinstance(node.op, ast.USub) else operand
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            left, right = (_number(self.value(x, names)) for x in (node.left, node.right))
            if isinstance(node.op, ast.Pow) and abs(right) > LARGEST_EXPONENT:
                raise ValueError(f"an exponent beyond {LARGEST_EXPONENT}")
            return _number(_OPERATORS[type(node.op)](left, right))
        if isinstance(node, (ast.List, ast.Tuple)):
            values = [self.value(x, names) for x in node.elts]
            return values if isinstance(node, ast.List) else tuple(values)
        if isinstance(node, ast.ListComp):
            return self.comprehension(node.elt, node.generators, names)
        what = f'the name "{node.id}"' if isinstance(node, ast.Name) else type(node).__name__
        raise ValueError(f"{what} is refused: numbers, + - * / // % **, lists and [… for x in …] only")

    def comprehension(
        self, element: ast.AST, loops: list[ast.comprehension], names: Mapping[str, Any]
    ) -> list[Any]:
        if not loops:
            return [self.value(element, names)]
        loop = loops[0]
        items = self.value(loop.iter, names)
        if loop.ifs or loop.is_async or not isinstance(items, (list, tuple)):
            raise ValueError("a comprehension must be [… for x in list]")
        made: list[Any] = []
        for item in items:
            made += self.comprehension(element, loops[1:], {**names, **_bind(loop.target, item)})
        return made


def _extent(value: Any) -> int:
    return sum(1 + _extent(x) for x in value) if isinstance(value, (list, tuple)) else 0


def _bind(target: ast.AST, item: Any) -> dict[str, Any]:
    if isinstance(target, ast.Name):
        return {target.id: item}
    parts = target.elts if isinstance(target, (ast.Tuple, ast.List)) else []
    if not parts or not isinstance(item, (list, tuple)) or len(item) != len(parts):
        raise ValueError("a comprehension must be [… for x in list]")
    names: dict[str, Any] = {}
    for part, x in zip(parts, item, strict=True):
        names |= _bind(part, x)
    return names


def _number(value: Any) -> int | float:
    # A bool is an int; nan is not smaller than anything.
    if type(value) not in (int, float) or not math.isfinite(value) or abs(value) > LARGEST_NUMBER:
        raise ValueError(f"{type(value).__name__} where a finite number up to {LARGEST_NUMBER:.0e} must be")
    return value
