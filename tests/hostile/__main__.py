"""Give each hostile input to the command that reads it; print what became of them as a table.

Exit status 1 if a program was started, a file written outside the output and cache folders, a process ended
by a signal, with a traceback, or by a line that does not say why, or if one went over the limits. Put the
temporary folder (TMPDIR) on a fast disk, and set OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from tests.hostile.corpus import corpus, good, make_template, trusted
from tests.hostile.harness import MOST_MEMORY, MOST_SECONDS, Case, Outcome, preload, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write one line an input")
    parser.add_argument("--only", default="", metavar="TEXT", help="inputs with this in their group or name")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the inputs, each Nth")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="so many at a time")
    parser.add_argument(
        "--trusted", action="store_true", help="instead, files that run code, with --trust-files"
    )
    args = parser.parse_args()
    if args.output:
        args.output.write_text("")

    def wanted(case: Case) -> bool:
        return args.only in f"{case.group}: {case.name}"

    make = trusted if args.trusted else corpus
    outcomes = run_all(make, wanted, args.every, args.jobs, args.output)
    print(table(outcomes))
    return 1 if any(x.faults for x in outcomes) else 0


def run_all(
    make: Callable[[], Iterable[Case]],
    wanted: Callable[[Case], bool],
    every: int,
    jobs: int,
    output: Path | None,
) -> list[Outcome]:
    """Run the good files, and the cases that are wanted.

    Args:
        make: returns the cases, once the good files are there.
        wanted: says so of a case.
        every: of these, take each Nth.
        jobs: how many are run at a time.
        output: file that gets a line when a case ends.
    """
    preload()
    with tempfile.TemporaryDirectory() as top, _server() as port:
        template = Path(top) / "template"
        _in_process(lambda: _quietly(lambda: make_template(template)))
        os.environ |= {"HOSTILE_PORT": str(port), "HOSTILE_TEMPLATE": str(template)}
        cases = [*good(), *[x for x in make() if wanted(x)][::every]]

        def share(job: int) -> None:
            with open(Path(top) / f"outcomes{job}", "wb") as file:
                for i in range(job, len(cases), jobs):
                    outcome = run(cases[i], Path(top) / f"case{i}", template)
                    pickle.dump((i, outcome[1:]), file)
                    if output:
                        with open(output, "a") as lines:
                            lines.write(f"{_line(outcome)}\n")
                    if outcome.faults:
                        print(_line(outcome), file=sys.stderr, flush=True)

        for child in [_fork(lambda job=job: share(job)) for job in range(jobs)]:
            _join(child)
        found: dict[int, tuple[Any, ...]] = {}
        for job in range(jobs):
            with open(Path(top) / f"outcomes{job}", "rb") as file, suppress(EOFError):
                while True:
                    i, rest = pickle.load(file)
                    found[i] = rest
        return [Outcome(case, *found[i]) for i, case in enumerate(cases)]


def _line(outcome: Outcome) -> str:
    case = outcome.case
    figures = [str(outcome.status), f"{outcome.memory} MiB", f"{outcome.seconds:.1f} s"]
    line = "\t".join([case.group, case.name, *figures, "; ".join(outcome.faults), outcome.line[:300]])
    return line.encode("ascii", "backslashreplace").decode()


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes of each group as a table in Markdown."""
    groups: dict[str, list[Outcome]] = {}
    for x in outcomes:
        groups.setdefault(x.case.group, []).append(x)
    rows = [
        "| group | inputs | refused | read | faults | peak, MiB | CPU, s, at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in [*groups.items(), ("all", outcomes)]:
        refused = sum(x.status == 2 for x in found)
        faults = sum(bool(x.faults) for x in found)
        memory, seconds = max(x.memory for x in found), max(x.seconds for x in found)
        rows.append(
            f"| {name} | {len(found)} | {refused} | {len(found) - refused} | {faults} | {memory} "
            f"| {seconds:.1f} |"
        )
    return "\n".join([*rows, "", f"Limits: {MOST_MEMORY} MiB, {MOST_SECONDS:g} s of the CPU."])


@contextmanager
def _server() -> Iterator[int]:
    """Answer every path with a small config, in a process of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "8")
            self.end_headers()
            self.wfile.write(b"SEED: 7\n")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    child = os.fork()
    if child == 0:
        server.serve_forever()
    server.socket.close()
    try:
        yield server.server_port
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


def _fork(act: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def _join(child: int) -> None:
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("a process failed; it says why above")


def _in_process(act: Callable[[], object]) -> None:
    _join(_fork(act))


def _quietly(act: Callable[[], object]) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    act()


if __name__ == "__main__":
    sys.exit(main())
