"""task check: one dry step of a task on the hospital's own data, before it takes part in a run.

Map: `check_options` -> `check`: which task (flags, DIR's pyproject.toml or the node's
configuration) -> `_Child`, a process that goes through the steps and tells rows -> the table.

Invariant: no network, no ledger, no release. Torch is loaded by the other process only, and
whatever a task does to it ends as a row: a crash, a kill, a loop without end. What the task prints
is counted and not shown. A module is looked for where the daemon's trainer looks: among what is
installed, not in the folder that one happens to be in; and in DIR where one is named.

Not here: what is looked at (`training.check_steps`, `training.check_training`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import deque
from pathlib import Path

from p2pfed.cli.locate import config_path
from p2pfed.cli.options import with_json
from p2pfed.cli.private_plane import send_root_away
from p2pfed.cli.task_options import option_flag, options_of
from p2pfed.cli.text import envelope, printable, table
from p2pfed.errors import ConfigError, TrainerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import subprocess
    from argparse import ArgumentParser, Namespace
    from collections.abc import Iterator
    from typing import Any

__all__ = ["check", "check_options"]

_DEVICES = ("auto", "cpu", "cuda", "mps", "xpu")
_TAIL = 200  # lines of the child's standard error that are kept
_GRACE = 5.0  # seconds for the child to leave
_START = 120.0  # seconds for it to load torch
_LOOK = 0.2  # seconds between two looks at the child


def check_options(parser: ArgumentParser) -> None:
    """Give `task check` its flags."""
    parser.add_argument(
        "dir",
        nargs="?",
        metavar="DIR",
        help="folder of `p2pfed task new`: what [tool.p2pfed] in its pyproject.toml says",
    )
    parser.add_argument(
        "-c",
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a node's: what its [train] says",
    )
    parser.add_argument("--task", metavar="SPEC", help="module:Class, or loop:module:function")
    parser.add_argument("--data", metavar="PATH", help="as train.data")
    option_flag(parser, "as in train.options")
    parser.add_argument("--device", choices=_DEVICES, help="as train.device")
    parser.add_argument(
        "--limit", type=float, default=120.0, metavar="S", help="seconds per step (default 120)"
    )
    with_json(parser)


def check(args: Namespace) -> int:
    """Check, print what was found, and return 1 if something failed."""
    subject, memory_gb = _subject(args)
    child = _Child(subject, memory_gb, args)
    rows = child.rows()
    failed = [row for row in rows if row["status"] == "FAIL"]
    if args.json:
        data = {"task": subject["task"], "rows": rows}
        print(envelope("task-check", data, ok=not failed))
    else:
        print("\n".join(_lines(rows)))
    return 1 if failed else 0


def _lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    cells = [(row["status"], row["check"], row["found"]) for row in rows]
    head, *lines = table(("RESULT", "CHECK", "FOUND"), cells)
    yield head
    indent = " " * head.index("FOUND")
    for row, line in zip(rows, lines, strict=True):
        yield line
        if row["do"]:
            yield f"{indent}-> {printable(row['do'])}"
    failed = list(dict.fromkeys(row["check"] for row in rows if row["status"] == "FAIL"))
    warned = sum(row["status"] == "warn" for row in rows)
    yield ""
    yield f"failed: {', '.join(failed)}" if failed else f"nothing failed; {warned} warnings"


# --- what is checked ---------------------------------------------------------------------------


def _subject(args: Namespace) -> tuple[dict[str, Any], float]:
    """A `training.check.Subject` as JSON, and the trainer's limit of memory."""
    subject, memory_gb = _base(args)
    if args.task:
        subject["task"] = args.task
    if args.data:
        subject["data"] = str(Path(args.data).absolute())
    if args.device:
        subject["device"] = args.device
    subject["options"] = {**subject.get("options", {}), **options_of(args)}
    subject.setdefault("data", None)
    if subject["task"] == "loop":
        raise ConfigError(
            'train.task is "loop": the loop\'s own program makes its model',
            "what can be checked beforehand is the model",
            "name it: p2pfed task check --task loop:module:function",
        )
    return subject, memory_gb


