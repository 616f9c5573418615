"""Checks of annotations alone, of which no image is opened: boxes, classes, and datasets against each other.

The doctor reports all that they find; `train_net.py` prints the errors and warnings before it trains. 100,000
boxes take less than a second.

N images, B boxes, K classes. Boxes are left, top, width, height in pixels, as in `Table`.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from detectron2.config import CfgNode

from focal_d2.annotations import Table
from focal_d2.config import key_value
from focal_d2.config.architectures import class_key, is_retinanet
from focal_d2.data.datasets import load_known_tables
from focal_d2.data.findings import NOTE, Example, Finding, Fix, share
from focal_d2.data.resolution import large_windows
from focal_d2.ops.common import ANY_CLASS

MOST_EXAMPLES = 5

# Pixels beyond an edge that rounding and 1-based corners explain.
_SLACK = 2.0
# Boxes are read in a wrong format if so many reach beyond the image as they are read …
_MISREAD = 0.05
# … and all but so many do not in the other format.
_FITS = 0.99
# Of an image's height and width.
_WHOLE = 0.99
# Fewer boxes than these are too few to learn from, or a slip of the annotator.
_RARE = 10
# Of the images; COCO's training set has 1 %.
_MANY_NEGATIVES = 0.1
# Of the boxes that are larger than every crop.
_CUT = 0.05
# Pixels by which a box may be larger than the crop: both are rounded to whole pixels.
_CROP_SLACK = 1.0
# What reading a dataset warns of already.
_ANNOUNCED = ("box-degenerate", "box-outside")
# A limit on boxes of which NMS removes most.
_BEFORE_NMS = "TOPK_CANDIDATES_TEST"
# Lines and examples that a training run prints.
_MOST_LINES, _EXAMPLES_IN_A_LINE = 8, 2


def annotation_warnings(cfg: CfgNode, *, training: bool) -> list[str]:
    """Say what is wrong with the annotations of a run: a line a kind, with counts and the first examples.

    Datasets are left out that detectron2 or a program registered as records: to read them takes time. Boxes
    without area and boxes outside their image are left out, too: `announce` counts them.

    Args:
        cfg: full config.
        training: whether `DATASETS.TRAIN` is used, besides `DATASETS.TEST`.
    """
    sides = (cfg.DATASETS.TRAIN if training else ()), cfg.DATASETS.TEST
    tables = load_known_tables([name for names in sides for name in names])
    train, test = ({name: tables[name] for name in names if name in tables} for names in sides)
    found = [finding for name, table in tables.items() for finding in check_dataset(name, table)]
    found += check_against_config(cfg, train, test)
    if all(name in tables for names in sides for name in names):
        found += check_together(cfg, train, test)
    of_kind: dict[str, list[Finding]] = defaultdict(list)
    for finding in found:
        if finding.severity != NOTE and finding.code not in _ANNOUNCED:
            of_kind[finding.code].append(finding)
    lines = [_line(code, findings) for code, findings in of_kind.items()]
    if len(lines) > _MOST_LINES:
        others = [*of_kind][_MOST_LINES:]
        lines[_MOST_LINES:] = [f"and {len(others)} other kinds: {', '.join(others)}"]
    if lines:
        lines.append("tools/doctor.py says more about these, and checks the images (docs/doctor.md)")
    return lines


def _line(code: str, findings: Sequence[Finding]) -> str:
    parts = [f"{f.dataset}: {f.message}" if f.dataset else f.message for f in findings]
    examples = [str(example) for f in findings for example in f.examples]
    shown = f" (first: {some(examples, _EXAMPLES_IN_A_LINE, '; ')})" if examples else ""
    return f"{code}: {some(parts, MOST_EXAMPLES, '; ')}{shown}"


def check_dataset(name: str, table: Table) -> list[Finding]:
    """Run all checks of one dataset.

    Args:
        name: the dataset's.
        table: its annotations.
    """
    notes = [Finding("annotations-read", note, name) for note in (*table.warnings, *table.notes)]
    return [*check_items(name, table), *check_boxes(name, table), *notes]


def check_against_config(
    cfg: CfgNode, train: Mapping[str, Table], test: Mapping[str, Table]
) -> list[Finding]:
    """Run all checks of what the config makes of the boxes.

    Args:
        cfg: full config.
        train: the datasets to train on, by name.
        test: those to test on.

    Raises:
        UserError: see `large_windows`.
    """
    limits = {"TEST.DETECTIONS_PER_IMAGE": cfg.TEST.DETECTIONS_PER_IMAGE}
    if is_retinanet(cfg):
        limits["MODEL.RETINANET.TOPK_CANDIDATES_TEST"] = cfg.MODEL.RETINANET.TOPK_CANDIDATES_TEST
    # A training image that is cropped is never seen with all of its boxes.
    whole = {} if cfg.INPUT.CROP.ENABLED or cfg.INPUT.FOCAL.BOX_CROP.SIZE else train
    found = check_limits({**whole, **test}, limits)
    found += check_pixels({**train, **test}, cfg.INPUT.FOCAL.MAX_PIXELS)
    for name, table in train.items():
        found += check_crops(name, table, large_windows(cfg, table.sizes))
    return found


def check_together(
    cfg: CfgNode,
    train: Mapping[str, Table],
    test: Mapping[str, Table],
    digests: Mapping[str, bytes] | None = None,
) -> list[Finding]:
    """Run all checks of the datasets against each other and against the config.

    Args:
        cfg: full config.
        train: the datasets to train on, by name.
        test: those to test on.
        digests: see `check_repeats`.
    """
    counted_by = class_key(cfg)
    num_classes = key_value(cfg, counted_by) if counted_by else None
    readable = [{name: t for name, t in side.items() if not t.problems} for side in (train, test)]
    return [
        *check_negatives(*readable, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS),
        *check_classes(train, test, counted_by=counted_by or "", num_classes=num_classes),
        *check_sides(train, test),
        *check_repeats(train, test, digests or {}),
    ]


def check_items(name: str, table: Table) -> list[Finding]:
    """Check what is readable of one dataset, but for the boxes.

    Args:
        name: the dataset's.
        table: its annotations.
    """
    found = []
    if table.problems:
        examples = [Example("", problem) for problem in table.problems[:MOST_EXAMPLES]]
        message = f"{len(table.problems)} items of the annotations cannot be read"
        found.append(Finding("item-unreadable", message, name, len(table.problems), examples))
    if not len(table):
        return [*found, Finding("dataset-empty", "no images in it", name)]
    wrong = (table.labels < 0) | (table.labels >= len(table.classes))
    wrong &= ~table.ignored | (table.labels != ANY_CLASS)
    if wrong.any():
        examples = places(table, wrong, lambda i: f"label {table.labels[i]}")
        message = f"{share(int(wrong.sum()), wrong.size)} labels are not in [0, {len(table.classes)})"
        found.append(Finding("class-index", message, name, int(wrong.sum()), examples))
    _, first = np.unique(table.image_ids, return_index=True)
    if first.size < len(table):
        again = np.setdiff1d(np.arange(len(table)), first)
        examples = [Example(table.file_names[i], f"id {table.image_ids[i]}") for i in again[:MOST_EXAMPLES]]
        message = f"{share(again.size, len(table))} images have the id of another one"
        found.append(Finding("image-id-repeated", message, name, again.size, examples))
    ignored = int(table.ignored.sum())
    if ignored:
        message = f"{share(ignored, table.ignored.size)} boxes are crowds or difficult objects"
        found.append(Finding("boxes-ignored", message, name, ignored))
    paths = Counter(table.file_names)
    repeated = [path for path, times in paths.items() if times > 1]
    if repeated:
        examples = [Example(path, f"{paths[path]} times") for path in repeated[:MOST_EXAMPLES]]
        message = f"{share(len(repeated), len(paths))} files stand in the list more than once"
        found.append(Finding("image-repeated", message, name, len(repeated), examples))
    return found


def check_boxes(name: str, table: Table) -> list[Finding]:
    """Check one dataset's boxes, each by itself and against the others of its image.

    Args:
        name: the dataset's.
        table: its annotations.
    """
    if not table.labels.size:
        return []
    left, top, width, height = table.boxes.T
    # (B,), of each box's image.
    image_height, image_width = table.sizes[table.image].T
    broken = ~table.has_area
    found = []
    if broken.any():
        message = f"{share(int(broken.sum()), broken.size)} boxes have no area"
        found.append(
            Finding(
                "box-degenerate", message, name, int(broken.sum()), places(table, broken, _box_text(table))
            )
        )
    wrong_format = _wrong_format(name, table, ~broken)
    if wrong_format:
        return [*found, wrong_format]

    beyond = np.maximum.reduce(
        [-left, -top, left + width - image_width, top + height - image_height], initial=0, where=~broken
    )
    outside = ~broken & ~table.usable
    if outside.any():
        message = f"{share(int(outside.sum()), outside.size)} boxes are outside their image"
        found.append(
            Finding(
                "box-outside", message, name, int(outside.sum()), places(table, outside, _box_text(table))
            )
        )
    over = ~outside & (beyond > _SLACK)
    if over.any():
        message = (
            f"{share(int(over.sum()), over.size)} boxes reach beyond their image, by up to "
            f"{beyond[over].max():.0f} pixels"
        )
        examples = places(table, over, lambda i: f"{beyond[i]:.0f} pixels beyond", worst=beyond)
        found.append(Finding("box-beyond-edge", message, name, int(over.sum()), examples))
    found += _duplicates(name, table)

    whole = ~table.ignored & (width >= _WHOLE * image_width) & (height >= _WHOLE * image_height)
    with_boxes, with_whole = np.unique(table.image).size, np.unique(table.image[whole]).size
    if 2 * with_whole >= with_boxes:
        message = f"{share(with_whole, with_boxes)} images with boxes have one as large as the image"
        found.append(Finding("box-whole-image", message, name, with_whole, places(table, whole)))
    return found


def _wrong_format(name: str, table: Table, sound: np.ndarray) -> Finding | None:
    """Find that all boxes are written in another format than the one they were read as."""
    boxes = table.boxes[sound]
    sizes = table.sizes[table.image][sound][:, ::-1]  # (B, 2), width and height
    if len(boxes) and _fit(boxes, np.ones((1, 2)), slack=1e-3) >= _FITS and sizes.min() > 1:
        message = "all boxes lie within [0, 1]: coordinates relative to the image, read as pixels?"
        return Finding("box-format", message, name, len(boxes), places(table, sound, _box_text(table)))
    fits = _fits(boxes, sizes, _SLACK)
    misread = int((~fits).sum())
    if misread < max(1, _MISREAD * len(boxes)):
        return None
    left, top, width, height = boxes.T
    readings = {
        "left, top, right, bottom (XYXY)": np.stack([left, top, width - left, height - top], 1),
        "top, left, height, width (x and y swapped)": boxes[:, [1, 0, 3, 2]],
        "centre x, centre y, width, height": np.stack([left - width / 2, top - height / 2, width, height], 1),
    }
    reading, fit = max(
        ((text, _fit(other, sizes, _SLACK)) for text, other in readings.items()), key=lambda pair: pair[1]
    )
    if fit < _FITS:
        return None
    message = (
        f"{share(misread, len(boxes))} boxes reach beyond their image, read as left, top, width, height; "
        f"they fit as {reading}"
    )
    mask = sound.copy()
    mask[sound] = ~fits
    return Finding("box-format", message, name, misread, places(table, mask, _box_text(table)))


def _fits(boxes: np.ndarray, sizes: np.ndarray, slack: float) -> np.ndarray:
    """Return whether each box (B, 4) has an area and lies in its image of (width, height), (B, 2)."""
    low, extent = boxes[:, :2], boxes[:, 2:]
    inside = (low >= -slack) & (extent > 0) & (low + extent <= sizes + slack)
    return np.asarray(inside.all(1))


def _fit(boxes: np.ndarray, sizes: np.ndarray, slack: float) -> float:
    return float(_fits(boxes, sizes, slack).mean())


def _duplicates(name: str, table: Table) -> list[Finding]:
    """Find boxes of an image that are equal to the last digit."""
    found = []
    # Ignored regions may repeat an object.
    kept = np.flatnonzero(~table.ignored)
    left, top, width, height = table.boxes[kept].T
    order = kept[np.lexsort((table.labels[kept], height, width, top, left, table.image[kept]))]
    boxes, image, labels = table.boxes[order], table.image[order], table.labels[order]
    same_box = (image[1:] == image[:-1]) & (boxes[1:] == boxes[:-1]).all(1)
    same_label = labels[1:] == labels[:-1]
    for code, same, what in (
        ("box-duplicate", same_box & same_label, "boxes repeat one of the same class"),
        ("box-two-classes", same_box & ~same_label, "boxes repeat one of another class"),
    ):
        if same.any():
            mask = np.zeros(table.labels.size, bool)
            mask[order[1:][same]] = True
            message = f"{share(int(same.sum()), kept.size)} {what}"
            found.append(Finding(code, message, name, int(same.sum()), places(table, mask, _box_text(table))))
    return found


def check_limits(tables: Mapping[str, Table], limits: Mapping[str, int]) -> list[Finding]:
    """Find images with more boxes than a model returns.

    Args:
        tables: datasets of whole images, by name.
        limits: the most detections of an image, or candidates of a level, by key. What is not above 0 is no
            limit.
    """
    found = []
    for key, limit in limits.items():
        if limit < 1:
            continue
        crowded: list[tuple[int, str, str]] = []  # number of boxes, dataset, file
        for name, table in tables.items():
            counts = np.bincount(table.image[table.objects], minlength=len(table))  # (N,)
            crowded += [(int(counts[i]), name, table.file_names[i]) for i in np.flatnonzero(counts > limit)]
        if not crowded:
            continue
        crowded.sort(key=lambda image: -image[0])
        most, densest, _ = crowded[0]
        names = list(dict.fromkeys(name for _, name, _ in crowded))
        images = share(len(crowded), sum(len(tables[name]) for name in names))
        message = f"{images} images have more boxes than {key} {limit}; the most is {most}"
        examples = [Example(path, f"{boxes} boxes") for boxes, _, path in crowded[:MOST_EXAMPLES]]
        why = f"an image of {densest} has {most} boxes"
        fix = Fix(why, key, most)
        if key.endswith(_BEFORE_NMS):
            fix = Fix(
                f"{key}: several times {most}; {why}, and most of the candidates of a level are others' "
                "repetitions, which NMS removes"
            )
        fixes = [fix]
        found.append(Finding("boxes-above-limit", message, ", ".join(names), len(crowded), examples, fixes))
    return found


def check_pixels(tables: Mapping[str, Table], limit: int) -> list[Finding]:
    """Find images that are annotated with more pixels than are read.

    Args:
        tables: datasets to train or test on, by name.
        limit: `INPUT.FOCAL.MAX_PIXELS`.
    """
    found = []
    for name, table in tables.items():
        pixels = table.sizes.prod(axis=1)  # (N,)
        large = np.flatnonzero(pixels > limit)
        if large.size:
            first = large[np.argsort(-pixels[large], kind="stable")][:MOST_EXAMPLES].tolist()
            sizes = [f"{table.sizes[i, 1]} × {table.sizes[i, 0]}" for i in first]
            message = (
                f"{share(large.size, len(table))} images have more pixels than INPUT.FOCAL.MAX_PIXELS {limit}"
            )
            examples = [Example(table.file_names[i], size) for i, size in zip(first, sizes, strict=True)]
            fixes = [
                Fix(f"an image of {name} has {sizes[0]} pixels", "INPUT.FOCAL.MAX_PIXELS", int(pixels.max()))
            ]
            found.append(Finding("image-too-large", message, name, large.size, examples, fixes))
    return found


def check_crops(name: str, table: Table, windows: np.ndarray) -> list[Finding]:
    """Find that many boxes are larger than the crops that training takes, so that few show them whole.

    Args:
        name: the dataset's.
        table: its annotations.
        windows: (N, 2) height and width of a large crop of each image, in the image's own pixels; one in ten
            is larger.
    """
    corners = table.boxes.copy()
    corners[:, 2:] += corners[:, :2]
    corners = corners.clip(0, np.tile(table.sizes[table.image, ::-1], 2))
    sides = (corners[:, 2:] - corners[:, :2])[:, ::-1]  # (B, 2), height and width
    excess = (sides - windows[table.image]).max(axis=1, initial=0)
    cut = table.objects & (excess > _CROP_SLACK)
    objects = int(table.objects.sum())
    if not cut.any() or cut.sum() < _CUT * objects:
        return []

    def text(i: int) -> str:
        (height, width), (most_height, most_width) = sides[i], windows[table.image[i]]
        most = f"{most_width:.0f} × {most_height:.0f}"
        return f"{width:.0f} × {height:.0f} pixels, nine in ten crops are at most {most}"

    message = f"nine in ten crops of training are too small for {share(int(cut.sum()), objects)} boxes"
    examples = places(table, cut, text, worst=excess)
    return [Finding("box-cropped", message, name, int(cut.sum()), examples)]


def places(
    table: Table,
    mask: np.ndarray,
    text: object = None,
    *,
    worst: np.ndarray | None = None,
) -> list[Example]:
    """Name a few boxes.

    Args:
        table: of the boxes.
        mask: (B,) bool, which boxes to choose from.
        text: place of a box -> what to say of it; None: nothing.
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


