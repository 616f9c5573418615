"""A new config as YAML: nested keys, and above each choice why it was made."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import yaml

from focal_d2.analysis.new.choices import Choice
from focal_d2.errors import escaped

_SECTIONS = ("SEED", "OUTPUT_DIR", "DATASETS", "MODEL", "INPUT", "DATALOADER", "SOLVER", "TEST")
_WIDTH = 110


def as_yaml(header: Sequence[str], base: str, choices: Sequence[Choice]) -> str:
    """Write a config.

    Args:
        header: sentences at the top.
        base: the config that it is based on.
        choices: in the order in which they were made; a later value replaces an earlier one of the same key.
    """
    leaves: dict[str, tuple[Any, Choice]] = {}
    for choice in choices:
        for key, value in choice.keys.items():
            leaves[key] = (value, choice)
    writer = _Writer(leaves)
    for line in header:
        writer.comment(line, 0)
    writer.lines.append(f"_BASE_: {_flow(base)}")
    tops = {key.partition(".")[0] for key in leaves}
    for section in (*_SECTIONS, *sorted(tops - set(_SECTIONS))):
        if section in tops:
            writer.write(section, 0)
    return "\n".join(writer.lines) + "\n"


class _Writer:
    def __init__(self, leaves: dict[str, tuple[Any, Choice]]) -> None:
        self.leaves = leaves
        self.lines: list[str] = []
        self._explained: set[str] = set()
        self._last = ""  # the name of the choice of the leaf before

    def comment(self, text: str, depth: int) -> None:
        indent = "  " * depth
        width = _WIDTH - len(indent)
        for part in textwrap.wrap(
            escaped(text, keep=""), width, break_long_words=False, break_on_hyphens=False
        ):
            self.lines.append(f"{indent}# {part}")

    def write(self, prefix: str, depth: int) -> None:
        """Write a key and all keys below it."""
        name = prefix.rpartition(".")[2]
        if prefix in self.leaves:
            value, choice = self.leaves[prefix]
            self._explain(choice, depth)
            self._leaf(name, value, depth)
            return
        self.lines.append(f"{'  ' * depth}{name}:")
        below = dict.fromkeys(
            key[len(prefix) + 1 :].partition(".")[0] for key in self.leaves if key.startswith(f"{prefix}.")
        )
        # Keys of one choice stay together, and sections come after them.
        for child in sorted(below, key=lambda x: f"{prefix}.{x}" not in self.leaves):
            self.write(f"{prefix}.{child}", depth + 1)

    def _explain(self, choice: Choice, depth: int) -> None:
        if choice.name in self._explained:
            if self._last != choice.name and choice.reason:
                self.comment(f"{choice.name}: see above", depth)
        elif choice.reason:
            self.comment(f"{choice.name}: {choice.reason}", depth)
        self._explained.add(choice.name)
        self._last = choice.name

    def _leaf(self, name: str, value: Any, depth: int) -> None:
        indent = "  " * depth
        if isinstance(value, list) and value and all(isinstance(x, dict) for x in value):
            self.lines.append(f"{indent}{name}:")
            self.lines += [f"{indent}  - {_flow(x)}" for x in value]
        else:
            self.lines.append(f"{indent}{name}: {_flow(value)}")


def _flow(value: Any) -> str:
    """Write a value in one line."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=float("inf"), sort_keys=False, allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")
