"""Give a hostile file to the program that reads it, in a forked process that is watched."""

from __future__ import annotations

import importlib
import os
import re
import resource
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from focal_d2.__main__ import main
from focal_d2.engine import setup

MOST_MEMORY = 3072  # MiB above what a process has at its start
MOST_ADDRESSES = 4096  # MiB of address space above that; a process that asks for more gets an error
MOST_SECONDS = 60.0  # of the CPU
MOST_WAITING = 300.0  # seconds by the clock: for what waits, on a machine that has other work
LONGEST_LINE = 4000  # characters of an error

# Programs that image libraries, PyTorch and Python's standard library may look for.
STUBS = (
    *("gs", "gswin32c", "convert", "magick", "identify", "dcraw", "ffmpeg", "ffprobe", "djpeg", "cjpeg"),
    *("ppmtogif", "dwebp", "heif-dec", "tiffinfo", "xv", "display", "xdg-open", "wget", "curl", "git"),
    *("sh", "bash", "env", "tar", "unzip", "gcc", "cc", "c++", "g++", "nvcc", "ldconfig", "nvidia-smi"),
)
# The command of `focal-d2` that each kind of run is.
PROGRAMS = {x: x for x in ("train", "eval", "predict", "doctor", "study", "replay", "anchors")} | {
    "resume": "train"
}
# Exit statuses beside 0 and 2: the doctor finds errors, a step is not finite no more, an image can't be read.
MAY_BE_ONE = ("doctor", "predict", "replay")

# What Python tells of itself: programs that are started, and files that are made or changed.
_STARTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "subprocess.Popen",
    "pty.spawn",
)
_CHANGES = {
    "os.mkdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "shutil.rmtree": (0,),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_ESCAPE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


class Place(NamedTuple):
    """The folders of a case. Only `out`, `cache` and `tmp` may change."""

    folder: Path

    @property
    def input(self) -> Path:
        """What is read."""
        return self.folder / "input"

    @property
    def out(self) -> Path:
        """OUTPUT_DIR."""
        return self.folder / "out"


class Case(NamedTuple):
    """A hostile input."""

    group: str
    name: str
    program: str  # of PROGRAMS
    make: Callable[[Place], list[str]]  # writes the files; returns the arguments
    may_connect: bool = False


class Outcome(NamedTuple):
    """What became of a case."""

    case: Case
    status: int  # exit status, or minus the signal's number
    memory: int  # MiB, the peak above what the process had at its start
    seconds: float  # of the CPU
    faults: list[str]
    line: str  # the last line on standard error


def preload() -> None:
    """Import what the programs import when they need it: forked processes have it then."""
    for name in (
        *(
            "focal_d2.__main__",
            "focal_d2.engine",
            "focal_d2.inference.predictor",
            "focal_d2.engine.nonfinite",
        ),
        *(f"focal_d2.analysis.{x}" for x in ("doctor", "study", "anchors")),
        *("hotcoco", "matplotlib.pyplot", "matplotlib.backends.backend_agg", "omegaconf", "torch._dynamo"),
        *("torch.utils.tensorboard", "torch.utils.cpp_extension"),
    ):
        importlib.import_module(name)
    # What detectron2 says of the machine is asked of a compiler.
    setup.collect_env_info = lambda: ""


def run(case: Case, folder: Path, template: Path) -> Outcome:
    """Make a case's files and run its program on them.

    Args:
        case: to run.
        folder: that does not exist; it is removed afterwards.
        template: folder whose content each case starts from.
    """
    place = Place(folder)
    shutil.copytree(template, place.input, symlinks=True)
    for name in ("out", "cache", "tmp", "home", "work", "bin"):
        (folder / name).mkdir()
    marks = folder / "marks"
    for name in STUBS:
        (folder / "bin" / name).write_text(f"#!/bin/sh\necho started {name} >> {marks}\nexit 1\n")
        (folder / "bin" / name).chmod(0o755)
    arguments = case.make(place)
    before = _listing(folder)
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(case, place, arguments, marks)
    status, usage, timed_out = _wait(child, start)
    seconds = usage.ru_utime + usage.ru_stime
    text = (
        (folder / "stdout").read_text("utf-8", "replace"),
        (folder / "stderr").read_text("utf-8", "replace"),
    )
    faults = [*_faults_of_end(case, status, timed_out), *_faults_of_text(status, place, *text)]
    if marks.exists():
        faults += sorted(set(marks.read_text().splitlines()))
    after = _listing(folder)
    changed = sorted(
        name
        for name in {*before, *after}
        if before.get(name) != after.get(name) and name.split("/")[0] not in ("out", "cache", "tmp")
    )
    faults += [f"outside: {name}" for name in changed if name not in ("stdout", "stderr", "marks", "start")]
    memory = usage.ru_maxrss // 1024 - int((folder / "start").read_text() or 0)
    if seconds > MOST_SECONDS:
        faults.append(f"{seconds:.0f} seconds of the CPU")
    if memory > MOST_MEMORY:
        faults.append(f"memory: {memory} MiB")
    lines = text[1].strip().splitlines()
    shutil.rmtree(folder)
    return Outcome(
        case, os.waitstatus_to_exitcode(status), max(memory, 0), seconds, faults, lines[-1] if lines else ""
    )


def _wait(child: int, start: float) -> tuple[int, Any, bool]:
    timed_out = False
    while True:
        pid, status, usage = os.wait4(child, os.WNOHANG)
        if pid:
            return status, usage, timed_out
        if not timed_out and time.monotonic() - start > MOST_WAITING:
            timed_out = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)