def _box_text(table: Table) -> object:
    return lambda i: "box " + " ".join(f"{x:g}" for x in table.boxes[i])


def class_counts(tables: Mapping[str, Table]) -> Counter[str]:
    """Count the objects of each class by name, over datasets; see `Table.objects`."""
    counts: Counter[str] = Counter()
    for table in tables.values():
        counts.update(dict.fromkeys(table.classes, 0))
        valid = table.labels[table.objects]
        valid = valid[(valid >= 0) & (valid < len(table.classes))]
        for name, count in zip(table.classes, np.bincount(valid, minlength=len(table.classes)), strict=True):
            counts[name] += int(count)
    return counts


def check_classes(
    train: Mapping[str, Table], test: Mapping[str, Table], *, counted_by: str, num_classes: int | None
) -> list[Finding]:
    """Check the classes of the datasets against each other and the model.

    Args:
        train: the datasets to train on, by name.
        test: those to test on.
        counted_by: the key that counts the model's classes.
        num_classes: its value; None: it is not known which key that is.
    """
    found = []
    datasets = {**train, **test}
    lists: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, table in datasets.items():
        lists[table.classes].append(name)
    for classes, names in lists.items():
        if num_classes not in (None, len(classes)):
            message = f"{len(classes)} classes, but {counted_by} is {num_classes}"
            fixes = [Fix(f"the classes of {names[0]}", counted_by, len(classes))]
            found.append(Finding("class-count", message, ", ".join(names), len(classes), fixes=fixes))
    (first, _), *others = lists.items() or [((), [])]
    for classes, names in others:
        at = next((k for k, (a, b) in enumerate(zip(first, classes, strict=False)) if a != b), None)
        of, first_of = ", ".join(names), lists[first][0]
        message = (
            f"{len(classes)} classes instead of {len(first)}, the first ones alike"
            if at is None
            else f'class {at} is "{classes[at]}", in {first_of} it is "{first[at]}"'
        )
        fixes = [Fix(f"DATASETS.FOCAL, entries {of} and {first_of}: the same CLASSES, in the same order")]
        found.append(Finding("class-names", message, of, len(names), fixes=fixes))
    found += _check_names(datasets)
    if train:
        annotated = any(table.annotated for table in test.values())
        found += _check_counts(class_counts(train), class_counts(test), with_test=annotated)
    return found


