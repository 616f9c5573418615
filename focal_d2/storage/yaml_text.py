"""YAML without code and of bounded size, and detectron2's computed anchor sizes by arithmetic alone."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from focal_d2.errors import UNLESS_TRUSTED, UserError, describe_error, one_line, reason
from focal_d2.storage.files import LONGEST_YAML, read_file

# Far above any config, and low enough that a hostile file costs seconds and megabytes at most.
MOST_NODES = 100_000  # values and keys, with everything that aliases stand for, and the files of its _BASE_
DEEPEST = 50  # levels
LONGEST_NUMBER = 64  # characters of a whole number

_TOO_LARGE = (
    f"more than {MOST_NODES} values or {DEEPEST} levels, "
    "with what its aliases stand for and the files of its _BASE_"
)

LONGEST_EXPRESSION = 1000  # characters
MOST_STEPS = 10_000  # operators, names, numbers and lists that are evaluated
LARGEST_NUMBER = 2.0**63
LARGEST_EXPONENT = 64

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


class Budget:
    """The bytes and nodes that are left for one file, or for several that are read together."""

    def __init__(self) -> None:
        """Start with the limits of one file."""
        self.length, self.nodes = LONGEST_YAML, MOST_NODES

    def spend(self, length: int, source: str) -> None:
        """Subtract the length of a text.

        Raises:
            UserError: naming `source`, if it is too long.
        """
        self.length -= length
        if self.length < 0:
            raise UserError(f"{source}: longer than {LONGEST_YAML} bytes, with the files of its _BASE_")


def read_yaml(path: str, *, name: str | None = None, budget: Budget | None = None) -> Any:
    """Read a YAML file.

    Args:
        path: of the file.
        name: what messages call it; None: its path.
        budget: of the files that are read together.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    name = name or path
    try:
        text = read_file(path, limit=LONGEST_YAML).decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{name}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    return parse_yaml(text, name, budget=budget)


def parse_yaml(text: str, source: str, *, budget: Budget | None = None) -> Any:
    """Read a YAML text.

    Args:
        text: one document.
        source: what messages call it.
        budget: of the texts that are read together.

    Raises:
        UserError: naming the source, and the line where there is one.
    """
    budget = budget or Budget()
    budget.spend(len(text), source)
    try:
        loader = _Loader(text, source, budget)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except UserError:
        raise
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source}: not text (character {error.character:#x})") from error
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        reasons = [one_line(x) for x in (error.context, error.problem) if x]
        raise UserError(f"{source}{line}: {': '.join(reasons)}") from error
    except (RuntimeError, ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        # Too many levels, or a date, number or pair that Python can't hold; PyYAML looks up what it believes
        # to be there (`!!bool maybe`, `!!int ''`).
        raise UserError(f"{source}: not readable as YAML: {one_line(error)}") from error


class _Loader(yaml.SafeLoader):
    """Plain YAML of bounded size without keys given twice, and detectron2's arithmetic."""

    def __init__(self, text: str, source: str, budget: Budget) -> None:
        super().__init__(text)
        self.name = source
        self._budget = budget
        self._number = 0  # of nodes that were begun
        # Of each node the values it holds and its levels, aliases written out. The nodes are all kept.
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Measure a node when it is whole; an alias brings one that was measured."""
        self._number += 1
        if self._number > self._budget.nodes:
            raise UserError(f"{self.name}: {_TOO_LARGE}")
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        if is_alias:
            if id(node) not in self._extents:
                raise self._mistake(node, "it holds an alias of itself")
            return node
        if isinstance(node, yaml.ScalarNode) and "\0" in node.value:
            raise self._mistake(node, "a text with a NUL character, which no name or path has")
        children: list[yaml.Node] = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [x for pair in node.value for x in pair]
        extents = [self._extents[id(child)] for child in children]
        size, depth = 1 + sum(n for n, _ in extents), 1 + max((d for _, d in extents), default=0)
        if size > self._budget.nodes or depth > DEEPEST:
            raise self._mistake(node, _TOO_LARGE)
        if parent is None:
            self._budget.nodes -= size
        self._extents[id(node)] = size, depth
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that is twice in a mapping: the second would silently replace the first."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in lines:
                    first = lines[key.tag, key.value]
                    raise self._mistake(key, f"{key.value} is in line {first} already")
                lines[key.tag, key.value] = key.start_mark.line + 1
        return node

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Read an int; PyYAML takes any number of digits, and base 60, in time that grows quadratically."""
        if len(node.value) > LONGEST_NUMBER:
            raise self._mistake(node, f"a number of more than {LONGEST_NUMBER} characters")
        self._refuse_other_bases(node)
        return int(self.construct_yaml_int(node))

    def real_number(self, node: yaml.ScalarNode) -> float:
        """Read a float."""
        self._refuse_other_bases(node)
        return float(self.construct_yaml_float(node))

    def _refuse_other_bases(self, node: yaml.ScalarNode) -> None:
        """Refuse 010, which YAML 1.1 takes for 8, and 1:30, which it takes for 90."""
        text = node.value.replace("_", "").lstrip("+-")
        if ":" in text:
            base = 60
        elif text.isdigit() and text[0] == "0" and int(text) != int(text, 8):
            base = 8
        else:
            return
        raise self._mistake(
            node, f"{node.value} is a number of base {base} in YAML; quote it for a text, or write another"
        )

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
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.real_number)
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
        raise ValueError(describe_error(error)) from error


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