def _base(args: Namespace) -> tuple[dict[str, Any], float]:
    if args.dir and not args.config:
        return _of_project(Path(args.dir)), 0.0
    if args.task and not args.config:
        return {}, 0.0
    found = config_path(args)
    if found is None:
        raise ConfigError(
            "which task?",
            "no DIR, no --task, and no p2pfed.toml here or in the usual places",
            "run: p2pfed task check DIR   or: p2pfed task check -c FILE",
        )
    send_root_away(found, "sudo -u {user} p2pfed task check")
    return _of_node(found)


def _of_node(file: Path) -> tuple[dict[str, Any], float]:
    from p2pfed.config import load_settings

    settings = load_settings(file)
    train = settings.train
    if not train.enabled:
        raise ConfigError(
            "this node does not train", f"{file} says train.enabled = false", "name a --task"
        )
    subject = {
        "task": train.task,
        "data": None if train.data is None else str(train.data),
        "options": dict(train.options),
        "device": train.device,
        "precision": train.precision,
        "unit": settings.privacy.unit,
        "allow_none": settings.privacy.allow_none,
    }
    return subject, train.memory_gb


def _of_project(folder: Path) -> dict[str, Any]:
    import tomllib

    from p2pfed.cli.files import read_text

    file = folder / "pyproject.toml"
    try:
        said = tomllib.loads(read_text(file)).get("tool", {}).get("p2pfed", {})
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not TOML", str(error), "correct the line named") from error
    if not isinstance(said.get("task"), str):
        raise ConfigError(
            f"{file} names no task",
            'expected is [tool.p2pfed] with task = "module:Class"',
            "see what this makes: p2pfed task new DIR",
        )
    unknown = set(said) - {"task", "data", "options"}
    if unknown:
        raise ConfigError(
            f"{file}: [tool.p2pfed] has the unknown key {min(unknown)!r}",
            "known are task, data, options",
        )
    if "data" in said:
        said["data"] = str(folder.absolute() / said["data"])
    return dict(said)


# --- the other process -------------------------------------------------------------------------


