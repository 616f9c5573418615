"""What the processor and the GPUs of this machine can do, as the system says it, without PyTorch."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

_AMD = "AuthenticAMD"
_SECONDS = 10.0  # that nvidia-smi may take
# Of a GPU: the first compute capability with tensor cores for bfloat16 and TF32 (CUDA C++ Programming Guide,
# "Compute Capabilities").
_FIRST_WITH_BFLOAT16 = (8, 0)


class Bfloat16Support(NamedTuple):
    """Whether a CPU's bfloat16 is fast and sound."""

    trusted: bool
    reason: str  # completes "this CPU …"


def judge_cpu(capabilities: Mapping[str, Any], vendor: str | None) -> Bfloat16Support:
    """Decide whether convolutions on a CPU should compute in bfloat16.

    Args:
        capabilities: of `torch.cpu.get_capabilities()`; empty if PyTorch does not report them.
        vendor: the CPU's vendor id, such as "AuthenticAMD"; None if it cannot be read.
    """
    if not capabilities:
        return Bfloat16Support(False, "is not described by PyTorch")
    if capabilities.get("amx_bf16"):
        return Bfloat16Support(True, "has amx_bf16")
    if not capabilities.get("avx512_bf16"):
        return Bfloat16Support(False, "has neither amx_bf16 nor avx512_bf16")
    if vendor == _AMD:
        return Bfloat16Support(True, "has avx512_bf16 and is AMD's")
    who = f"its vendor is {vendor}, not {_AMD}" if vendor else "its vendor cannot be read"
    return Bfloat16Support(False, f"has avx512_bf16 without amx_bf16, and {who}")


def cpu_facts() -> dict[str, str]:
    """Return what Linux says of the first core, such as "vendor_id" and "flags"; {} on another system."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another system, or one that hides it
        return {}
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    return facts


def available_memory() -> int | None:
    """Return the bytes of main memory that a process can still take, by Linux and its control group.

    Returns:
        None on another system.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit.isdecimal():
            free.append(max(0, int(limit) - int(used)))
    except (OSError, ValueError):
        pass  # no control group of version 2
    return min(free, default=None)


class Gpu(NamedTuple):
    """A GPU, as NVIDIA's driver describes it."""

    name: str
    memory: str  # "81559 MiB"
    capability: tuple[int, int]
    driver: str

    @property
    def has_bfloat16(self) -> bool:
        """Whether it multiplies matrices in bfloat16 and TF32."""
        return self.capability >= _FIRST_WITH_BFLOAT16


def list_gpus() -> list[Gpu]:
    """Return NVIDIA's GPUs, as nvidia-smi lists them; none where there is no such program, or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=name,memory.total,compute_cap,driver_version"
    try:
        result = subprocess.run(
            [program, query, "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_gpus(result.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Read a table of nvidia-smi: name, memory, compute capability and driver of a GPU in each line."""
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 4 and row[2].replace(".", "", 1).isdigit():
            major, _, minor = row[2].partition(".")
            gpus.append(Gpu(row[0], row[1], (int(major), int(minor or 0)), row[3]))
    return gpus


def free_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process may still take; None if the system does not say.

    That is what Linux calls available or, if less, what the control groups (v2) of a container or job have
    left. Pages of files that were not used for a while count as free.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # another system
        return None
    groups = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    name = next((x.removeprefix("0::/") for x in lines if x.startswith("0::/")), "")
    for group in (groups / name, *(groups / name).parents):
        with suppress(OSError, ValueError):  # no such group, or its limit is "max"
            limit, used = (int((group / f"memory.{x}").read_text()) for x in ("max", "current"))
            statistics = dict(x.split() for x in (group / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(statistics["inactive_file"]))
    return max(0, free)
