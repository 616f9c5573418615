"""Random ground truth and detections, as nasty as COCO files get."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_scene(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make a COCO file's content, and detections in COCO's result format, at least one.

    Ids have holes and no order; boxes may be crowds, equal to each other, flat, or of an area that is not
    their own; scores tie; images lack boxes, detections or both; a class lacks boxes; some images have more
    detections of a class than any limit.
    """
    rng = np.random.default_rng(seed)
    images = rng.choice(10_000, rng.integers(1, 9), replace=False).tolist()
    classes = rng.choice(500, rng.integers(1, 6), replace=False).tolist()
    without_boxes = classes[0] if rng.random() < 0.5 else None
    on_grid = rng.random() < 0.5  # IoUs tie then
    most = 160 if rng.random() < 0.2 else 25
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []

    def box() -> np.ndarray:
        drawn = np.concatenate([rng.uniform(0, 200, 2), np.exp(rng.uniform(0, 5.5, 2))])
        return np.round(drawn / 8) * 8 if on_grid else drawn

    for image in images:
        own = []
        for _ in range(0 if rng.random() < 0.2 else rng.integers(1, 12)):
            label, drawn = int(rng.choice(classes)), box()
            if label == without_boxes:
                continue
            area = drawn[2] * drawn[3] * (1 if rng.random() < 0.6 else rng.uniform(0.2, 1.3))
            own.append(
                {
                    "id": len(annotations) + len(own) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": drawn.tolist(),
                    "area": float(area),
                    "iscrowd": int(rng.random() < 0.15),
                    "ignore": int(rng.random() < 0.1),  # pycocotools overrides it
                }
            )
        annotations += own
        for _ in range(0 if rng.random() < 0.15 else rng.integers(0, most)):
            drawn, label = box(), int(rng.choice(classes))
            if own and rng.random() < 0.7:
                of = own[rng.integers(len(own))]
                drawn = np.array(of["bbox"])
                if rng.random() < 0.7:
                    drawn += rng.normal(0, 0.1, 4) * np.tile(drawn[2:], 2)
                    drawn[2:] = drawn[2:].clip(0)
                label = of["category_id"] if rng.random() < 0.8 else label
            elif rng.random() < 0.05:
                drawn[2] = 0
            score = float(rng.random()) if rng.random() < 0.5 else float(rng.integers(0, 4) / 4)
            found.append({"image_id": image, "category_id": label, "bbox": drawn.tolist(), "score": score})
    if not found:
        return random_scene(seed + 100_000)
    found = [found[i] for i in rng.permutation(len(found))]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 300, "width": 300} for i in images],
        "annotations": [annotations[i] for i in rng.permutation(len(annotations))],
        "categories": [{"id": k, "name": f"class{k}"} for k in classes],
    }
    return content, found
