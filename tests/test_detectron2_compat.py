from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import focal_d2
from focal_d2 import detectron2_compat
from focal_d2.detectron2_compat import PRIVATE_NAMES, PrivateName, missing_names

PACKAGE = Path(focal_d2.__file__).parent
FOREIGN = ("detectron2", "fvcore", "torch", "torchvision", "iopath", "yacs", "pycocotools")
# Of Python itself: of NamedTuple and os, documented in spite of their names, and of argparse.
PYTHONS = {"_replace", "_asdict", "_fields", "_exit", "_print_message"}
# What files name, not what is imported: how pickles of tensors begin.
IN_FILES = ("torch._utils",)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(source: str) -> list[str]:
    """List what a module imports or touches that is private to another package or object."""
    uses = []
    for node in ast.walk(ast.parse(source)):
        uses += [f"line {node.lineno}: {x}" for x in names_in(node) if is_private(x) and x not in PYTHONS]
    return uses


def names_in(node: ast.AST) -> list[str]:
    """Return the names of other packages or objects that a node imports, touches or spells as a text."""
    match node:
        case ast.ImportFrom(module=str(module)):
            return [*module.split("."), *(x.name for x in node.names)] if is_foreign(module) else []
        case ast.Import():
            return [part for x in node.names if is_foreign(x.name) for part in x.name.split(".")]
        case ast.Attribute(value=ast.Name(id="self" | "cls")):
            return []
        case ast.Attribute():
            return [node.attr]
        case ast.Call(func=ast.Name(id="getattr" | "setattr" | "hasattr" | "delattr")):
            return [str(x.value) for x in node.args[1:2] if isinstance(x, ast.Constant)]
        case ast.Constant(value=str(text)) if re.fullmatch(r"[\w.]+", text) and is_foreign(text):
            return [] if text in IN_FILES else text.split(".")
    return []


def is_foreign(module: str) -> bool:
    return module.split(".")[0] in FOREIGN


def modules() -> list[str]:
    found = [x.name for x in pkgutil.walk_packages(focal_d2.__path__, "focal_d2.")]
    return [x for x in found if x != detectron2_compat.__name__ and not x.endswith("__main__")]


def test_the_installed_versions_have_all_private_names():
    assert missing_names() == []


def test_a_missing_name_is_a_sentence_with_what_needs_it():
    names = [
        PrivateName("torch:Tensor", "_gone", "the loss"),
        PrivateName("torch:Gone", "_name", "the loss"),
        PrivateName("detectron2.gone", "_name", "evaluation"),
        PrivateName("detectron2.engine.hooks:EvalHook", "_period", "nothing"),  # set by its constructor
    ]
    assert missing_names(names) == [
        "torch.Tensor has no _gone, which is needed for: the loss",
        "torch.Gone has no _name, which is needed for: the loss",
        "detectron2.gone has no _name, which is needed for: evaluation",
    ]


def test_a_name_that_detectron2_drops_is_missed(monkeypatch):
    from detectron2.data.dataset_mapper import DatasetMapper

    monkeypatch.delattr(DatasetMapper, "_transform_annotations")
    (line,) = missing_names()
    assert line.startswith("detectron2.data.dataset_mapper.DatasetMapper has no _transform_annotations")
    assert "ignored regions" in line


def test_every_private_name_of_the_module_is_listed():
    """Every private attribute that the module touches, and every hook that its mixins define."""
    listed = {x.name for x in PRIVATE_NAMES}
    tree = ast.parse(inspect.getsource(detectron2_compat))
    names = {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute)}
    names |= {x.name for y in tree.body if isinstance(y, ast.ClassDef) for x in y.body if hasattr(x, "name")}
    names |= {y.name for x in ast.walk(tree) if isinstance(x, ast.ImportFrom) for y in x.names}
    used = {x for x in names if is_private(x)} - PYTHONS
    assert used - listed == set()
    # Read by other means: the module of a signal handler or of an error, and the hook of a profiler.
    by_text = {"_set_SIGCHLD_handler", "_dynamo", "_inductor"}
    assert listed - used - {"profiler", "kineto_results"} == by_text


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda x: str(x.relative_to(PACKAGE)))
def test_no_other_module_touches_a_private_name(path):
    if path.name != "detectron2_compat.py":
        assert private_uses(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "from detectron2.data.detection_utils import _apply_exif_orientation",
        "from torch._utils import x",
        "import torch._dynamo",
        "sampler._infinite_indices()",
        "self.trainer._trainer",
        "super()._do_eval()",
        'getattr(module, "_buffers")',
        '"torch.utils.data._utils.signal_handling"',
    ],
)
def test_uses_are_seen(source):
    assert private_uses(source)


@pytest.mark.parametrize("source", ["self._own", "row._replace(a=1)", "x.__module__", '"torch._utils"'])
def test_own_and_documented_names_are_no_uses(source):
    assert private_uses(source) == []


def test_no_class_uses_a_private_name_of_its_foreign_base():
    """Neither overrides nor reads it; a name of its own must not be a base's either."""
    uses = []
    for name in modules():
        for cls in vars(importlib.import_module(name)).values():
            if inspect.isclass(cls) and cls.__module__ == name:
                uses += [f"{name}.{cls.__name__}: {x}" for x in sorted(own_names(cls) & foreign_names(cls))]
    assert uses == []


def own_names(cls: type) -> set[str]:
    """Return the private names that a class defines, reads or sets on itself."""
    (tree,) = ast.parse(inspect.getsource(cls)).body if cls.__qualname__ == cls.__name__ else (ast.Pass(),)
    names = {
        x.attr
        for x in ast.walk(tree)
        if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id in ("self", "cls")
    }
    names |= {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
    return {x for x in names if is_private(x)}


def foreign_names(cls: type) -> set[str]:
    """Return the private names that the class's bases of other packages have, or set on themselves."""
    names: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in FOREIGN:
            with contextlib.suppress(OSError, TypeError):  # written in C
                names |= set(re.findall(r"\bself\.(_\w+)", inspect.getsource(base)))
            names |= vars(base).keys()
    return names
