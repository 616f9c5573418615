from __future__ import annotations

import stat

from focal_d2.hardware import Gpu, available_memory, list_gpus, parse_gpus

H100 = "NVIDIA H100 80GB HBM3, 81559 MiB, 9.0, 550.54.15\n"


def test_parse_gpus_reads_a_line_for_each():
    t4 = "Tesla T4, 15360 MiB, 7.5, 550.54.15\n"
    first, second = parse_gpus(H100 + t4)
    assert first == Gpu("NVIDIA H100 80GB HBM3", "81559 MiB", (9, 0), "550.54.15")
    assert (first.has_bfloat16, second.has_bfloat16) == (True, False)


def test_parse_gpus_passes_over_what_is_no_gpu():
    assert parse_gpus("No devices were found\nNVIDIA X, [N/A], [N/A], 1\n") == []


def test_list_gpus_asks_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpus() == []
    program = tmp_path / "nvidia-smi"
    for script, count in ((f"#!/bin/sh\necho '{H100}'\n", 1), ("#!/bin/sh\nexit 9\n", 0)):
        program.write_text(script)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        assert len(list_gpus()) == count


def test_available_memory_is_the_least_of_machine_and_control_group(monkeypatch):
    texts = {
        "/proc/meminfo": "MemTotal: 200 kB\nMemAvailable: 100 kB\n",
        "/sys/fs/cgroup/memory.max": "80000\n",
        "/sys/fs/cgroup/memory.current": "30000\n",
    }

    def read(path):
        if str(path) in texts:
            return texts[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr("pathlib.Path.read_text", read)
    assert available_memory() == 50_000
    texts["/sys/fs/cgroup/memory.max"] = "max\n"
    assert available_memory() == 102_400
    del texts["/sys/fs/cgroup/memory.max"]
    assert available_memory() == 102_400
    texts.clear()
    assert available_memory() is None
