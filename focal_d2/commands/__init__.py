"""The commands of `focal-d2`: one module each, with `add_options` and `run`, under the name of the command.

A module's docstring is the description in its `--help`. Imports that take seconds (torch, detectron2, most of
this package) are in `run` and not at the top of the module, so that `--help` answers at once.
"""

# Name -> description in `focal-d2 --help`.
COMMANDS = {
    "new": "make a config from a folder of images and annotations",
    "train": "train a detector; --resume continues a training",
    "eval": "evaluate a checkpoint on the test sets",
    "predict": "detect objects in images, folders and videos",
    "serve": "serve a local page and a JSON endpoint that detect objects in a picture",
    "export": "write a detector as ONNX or TorchScript, and check that it detects the same",
    "doctor": "examine the datasets and settings of a config before training",
    "anchors": "propose anchor sizes and aspect ratios that fit the training set",
    "study": "compare settings over seeds: many training runs, one table",
    "benchmark": "compare time and memory with detectron2's RetinaNet",
    "gpu-check": "check and measure the package on a GPU, within a given time",
    "replay": "repeat a training step that was not finite",
    "strip": "make a small checkpoint for use, with class names and config",
    "convert": "convert weights of torchvision's ResNets and RetinaNet",
    "data": "make the embedded datasets",
    "configs": "list the configs of this package",
    "info": "print versions, and the abilities of this machine's CPU and GPUs",
}
