"""8-bit integers in ONNX: the convolutions' weights and inputs, by ONNX Runtime's static quantisation."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from focal_d2.export.graph import INPUT
from focal_d2.export.onnx import require


def quantise(model: Any, inputs: Iterable[np.ndarray]) -> Any:
    """Quantise an ONNX model.

    Weights have a scale for each output channel, and inputs one for the whole tensor, which the least and
    greatest values on `inputs` give. Everything but convolutions stays in float32.

    Args:
        model: `onnx.ModelProto`, not changed.
        inputs: images (1, H, W, channels) uint8 to calibrate on.
    """
    onnx, quantization = require("onnx"), require("onnxruntime.quantization")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.inputs: Iterator[np.ndarray] = iter(inputs)

        def get_next(self) -> dict[str, np.ndarray] | None:
            images = next(self.inputs, None)
            return None if images is None else {INPUT: images}

    with tempfile.TemporaryDirectory() as name:
        whole, prepared, done = (Path(name) / f"{x}.onnx" for x in ("whole", "prepared", "done"))
        onnx.save(model, whole)
        # Constants are computed and norms are folded into the weights before these get their scales.
        require("onnxruntime.quantization.shape_inference").quant_pre_process(
            whole, prepared, skip_symbolic_shape=True
        )
        quantization.quantize_static(
            prepared,
            done,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            # CPUs multiply unsigned inputs with signed weights; other pairs are as slow as float32.
            activation_type=quantization.QuantType.QUInt8,
        )
        return onnx.load(done)
