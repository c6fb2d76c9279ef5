"""Console transcripts in the documents: reading them, playing them, comparing what is printed.

A transcript is a fenced block ```console. A line `$ COMMAND` is run by bash; the lines below it are
what it prints. In them `…` stands for anything on a line, and a line of only `…` for any lines. A
line `# at WHOM` says whose machine the next commands run on: each has a home of its own, all share
one folder, which stands for the mail between them. `p2pfed node` runs in the background until the
end; the next command comes when its socket answers. `export NAME=VALUE` holds for all that follows,
at everybody's. Ports from 4200 to 4299 are exchanged for free
ones. All blocks of a document are one story.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from p2pfed.admin.client import Client
from p2pfed.demo.federation import _free_port, wait_for
from p2pfed.errors import AdminError

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 90  # for one command

_BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"(?<=tcp/)(42\d\d)\b")


@dataclass
class Step:
    """One command, and what it should print."""

    where: str
    command: str
    line: int
    expected: list[str] = field(default_factory=list)


def steps_of(text: str) -> list[Step]:
    """All commands of a document, in order."""
    steps: list[Step] = []
    for block in _BLOCK.finditer(text):
        first = text.count("\n", 0, block.start()) + 2
        steps += _steps_of_block(block[1].splitlines(), first)
    return steps


def _steps_of_block(lines: list[str], first: int) -> list[Step]:
    steps: list[Step] = []
    where, continued = "", False
    for number, line in enumerate(lines, first):
        if continued:
            steps[-1].command += "\n" + line
        elif line.startswith("# at "):
            where = line.removeprefix("# at ").strip()
        elif line.startswith("$ "):
            steps.append(Step(where, line.removeprefix("$ "), number))
        elif steps:
            steps[-1].expected.append(line)
        else:
            raise AssertionError(f"line {number} is the output of no command: {line}")
        continued = line.endswith("\\")
    return steps


def matches(expected: list[str], told: str) -> bool:
    """Whether what was printed is what is written."""
    parts = []
    for line in _trimmed(expected):
        if line.strip() == "…":
            parts.append(r"(?:.*\n)*?")
        else:
            parts.append(".*".join(map(re.escape, line.split("…"))) + r"\n")
    printed = "".join(f"{line}\n" for line in _trimmed(told.splitlines()))
    return re.fullmatch("".join(parts), printed) is not None


def _trimmed(lines: list[str]) -> list[str]:
    lines = [line.rstrip() for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


class Stage:
    """A folder in which a transcript is played.

    Args:
        folder: An empty folder with a short path: sockets lie below it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports: dict[str, str] = {}
        self._exported: list[str] = []
        self._nodes: list[subprocess.Popen[bytes]] = []
        program = folder / ".bin" / "p2pfed"
        program.parent.mkdir()
        python = shlex.quote(sys.executable)
        program.write_text(f'#!/bin/sh\nexec {python} -m p2pfed "$@"\n')
        program.chmod(0o755)

    def play(self, text: str) -> list[str]:
        """Run all transcripts of a document; returns what differs from it."""
        differences = []
        for step in steps_of(text):
            expected = [self._with_ports(line) for line in step.expected]
            told = self.run(step.where, step.command)
            if not matches(expected, told):
                differences.append(
                    f"line {step.line}: $ {step.command}\nexpected:\n"
                    + "\n".join(expected)
                    + f"\ntold:\n{told}"
                )
        return differences

    def run(self, where: str, command: str) -> str:
        """Run one command on somebody's machine; what it prints, errors included."""
        command = self._with_ports(command)
        words = shlex.split(command, comments=True)
        if words[:1] == ["export"]:
            self._exported.append(command)
            return ""
        if words[:1] == ["p2pfed"] and "node" in words[1:4:2]:
            self._start(where, command, words)
            return ""
        done = subprocess.run(
            ["bash", "-c", self._after_exports(command)],
            cwd=self.folder,
            env=self._environment(where),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=SECONDS,
            check=False,
        )
        return done.stdout.decode()

    def _start(self, where: str, command: str, words: list[str]) -> None:
        config = self.folder / words[words.index("-c") + 1]
        data_dir = config.parent / tomllib.loads(config.read_text())["node"]["data_dir"]
        log = config.with_name("node.log")
        with log.open("wb") as out:
            node = subprocess.Popen(
                ["bash", "-c", self._after_exports(f"exec {command}")],
                cwd=self.folder,
                env=self._environment(where),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._nodes.append(node)
        client = Client(data_dir / "admin.sock")

        def answers() -> bool:
            if node.poll() is not None:
                raise AssertionError(f"the node ended:\n{log.read_text()}")
            with contextlib.suppress(AdminError):
                client.get("/v1/status")
                return True
            return False

        wait_for(answers, SECONDS, f"{command} answers")

    def _after_exports(self, command: str) -> str:
        return "\n".join([*self._exported, command])

    def _with_ports(self, text: str) -> str:
        def free(match: re.Match[str]) -> str:
            if match[0] not in self._ports:
                self._ports[match[0]] = str(_free_port())
            return self._ports[match[0]]

        return _PORT.sub(free, text)

    def _environment(self, where: str) -> dict[str, str]:
        home = self.folder / ".homes" / re.sub(r"\W+", "-", where.lower())
        home.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("P2PFED_")}
        return {
            **kept,
            "HOME": str(home),
            "P2PFED_HOME": str(home / "state"),
            "PATH": f"{self.folder / '.bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "120",
        }

    def close(self) -> None:
        """End every node; none is left when this returns."""
        for node in self._nodes:
            node.terminate()
        for node in self._nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()


@contextlib.contextmanager
def stage(folder: Path) -> Iterator[Stage]:
    """A stage on which nothing is left running."""
    made = Stage(folder)
    try:
        yield made
    finally:
        made.close()
