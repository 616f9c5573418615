"""What checks can find: a code for each kind, how bad it is, what it means and what to do."""

from __future__ import annotations

from typing import NamedTuple

ERROR, WARNING, NOTE = SEVERITIES = ("error", "warning", "note")


class Kind(NamedTuple):
    """What findings of one code have in common."""

    severity: str
    means: str
    remedy: str


# Error: training or evaluation fails, or learns or measures the wrong thing. Warning: probably a mistake.
KINDS = {
    # Datasets as a whole.
    "dataset-unreadable": Kind(ERROR, "the annotations cannot be read", "correct the file or the entry"),
    "item-unreadable": Kind(ERROR, "an item of the annotations cannot be read", "correct or remove the item"),
    "dataset-empty": Kind(ERROR, "no image, or none with a box, is there to train on", "check the paths"),
    "dataset-in-both": Kind(ERROR, "DATASETS.TRAIN shares a dataset with DATASETS.VAL or TEST", "split it"),
    "dataset-repeated": Kind(
        WARNING, "DATASETS.TRAIN names a dataset twice", "name it once, unless it is meant"
    ),
    "image-id-repeated": Kind(
        ERROR, "images share an id, which evaluation mixes up", "give every image another id"
    ),
    # Images.
    "image-missing": Kind(ERROR, "the image file does not exist", "check IMAGES, or remove the entry"),
    "image-unreadable": Kind(ERROR, "the image cannot be decoded", "restore the file, or remove the entry"),
    "image-size": Kind(
        ERROR,
        "the image, turned as its EXIF tag says, has another size than annotated; its boxes may be off too",
        "annotate the image as it is, or restore the one that was annotated",
    ),
    "image-too-large": Kind(
        ERROR,
        "an image is annotated with more pixels than INPUT.FOCAL.MAX_PIXELS: reading it is refused",
        "raise the key if memory is enough, or cut the image into smaller ones",
    ),
    "image-repeated": Kind(WARNING, "a file is in the list more than once", "merge the entries"),
    "image-duplicate": Kind(WARNING, "different files of one side have the same pixels", "keep one of them"),
    "image-leak": Kind(
        ERROR,
        "an image to train on is, by its pixels or its path, also one to test on: AP is too high",
        "remove it from one side",
    ),
    "image-in-val-and-test": Kind(
        WARNING,
        "an image of DATASETS.VAL is, by its pixels or its path, also in DATASETS.TEST: what is chosen on it "
        "makes AP there too high",
        "remove it from one of them, or leave DATASETS.VAL empty",
    ),
    # Boxes.
    "box-format": Kind(
        ERROR,
        "the boxes fit another format than the one they are read as",
        "convert the boxes, or name the right format",
    ),
    "box-degenerate": Kind(
        ERROR, "a box without an area, or not of numbers: it is left out", "correct or remove the box"
    ),
    "box-outside": Kind(ERROR, "a box wholly outside its image: it is left out", "correct or remove the box"),
    "box-beyond-edge": Kind(
        WARNING,
        "a box reaches more than 2 pixels beyond its image: training clips it, evaluation does not",
        "check the box, or clip it",
    ),
    "box-duplicate": Kind(WARNING, "an object has the same box and class twice", "remove one"),
    "box-two-classes": Kind(
        WARNING, "two classes have the same box: it can train one of them only", "keep one class"
    ),
    "box-whole-image": Kind(
        WARNING,
        "most images have a box as large as the image: labels of images instead of objects?",
        "check how the boxes were made",
    ),
    "boxes-above-limit": Kind(
        WARNING,
        "images have more boxes than the model returns detections of an image, or candidates of a level: the "
        "others are missed",
        "raise DETECTIONS_PER_IMAGE to the number of boxes, TOPK_CANDIDATES_TEST to several times it, or cut "
        "the images into smaller ones",
    ),
    # Classes.
    "class-count": Kind(
        ERROR,
        "the model's NUM_CLASSES is not the dataset's number of classes",
        "set it to that number, or to auto",
    ),
    "class-index": Kind(ERROR, "a label is not below the number of classes", "count classes from 0"),
    "class-names": Kind(
        ERROR,
        "datasets have other classes, or the same in another order: a label means another thing in each",
        "give all the same CLASSES",
    ),
    "class-alike": Kind(WARNING, "class names differ only in case or spaces", "merge the classes"),
    "class-unused": Kind(WARNING, "a class has no box at all", "remove it, or check the labels"),
    "class-not-in-test": Kind(
        WARNING, "a class to train has no box to test on: it has no AP", "split the data in another way"
    ),
    "class-not-in-train": Kind(
        WARNING, "a class to test has no box to train on: its AP is 0", "split the data in another way"
    ),
    "class-rare": Kind(WARNING, "a class has very few boxes to train on", "check the labels, or add boxes"),
    # What training makes of it.
    "negatives-dropped": Kind(
        WARNING,
        "many images without boxes are left out of training: false alarms on such images are not unlearnt",
        "set DATALOADER.FILTER_EMPTY_ANNOTATIONS False",
    ),
    "box-tiny": Kind(
        WARNING,
        "boxes are below half a cell of the finest level at training resolution",
        "train on larger images or crops, or on a finer level",
    ),
    "box-cropped": Kind(
        WARNING,
        "many boxes are larger than nine in ten crops of training: the model hardly ever sees such an object "
        "whole",
        "enlarge INPUT.CROP.SIZE or INPUT.FOCAL.BOX_CROP.SIZE, or train on smaller images (MIN_SIZE_TRAIN)",
    ),
    "box-long": Kind(WARNING, "long boxes have no anchor", "run focal-d2 anchors for more ASPECT_RATIOS"),
    "anchor-recall": Kind(WARNING, "many boxes have no anchor of enough IoU", "run focal-d2 anchors"),
    "anchor-recall-class": Kind(
        WARNING, "most boxes of a class have no anchor of enough IoU", "run focal-d2 anchors"
    ),
    "learning-rate": Kind(
        WARNING,
        "SOLVER.BASE_LR is more than 2 times off the linear rule: for 16 images with SGD 0.01 (RetinaNet) or "
        "0.02 (R-CNN)",
        "set SOLVER.BASE_LR, unless it was tuned",
    ),
    "key-unread": Kind(
        WARNING, "a key was set that nothing reads", "set the key that is read instead, or remove it"
    ),
    # Facts.
    "images-without-boxes": Kind(NOTE, "images without boxes, and whether they are trained on", ""),
    "annotations-read": Kind(NOTE, "what the reader decided that may surprise", "see docs/data.md"),
    "boxes-ignored": Kind(NOTE, "crowds and difficult objects, neither trained nor counted in AP", ""),
    "images-unchecked": Kind(NOTE, "--no-images: no image was opened", ""),
    "learning-rate-unchecked": Kind(
        NOTE, "no rule for the learning rate of this optimizer or architecture is known", ""
    ),
    "architecture-unexamined": Kind(NOTE, "what the doctor cannot examine of this meta-architecture", ""),
    "assigner": Kind(NOTE, "the assigner is not iou: which anchors are counted, and how", ""),
    "imbalance": Kind(NOTE, "negative anchors to positive ones, and the α that balances them", ""),
    "memory": Kind(NOTE, "an estimate of what a training step takes", ""),
}
