"""The commands of `focal-d2`: one module each, with `add_options` and `run`, under the name of the command.

A module's docstring is the description in its `--help`. What costs seconds to import (torch, detectron2, most
of this package) is imported in `run` and not above it, so that `--help` answers at once.
"""

# Name -> what `focal-d2 --help` says of it.
COMMANDS = {
    "train": "train a detector; --resume continues a training",
    "eval": "evaluate a checkpoint on the test sets",
    "predict": "detect objects in images and draw them",
    "doctor": "examine the datasets and settings of a config before training",
    "anchors": "propose anchor sizes and aspect ratios that fit the training set",
    "study": "compare settings over seeds: many training runs, one table",
    "benchmark": "time and memory beside detectron2's RetinaNet",
    "replay": "repeat a training step that was not finite",
    "data": "make the embedded datasets",
    "configs": "list the configs of this package",
    "info": "versions, and what this CPU and these GPUs can do",
}
