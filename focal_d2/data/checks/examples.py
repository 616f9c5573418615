"""Examples in findings: a few boxes with the names of their files."""

from __future__ import annotations

import numpy as np

from focal_d2.annotations import Table
from focal_d2.data.checks.findings import Example

MOST_EXAMPLES = 5


def box_examples(
    table: Table,
    mask: np.ndarray,
    text: object = None,
    *,
    worst: np.ndarray | None = None,
) -> list[Example]:
    """Return a few boxes as examples of a finding.

    Args:
        table: of the boxes.
        mask: (B,) bool, which boxes to choose from.
        text: function from the position of a box to a text about it; None: no text.
        worst: (B,) the larger, the worse; None: the first ones are named.
    """
    chosen = np.flatnonzero(mask)
    if worst is not None:
        chosen = chosen[np.argsort(-worst[chosen], kind="stable")]
    return [
        Example(
            table.file_names[table.image[i]],
            text(i) if callable(text) else "",
            tuple(table.boxes[i].tolist()),
        )
        for i in chosen[:MOST_EXAMPLES].tolist()
    ]


def box_text(table: Table) -> object:
    return lambda i: "box " + " ".join(f"{x:g}" for x in table.boxes[i])