def _faults_of_end(case: Case, status: int, timed_out: bool) -> Iterable[str]:
    code = os.waitstatus_to_exitcode(status)
    if timed_out:
        yield f"more than {MOST_WAITING:g} seconds"
    elif code < 0:
        yield f"signal: {signal.Signals(-code).name}"
    elif code not in (0, 2) and not (code == 1 and case.program in MAY_BE_ONE):
        yield f"exit status {code}"


def _faults_of_text(status: int, place: Place, out: str, err: str) -> Iterable[str]:
    files = [path for path in place.out.rglob("*.txt") if stat.S_ISREG(path.lstat().st_mode)]
    logs = [path.read_text("utf-8", "replace") for path in files if path.stat().st_size < 2**26]
    if "Traceback (most recent call last)" in out + err:
        yield "traceback"
    if any(_ESCAPE.search(x) for x in (out, err)):
        yield "control characters"
    if any(_ESCAPE.search(x) for x in logs):
        yield "control characters in a file"
    if os.waitstatus_to_exitcode(status) == 2:
        last = err.strip().splitlines()[-1:]
        if not last or not re.match(r"focal-d2( \w+)?: error: .", last[0]):
            yield "no line that says why"
        elif len(last[0]) > LONGEST_LINE:
            yield f"a line of {len(last[0])} characters"


def _listing(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for where, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(where, name)
            state = os.lstat(path)
            times = (state.st_mtime_ns,) if name in files else ()
            found[os.path.relpath(path, folder)] = (state.st_mode, state.st_size * bool(times), *times)
    return found


def _child(case: Case, place: Place, arguments: list[str], marks: Path) -> None:
    """Run the program; never returns."""
    code = 70
    try:
        os.setpgid(0, 0)
        for handle, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(place.folder / name, os.O_WRONLY | os.O_CREAT, 0o600), handle)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(place.folder / "work")
        os.environ.update(
            HOME=str(place.folder / "home"),
            FVCORE_CACHE=str(place.folder / "cache"),
            TMPDIR=str(place.folder / "tmp"),
            PATH=f"{place.folder / 'bin'}:{os.environ['PATH']}",
            NO_COLOR="1",
            NO_PROXY="*",
        )
        (place.folder / "start").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024))
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        most = size + MOST_ADDRESSES * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        sys.argv = ["focal-d2", PROGRAMS[case.program], *arguments]
        sys.addaudithook(_Watch(place, marks, case.may_connect))
        try:
            code = main() or 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


class _Watch:
    """Note what Python is about to do, if no file may make it do so."""

    def __init__(self, place: Place, marks: Path, may_connect: bool) -> None:
        self._marks = marks
        self._may_connect = may_connect
        self._allowed = tuple(
            os.path.realpath(x) + "/"
            for x in (*(place.folder / n for n in ("out", "cache", "tmp")), "/dev/null")
        )
        self._is_busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_busy or not (
            event in _STARTS or event in _CHANGES or event in ("open", "socket.connect")
        ):
            return
        self._is_busy = True
        try:
            self._look(event, arguments)
        finally:
            self._is_busy = False

    def _look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _STARTS:
            texts = [x.decode(errors="replace") if isinstance(x, bytes) else str(x) for x in arguments[:2]]
            self._note(f"started: {' '.join(texts)[:100]}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and isinstance(flags, int) and flags & _WRITING:
                self._check(path)
        elif event == "socket.connect":
            address = arguments[1]
            if isinstance(address, tuple) and not (self._may_connect and address[0] == "127.0.0.1"):
                self._note(f"connected: {address[0]}")
                raise OSError("no network here")
        else:
            for i in _CHANGES[event]:  # a link may lead anywhere, if it is itself what is removed or replaced
                if isinstance(arguments[i], (str, bytes, os.PathLike)):
                    path = os.path.abspath(os.fsdecode(arguments[i]))
                    if event != "os.mkdir":
                        self._check(os.path.dirname(path))
                    elif not os.path.lexists(path):
                        self._check(path)

    def _check(self, path: Any) -> None:
        real = os.path.realpath(os.fsdecode(path)) + "/"
        if not real.startswith(self._allowed):
            self._note(f"outside: {real[:-1]}")

    def _note(self, text: str) -> None:
        with open(self._marks, "a") as file:
            file.write(text.encode("ascii", "backslashreplace").decode().replace("\n", " ") + "\n")