class _Child:
    """The process that checks, and what came from it."""

    def __init__(self, subject: dict[str, Any], memory_gb: float, args: Namespace) -> None:
        self._subject, self._memory_gb, self._args = subject, memory_gb, args
        self._rows: list[dict[str, Any]] = []
        self._step, self._progress = "", ""
        self._since = self._heard = time.monotonic()
        self._ended = False
        self._lines, self._last = 0, b"\n"  # of what the task printed
        self._half = b""  # of a message
        self._said: deque[str] = deque(maxlen=_TAIL)
        self._half_said = b""

    def rows(self) -> list[dict[str, Any]]:
        """Run it to its end, however that comes; what it found.

        Raises:
            TrainerError: It did not even begin.
        """
        import contextlib
        import signal

        reading, writing = os.pipe()
        process = self._started(writing)
        os.close(writing)
        try:
            hung = self._followed(process, reading)
        finally:
            with contextlib.suppress(OSError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(reading)
            self._show("")
        if not self._ended:
            self._rows.append(self._lost(process.returncode, hung=hung))
        self._rows.append(_row_of_output(self._lines + (self._last != b"\n")))
        return self._rows

    def _started(self, writing: int) -> subprocess.Popen[bytes]:
        import subprocess

        command = [sys.executable, "-P", "-m", "p2pfed.training", "check"]
        command += ["--subject", json.dumps(self._subject), "--report-fd", str(writing)]
        command += ["--memory-gb", str(self._memory_gb)]
        environment = dict(os.environ)
        if self._args.dir:
            before = environment.get("PYTHONPATH")
            folder = str(Path(self._args.dir).absolute())
            environment["PYTHONPATH"] = f"{folder}{os.pathsep}{before}" if before else folder
        return subprocess.Popen(  # noqa: S603 - our own interpreter and module
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[writing],
            env=environment,
            start_new_session=True,
        )

    def _followed(self, process: subprocess.Popen[bytes], reading: int) -> bool:
        """Take in what comes until the child has gone; True if it took too long."""
        import selectors

        assert process.stdout is not None
        assert process.stderr is not None
        takers = {reading: self._heard_of, process.stdout.fileno(): self._count}
        takers[process.stderr.fileno()] = self._keep
        with selectors.DefaultSelector() as ready, process.stdout, process.stderr:
            for descriptor in takers:
                os.set_blocking(descriptor, False)
                ready.register(descriptor, selectors.EVENT_READ)
            gone = False
            while True:
                came = False
                for key, _ in ready.select(0 if gone else _LOOK):
                    data = os.read(key.fd, 1 << 16)
                    if data:
                        takers[key.fd](data)
                        came = True
                    else:
                        ready.unregister(key.fd)
                if gone and not came:  # its children may hold the pipes open: nobody waits for them
                    return False
                gone = process.poll() is not None
                quiet = time.monotonic() - self._heard
                if not gone and quiet > self._patience():
                    return not self._ended
                self._show_progress()

    def _patience(self) -> float:
        """Seconds without a word until the child is given up."""
        if self._ended:
            return _GRACE
        return float(self._args.limit) if self._step else max(_START, self._args.limit)

    def _heard_of(self, data: bytes) -> None:
        *lines, self._half = (self._half + data).split(b"\n")
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:  # a task wrote where it should not
                continue
            if "row" in message:
                self._rows.append(message["row"])
            elif "step" in message:
                self._step, self._progress, self._since = message["step"], "", time.monotonic()
            elif "progress" in message:
                told = f"{message['progress']} {message['done']} of {message['of']}"
                if told == self._progress:
                    continue  # it says so again, and goes nowhere
                self._progress = told
            else:
                self._ended = True
            self._heard = time.monotonic()

    def _count(self, data: bytes) -> None:
        self._lines, self._last = self._lines + data.count(b"\n"), data[-1:]

    def _keep(self, data: bytes) -> None:
        *lines, self._half_said = (self._half_said + data).split(b"\n")
        self._half_said = self._half_said[-4096:]
        self._said.extend(line.decode(errors="replace") for line in lines)

    def _show_progress(self) -> None:
        if self._step:
            took = time.monotonic() - self._since
            told = f": {self._progress}" if self._progress else ""
            self._show(f"{self._step}{told}, {took:.0f} s")

    def _show(self, text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{printable(text)}", end="", file=sys.stderr, flush=True)

    def _lost(self, code: int, *, hung: bool) -> dict[str, Any]:
        """The row of a child that did not come to its end."""
        if not self._step:
            last = next((line for line in reversed(self._said) if line.strip()), "it said nothing")
            raise TrainerError(
                "the check did not begin", last, "is p2pfed installed as a whole? see README.md"
            )
        if hung:
            at = f" at {self._progress}" if self._progress else ""
            found = f"nothing came of it in {self._args.limit:g} s{at}: the process was ended"
            do = "a loop without end? if it only takes long: --limit SECONDS"
        else:
            found, do = _death(code)
            found += _crash_site(self._said)
        return {"check": self._step, "status": "FAIL", "found": found, "do": do, "facts": {}}


def _death(code: int) -> tuple[str, str]:
    import signal

    if code >= 0:
        return f"the task ended the process (exit code {code})", "raise an error instead"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL:
        do = "the system kills what takes too much memory: a smaller batch, patch or model"
        return f"the process was killed ({name})", do
    return f"the process crashed ({name})", "a library that the task calls crashed: see the line"


def _crash_site(said: deque[str]) -> str:
    """The line of the hospital's own code that `faulthandler` named."""
    import re
    import sysconfig

    package = str(Path(__file__).resolve().parent.parent)
    ours = (sysconfig.get_paths()["stdlib"], package)
    for line in said:
        found = re.match(r'  File "(.+)", line (\d+) in (\w+)', line)
        if found and "site-packages" not in found[1] and not found[1].startswith(ours):
            return f" ({Path(found[1]).name}, line {found[2]}, in {found[3]})"
    return ""


def _row_of_output(lines: int) -> dict[str, Any]:
    row = {"check": "prints", "status": "ok", "found": "nothing", "do": "", "facts": {}}
    if lines:
        row["status"] = "warn"
        row["found"] = f"{lines} lines to standard output; in a run they go to trainer.log"
        row["do"] = "print nothing of a patient"
    row["facts"] = {"lines": lines}
    return row