def _check_names(datasets: Mapping[str, Table]) -> list[Finding]:
    alike = defaultdict(set)
    for table in datasets.values():
        for name in table.classes:
            alike["".join(name.split()).casefold()].add(name)
    pairs = [sorted(names) for names in alike.values() if len(names) > 1]
    if not pairs:
        return []
    message = "; ".join(", ".join(f'"{name}"' for name in names) for names in pairs[:MOST_EXAMPLES])
    return [Finding("class-alike", f"written in different ways: {message}", count=len(pairs))]


def _check_counts(train: Counter[str], test: Counter[str], *, with_test: bool) -> list[Finding]:
    found = []
    known = {**train, **test}
    missing = [k for k in train if train[k] and not test[k]] if with_test else []
    for code, names, what in (
        ("class-unused", [k for k in known if not train[k] and not test[k]], "have no box"),
        ("class-not-in-test", missing, "have no box to test on"),
        ("class-not-in-train", [k for k in test if test[k] and not train[k]], "have no box to train on"),
        (
            "class-rare",
            [k for k in train if 0 < train[k] < _RARE],
            f"have fewer than {_RARE} boxes to train on",
        ),
    ):
        if names:
            listed = some([f"{name} ({train[name]})" if code == "class-rare" else name for name in names])
            message = f"{share(len(names), len(known))} classes {what}: {listed}"
            found.append(Finding(code, message, count=len(names)))
    return found


