"""The daemon's end of a training loop's socket: a script in a thread, or a real daemon."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
from consortium import Consortium
from safetensors.numpy import save_file

from p2pfed.demo.federation import Daemon, Federation
from p2pfed.demo.plan import Cast, Hospital
from p2pfed.training.task import task_id
from p2pfed.wire.payload import decode_payload

SAMPLES = 60  # what the roster says of the hospital
HELD = Consortium(3)


class LoopDaemon:
    """Listens where a node's daemon would; `serve` plays a script with one process that joins.

    Attributes:
        seen: Every byte that came.
        answers: The answers to `ask`, oldest first.
    """

    def __init__(self, folder: Path, *, privacy: str = "allow_none = true", task: str = "loop"):
        self.folder = folder
        self.exchange = folder / "exchange"
        self.exchange.mkdir()
        self.config = folder / "p2pfed.toml"
        self.config.write_text(
            '[node]\nname = "h0"\ndata_dir = "."\n'
            f'[train]\ntask = "{task}"\n'
            f'[privacy]\nledger = "ledger.db"\n{privacy}\n'
        )
        self.seen = b""
        self.answers: list[dict[str, Any]] = []
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(folder / "loop.sock"))
        self._listening.listen()
        self._listening.settimeout(30)
        self._threads: list[threading.Thread] = []
        self._problems: queue.SimpleQueue[BaseException] = queue.SimpleQueue()

    def serve(self, script: Any, welcome: Any = None) -> None:
        """Take the next process that joins and play `script(call)` with it, in a thread."""
        thread = threading.Thread(target=self._serve, args=(script, welcome), daemon=True)
        thread.start()
        self._threads.append(thread)

    def _serve(self, script: Any, welcome: Any) -> None:
        try:
            connection, _ = self._listening.accept()
            with Call(self, connection) as call:
                call.start(welcome)
                script(call)
        except BaseException as error:  # noqa: BLE001 - told to the test
            self._problems.put(error)

    def done(self) -> None:
        """Wait until every script has ended; raises what one of them raised."""
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive(), "the daemon's script does not end"
        self._threads.clear()
        if not self._problems.empty():
            raise self._problems.get()

    def close(self) -> None:
        self._listening.close()

    def stop_listening(self) -> None:
        self._listening.close()
        (self.folder / "loop.sock").unlink()

    def put_view(self, values: Any) -> str:
        """Write a view under the name that requests give; returns it."""
        partial = self.exchange / "next"
        save_file({"model": np.asarray(values, np.float32)}, partial)
        partial.replace(self.exchange / "view.safetensors")
        return "view.safetensors"

    def released(self, answer: dict[str, Any], run: Any) -> np.ndarray:
        """What a release holds, as a dense vector in units of the parameters."""
        data = (self.exchange / answer["payload"]).read_bytes()
        payload = decode_payload(
            data, num_parameters=run.num_parameters, max_released=run.num_parameters
        )
        dense = np.zeros(run.num_parameters)
        dense[payload.indices] = payload.values * 2.0**-run.grid_bits
        return dense

    def private(self, page: str) -> dict[str, Any]:
        """A page of the trainer's private socket."""
        connection = http.client.HTTPConnection("local")
        with contextlib.closing(connection), socket.socket(socket.AF_UNIX) as made:
            made.connect(str(self.folder / "trainer.sock"))
            connection.sock = made
            connection.request("GET", f"/v1/{page}")
            return json.loads(connection.getresponse().read())


class Call:
    """One process that has joined."""

    def __init__(self, daemon: LoopDaemon, connection: socket.socket) -> None:
        connection.settimeout(30)
        self.daemon = daemon
        self.connection = connection
        self._stream = connection.makefile("rb")
        self.hello: dict[str, Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self.connection.close()

    def start(self, welcome: Any) -> None:
        """Welcome it, or send what a test wants to be sent, and hear its first line."""
        if welcome is None:
            welcome = {"op": "welcome", "exchange": str(self.daemon.exchange)}
        if isinstance(welcome, dict):
            welcome = json.dumps(welcome).encode() + b"\n"
        if welcome:
            self.connection.sendall(welcome)
            self.hello = self.hear()

    def hear(self) -> dict[str, Any] | None:
        """The next line; None when it has gone."""
        try:
            line = self._stream.readline()
        except ConnectionResetError:
            line = b""
        self.daemon.seen += line
        return json.loads(line) if line else None

    def send(self, **request: Any) -> None:
        self.connection.sendall(json.dumps(request).encode() + b"\n")

    def ask(self, **request: Any) -> dict[str, Any] | None:
        self.send(**request)
        answer = self.hear()
        self.daemon.answers.append(answer)
        return answer

    def round(self, run: Any, number: int, view: Any, **more: Any) -> dict[str, Any] | None:
        return self.ask(**asking(self.daemon, run, number, view), **more)

    def evaluate(self, number: int, view: Any, **more: Any) -> dict[str, Any] | None:
        name = self.daemon.put_view(view)
        return self.ask(op="evaluate", view=name, round=number, **more)


def asking(daemon: LoopDaemon, run: Any, number: int, view: Any) -> dict[str, Any]:
    """The request of a round."""
    return {
        "op": "round",
        "run": run.encode().decode(),
        "round": number,
        "view": daemon.put_view(view),
        "samples": SAMPLES,
        "scale": 1,
        "scale_of": 1,
        "heads": [],
    }


def a_run(task: Any, size: int, **constants: Any) -> Any:
    """A run of a loop's task, without a mechanism unless constants say so."""
    run = HELD.run(task_id=task_id(task), task="loop:net:build", num_parameters=size, rounds=3)
    return type(run).decode(replace(run, **constants).encode()) if constants else run


def protected(unit: str = "hospital", **constants: Any) -> dict[str, Any]:
    """Constants of a run with dense noise."""
    return {
        "mechanism": "gaussian",
        "unit": unit,
        "epsilon": Fraction(8),
        "delta": Fraction(1, 100_000),
        **constants,
    }


def loops_federation(folder: Path, **samples: int) -> Federation:
    """Real daemons that wait for a training loop to join; the model is `build` of `net`."""
    hospitals = tuple(Hospital(name, size) for name, size in samples.items())
    cast = Cast("loop:net:build", None, hospitals, "", "", "")
    made = Federation(folder, cast, epsilon="0")
    for daemon in made.daemons.values():
        file = daemon.folder / "p2pfed.toml"
        as_described = 'task = "loop:net:build"'
        assert as_described in file.read_text()
        there = f'task = "loop"\nloop_socket = "{daemon.sockets / "loop.sock"}"'
        file.write_text(file.read_text().replace(as_described, there))
    return made


def has_trainer(daemon: Daemon) -> bool:
    """Whether a loop has joined."""
    status = daemon.status()
    return status is not None and status["trainer"]["state"] == "ready"
