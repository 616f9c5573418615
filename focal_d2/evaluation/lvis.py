"""LVIS evaluation with detectron2's evaluator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.evaluation import LVISEvaluator

from focal_d2.detectron2_compat import LVISHooks


class FocalLVISEvaluator(LVISHooks, LVISEvaluator):
    """detectron2's evaluator with hotcoco instead of the `lvis` package, which fails with NumPy 2."""

    def __init__(self, dataset_name: str, **kwargs: Any) -> None:
        """See detectron2's `LVISEvaluator`."""
        with _hotcoco_as_lvis():
            super().__init__(dataset_name, **kwargs)

    def evaluate_predictions(self, predictions: list[dict[str, Any]]) -> None:
        with _hotcoco_as_lvis():
            super().evaluate_predictions(predictions)


@contextmanager
def _hotcoco_as_lvis() -> Iterator[None]:
    """Make `import lvis` import hotcoco inside the block; detectron2's reader needs the real package."""
    import hotcoco  # only where it is used

    lvis_modules = [name for name in sys.modules if name == "lvis" or name.startswith("lvis.")]
    before = {name: sys.modules.pop(name) for name in lvis_modules}
    hotcoco.init_as_lvis()
    try:
        yield
    finally:
        for name in [x for x in sys.modules if x == "lvis" or x.startswith("lvis.")]:
            del sys.modules[name]
        sys.modules.update(before)