def some(names: Sequence[str], most: int = 10, separator: str = ", ") -> str:
    """List the first names, and say that there are more."""
    return separator.join(names[:most]) + (f"{separator}…" if len(names) > most else "")


def without_boxes(table: Table) -> int:
    """Count the images that have no object; see `Table.objects`."""
    return len(table) - np.unique(table.image[table.objects]).size


def check_negatives(
    train: Mapping[str, Table], test: Mapping[str, Table], *, filter_empty: bool
) -> list[Finding]:
    """Say which images have no boxes, and what becomes of them in training.

    Args:
        train: the datasets to train on, by name; some may be of images without boxes only.
        test: those to test on.
        filter_empty: `DATALOADER.FILTER_EMPTY_ANNOTATIONS`.
    """
    found = []
    for names in ([*train], *([name] for name in test if name not in train)):
        tables = [table for table in ({**train, **test}[name] for name in names) if table.annotated]
        images = sum(map(len, tables))
        if images and sum(map(without_boxes, tables)) == images:
            found.append(Finding("dataset-empty", f"none of {images} images has a box", ", ".join(names)))
    for name, table in train.items():
        empty, images = without_boxes(table), len(table)
        if empty and filter_empty and empty >= _MANY_NEGATIVES * images:
            message = f"{share(empty, images)} images have no box and are left out of training"
            fix = Fix("train on images without boxes too", "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
            found.append(Finding("negatives-dropped", message, name, empty, fixes=[fix]))
        elif empty:
            fate = "are left out of training" if filter_empty else "are trained on"
            message = f"{share(empty, images)} images have no box and {fate}"
            found.append(Finding("images-without-boxes", message, name, empty))
    return found


def check_sides(train: Mapping[str, Table], test: Mapping[str, Table]) -> list[Finding]:
    """Find datasets that are trained and tested on.

    Args:
        train: the datasets to train on, by name.
        test: those to test on.
    """
    both = [name for name in train if name in test]
    message = "to train on and to test on: AP says how well it is learnt by heart"
    return [Finding("dataset-in-both", message, name, len(train[name])) for name in both]


def check_repeats(
    train: Mapping[str, Table], test: Mapping[str, Table], digests: Mapping[str, bytes]
) -> list[Finding]:
    """Find images met again: within a side as other files, or on both sides.

    Args:
        train: the datasets to train on, by name.
        test: those to test on; the ones that are in `train` too are not looked at again.
        digests: of the pixels of each file that was read; of the others the paths are compared.
    """
    test = {name: table for name, table in test.items() if name not in train}
    found = []
    # Datasets to test on are measured one by one, so an image may be in two of them.
    units = [train, *({name: table} for name, table in test.items())]
    to_train, *to_test = contents = [_by_content(unit, digests) for unit in units]
    for unit, content in zip(units, contents, strict=True):
        again = [files for files in content.values() if len(files) > 1]
        if again:
            involved = dict.fromkeys(name for files in again for name, _ in files)
            examples = [Example(own, f"same as {files[0][1]}") for files in again for _, own in files[1:]]
            among = sum(len(dict.fromkeys(table.file_names)) for table in unit.values())
            message = (
                f"{share(len(examples), among)} images are there again, as another file or of another dataset"
            )
            found.append(
                Finding(
                    "image-duplicate", message, ", ".join(involved), len(examples), examples[:MOST_EXAMPLES]
                )
            )
    for (name, table), content in zip(test.items(), to_test, strict=True):
        examples = []
        for key, files in content.items():
            if key in to_train:
                of, path = to_train[key][0]
                for _, own in files:
                    same = "the same file is in" if own == path else f"same as {path} of"
                    examples.append(Example(own, f"{same} {of}"))
        if examples:
            message = f"{share(len(examples), len(table))} images to test on are also to train on"
            found.append(Finding("image-leak", message, name, len(examples), examples[:MOST_EXAMPLES]))
    return found


def _by_content(
    tables: Mapping[str, Table], digests: Mapping[str, bytes]
) -> dict[bytes | str, list[tuple[str, str]]]:
    """Group (dataset, path) by what the file holds; a file that was not read, by its path."""
    files: dict[bytes | str, list[tuple[str, str]]] = defaultdict(list)
    for name, table in tables.items():
        for path in dict.fromkeys(table.file_names):
            # `abspath` takes 10 µs; most names have nothing that it would change.
            plain = path.startswith("/") and "/." not in path and "//" not in path
            files[digests.get(path) or (path if plain else os.path.abspath(path))].append((name, path))
    return files
