"""A config that remembers which of its keys were read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode


class RecordingConfig(CfgNode):
    """A config whose copies and sections all write the keys that are read into one set.

    Reading a section is no reading, and neither is copying, freezing or dumping the whole config.
    """

    def __init__(self, node: dict[str, Any], reads: set[str], prefix: str = "") -> None:
        """Copy a config.

        Args:
            node: the config, or a section of it.
            reads: gets the keys, written with dots.
            prefix: of the section's keys.
        """
        super().__init__()
        self.__dict__.update(reads=reads, prefix=prefix, quiet=[])
        for name, value in node.items():
            inner = isinstance(value, CfgNode)
            dict.__setitem__(
                self, name, RecordingConfig(value, reads, f"{prefix}{name}.") if inner else value
            )

    def _note(self, name: str, value: Any) -> None:
        if not (self.quiet or isinstance(value, CfgNode)):
            self.reads.add(self.prefix + name)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        self._note(name, value)
        return value

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401 - this is get

    def items(self) -> Any:
        for name, value in super().items():
            self._note(name, value)
            yield name, value

    @contextmanager
    def _unnoticed(self) -> Iterator[None]:
        sections = [self]
        for section in sections:
            sections += [x for x in dict.values(section) if isinstance(x, RecordingConfig)]
            section.quiet.append(True)
        yield
        for section in sections:
            section.quiet.pop()

    def __deepcopy__(self, memo: Any) -> RecordingConfig:
        with self._unnoticed():
            copy = RecordingConfig(self, self.reads, self.prefix)
        if self.is_frozen():
            copy.freeze()
        return copy

    def dump(self, *args: Any, **kwargs: Any) -> str:
        with self._unnoticed():
            return str(super().dump(*args, **kwargs))
