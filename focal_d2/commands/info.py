"""Print the installed versions, and the abilities of this machine's CPU and GPUs.

It imports none of the packages. So it answers at once, also if one of them is broken.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

import focal_d2
from focal_d2.commands.cli import Parser
from focal_d2.console import write
from focal_d2.hardware import cpu_facts, judge_cpu, list_gpus
from focal_d2.storage.configs import packaged_folder

# Name in the registry -> name in Python, where they differ, and what it is for.
_NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "detectron2": "detectron2",
    "fvcore": "fvcore",
    "numpy": "numpy",
    "opencv-python": "cv2",
    "Pillow": "PIL",
    "pycocotools": "pycocotools",
    "hotcoco": "hotcoco",
    "scipy": "scipy",
}
_OPTIONAL = {
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "scikit-learn": "sklearn",
    "timm": "timm",
    "triton": "triton",
    "wandb": "wandb",
    "onnx": "onnx",
    "onnxruntime": "onnxruntime",
    "lvis": "lvis",
}
_CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def add_options(parser: Parser) -> None:
    """Add the option."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Print the facts."""
    facts = _facts()
    if args.json:
        write(json.dumps(facts, indent=1))
        return
    lines = [(name, facts[name]) for name in ("focal_d2", "python", "configs")]
    lines += [(name, version or "not installed") for name, version in facts["packages"].items()]
    cpu = facts["cpu"]
    lines.append(("CPU", f"{cpu['model']}, {cpu['cores']} cores: {', '.join(cpu['abilities']) or 'no AVX2'}"))
    lines.append(("AMP.DTYPE auto", f"{cpu['auto']} on this CPU, which {cpu['reason']}"))
    for gpu in facts["gpus"]:
        ability = "bfloat16 and TF32" if gpu["bfloat16"] else "no bfloat16"
        numbers = f"compute capability {gpu['capability']}, driver {gpu['driver']}"
        lines.append(("GPU", f"{gpu['name']}, {gpu['memory']}, {numbers}: {ability}"))
    if not facts["gpus"]:
        lines.append(("GPU", "none that nvidia-smi lists"))
    width = max(len(name) for name, _ in lines)
    write("\n".join(f"{name:{width}}  {text}" for name, text in lines))


def _facts() -> dict[str, Any]:
    cpu = cpu_facts()
    flags = set(cpu.get("flags", "").split())
    support = judge_cpu({name: name in flags for name in _CPU_FLAGS}, cpu.get("vendor_id"))
    return {
        "focal_d2": f"{focal_d2.__version__} in {Path(focal_d2.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "configs": str(packaged_folder()),
        "packages": {name: _version(name, module) for name, module in (_NEEDED | _OPTIONAL).items()},
        "cpu": {
            "model": cpu.get("model name", platform.machine()),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "abilities": [flag for flag in _CPU_FLAGS if flag in flags],
            "auto": "bfloat16" if support.trusted else "float32",
            "reason": support.reason,
        },
        "gpus": [
            {
                "name": gpu.name,
                "memory": gpu.memory,
                "capability": ".".join(map(str, gpu.capability)),
                "bfloat16": gpu.has_bfloat16,
                "driver": gpu.driver,
            }
            for gpu in list_gpus()
        ],
    }


def _version(name: str, module: str) -> str | None:
    """Return the version of a package, "?" if it has none, None if it is not installed."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return None
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # detectron2 may be a source folder without package metadata: read the version from the source.
        source = Path(spec.origin).read_text() if spec.origin else ""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value) if isinstance(node.value, ast.Constant) else "?"
    return "?"
