"""A trained detector as a file for use without this package: ONNX, TorchScript, ONNX with 8-bit integers.

`graph` is the model from pixels to boxes. `onnx`, `torchscript` and `quantise` write it, and `check` compares
what they wrote with the model in Python. `run.py` is copied beside the files: it runs them, and imports
nothing of this package.
"""

from focal_d2.export.exporter import FORMATS, Exporter
from focal_d2.export.pictures import check_validation_sets, choose_pictures, training_pictures

__all__ = ["FORMATS", "Exporter", "check_validation_sets", "choose_pictures", "training_pictures"]
