"""The thin client against real sockets: what it says when something is wrong, and what it loads."""

from __future__ import annotations

import importlib.util
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from p2pfed import errors
from p2pfed.admin.client import Client
from p2pfed.errors import (
    AdminError,
    ConfigError,
    DaemonNotRunning,
    NotFound,
    NotPermitted,
    PolicyError,
    TimedOut,
    VersionMismatch,
)

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)


@pytest.fixture
def folder():
    with fakes.short_folder() as path:
        yield path


@pytest.fixture
def backend():
    return fakes.FakeBackend()


@pytest.fixture
def client(folder, backend):
    with fakes.daemon(backend, folder / "a.sock"):
        yield Client(folder / "a.sock")


class Script:
    """A server that answers every connection with the same bytes, then closes or falls silent."""

    def __init__(self, path, answer: bytes, *, silent: bool = False) -> None:
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        self._answer, self._silent = answer, silent
        self._held = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            connection.recv(65536)
            connection.sendall(self._answer)
            if self._silent:
                self._held.append(connection)
            else:
                connection.close()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        for held in [self._listening, *self._held]:
            held.close()


def test_it_reads_views_posts_actions_and_streams_events(client, backend):
    assert client.get("/v1/peers") == [fakes.PEER]
    assert client.post("/v1/share", {"on": False}) == {"sharing": False}
    assert client.post("/v1/leave") == {}
    for i in range(700):
        backend.emit("round.started", round=i, text="ü" * i)
    assert [e["data"]["round"] for e in client.stream("/v1/events")] == list(range(700))


# --- download ----------------------------------------------------------------------------------


def test_a_download_is_a_private_file_with_every_byte(client, backend, folder):
    backend.model_bytes = os.urandom(3_000_000)
    place = folder / "m.safetensors"
    place.write_bytes(b"an older one")
    client.download("/v1/model", place)
    assert place.read_bytes() == backend.model_bytes
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert {path.name for path in folder.iterdir()} == {"a.sock", "m.safetensors"}


def test_a_refused_download_keeps_what_is_there(client, folder):
    place = folder / "m.safetensors"
    place.write_bytes(b"an older one")
    with pytest.raises(NotFound, match="no run"):
        client.download("/v1/model", place)
    assert place.read_bytes() == b"an older one"
    assert {path.name for path in folder.iterdir()} == {"a.sock", "m.safetensors"}


SHORT = {
    "too short": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345",
    "a broken chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n1234",
    "no last chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n1234\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n12345",
    "a length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n12345",
}


@pytest.mark.parametrize("answer", SHORT.values(), ids=SHORT)
def test_a_short_body_is_refused_and_leaves_nothing(folder, answer):
    place = folder / "m.safetensors"
    with Script(folder / "a.sock", answer), pytest.raises(DaemonNotRunning):
        Client(folder / "a.sock").download("/v1/model", place)
    assert {path.name for path in folder.iterdir()} == {"a.sock"}


def test_a_daemon_that_falls_silent_in_the_middle_of_a_download_is_a_timeout(folder):
    with Script(folder / "a.sock", SHORT["too short"], silent=True), pytest.raises(TimedOut):
        Client(folder / "a.sock", 0.1).download("/v1/model", folder / "m")
    assert {path.name for path in folder.iterdir()} == {"a.sock"}


def test_a_place_that_cannot_be_written_is_told_by_its_name(client, backend, folder):
    backend.model_bytes = b"x" * 100
    for place in (folder / "no" / "m", folder):
        with pytest.raises(ConfigError, match=str(place)):
            client.download("/v1/model", place)
    assert {path.name for path in folder.iterdir()} == {"a.sock"}


def test_a_full_disk_is_told_and_not_taken_for_a_daemon_that_went(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: 500000\r\n\r\n" + bytes(500_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, before[1]))
    try:
        with Script(folder / "a.sock", whole), pytest.raises(ConfigError, match="cannot write"):
            Client(folder / "a.sock").download("/v1/model", folder / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name for path in folder.iterdir()} == {"a.sock"}


def test_following_ends_when_the_reader_has_enough(client, backend):
    backend.emit("node.ready")
    stream = client.stream("/v1/events?follow=1")
    assert next(stream)["type"] == "node.ready"
    stream.close()


@pytest.mark.parametrize(
    ("call", "kind", "code"),
    [
        (lambda c: c.get("/v1/peers/nobody"), NotFound, 5),
        (lambda c: c.get("/v1/nothing"), NotFound, 5),
        (lambda c: c.post("/v1/share", {"on": 3}), ConfigError, 2),
        (lambda c: c.post("/v1/roster", {"signed": "x"}), PolicyError, 7),
        (lambda c: list(c.stream("/v1/events?since=x")), ConfigError, 2),
    ],
)
def test_a_refusal_becomes_the_error_with_its_exit_code(client, call, kind, code):
    with pytest.raises(kind) as caught:
        call(client)
    assert caught.value.exit_code == code
    assert caught.value.what


def test_a_refusal_keeps_its_three_lines(client):
    with pytest.raises(PolicyError) as caught:
        client.post("/v1/roster", {"signed": "x"})
    assert str(caught.value) == ("roster v3 is not newer\na roster is never rolled back\nsign v8")


def test_no_socket_says_that_no_daemon_runs(folder):
    with pytest.raises(DaemonNotRunning) as caught:
        Client(folder / "a.sock").get("/v1/status")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("no such socket")
    assert "p2pfed node" in lines[2]


def test_a_stale_socket_says_that_nobody_listens(folder):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "a.sock"))
    with pytest.raises(DaemonNotRunning, match="nobody is listening") as caught:
        Client(folder / "a.sock").get("/v1/status")
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(("mode", "hint"), [(0o600, "sudo -u"), (0o660, "usermod -aG")])
@pytest.mark.skipif(os.geteuid() != 0, reason="must be root to become somebody else")
@pytest.mark.slow
def test_a_socket_of_somebody_else_says_who_may_use_it(folder, backend, mode, hint):
    folder.chmod(0o755)
    with fakes.daemon(backend, folder / "a.sock", mode=mode):
        source = (
            "import grp, os, pwd, stat, sys; sys.path.insert(0, sys.argv[2]);"
            "import p2pfed.admin.client as c;"
            "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "try: c.Client(sys.argv[1]).get('/v1/status')\n"
            "except c.NotPermitted as e: print(e); sys.exit(e.exit_code)"
        )
        root = Path(errors.__file__).parent.parent
        done = subprocess.run(
            [sys.executable, "-c", source, folder / "a.sock", root],
            capture_output=True,
            text=True,
            check=False,
            timeout=20,
        )
    assert done.returncode == 4, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("permission denied")
    assert lines[1].startswith("you are ")
    assert hint in lines[2]


def test_permission_denied_is_not_permitted(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    class Refusing(socket.socket):
        connect = refuse

    monkeypatch.setattr(socket, "socket", Refusing)
    with pytest.raises(NotPermitted) as caught:
        Client(folder / "a.sock").get("/v1/status")
    assert len(str(caught.value).splitlines()) == 3


def test_a_daemon_that_does_not_answer_times_out(folder):
    with (
        Script(folder / "a.sock", b"", silent=True),
        pytest.raises(TimedOut, match="did not answer within"),
    ):
        Client(folder / "a.sock", 0.05).get("/v1/status")
    with (
        Script(folder / "b.sock", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", silent=True),
        pytest.raises(TimedOut),
    ):
        Client(folder / "b.sock", 0.05).get("/v1/status")


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", DaemonNotRunning),
        (b"SSH-2.0-x\r\n", VersionMismatch),
        (b"HTTP/1.1 200 OK\r\n", DaemonNotRunning),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[1]", DaemonNotRunning),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -9\r\n\r\n[1]", DaemonNotRunning),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n[1]", DaemonNotRunning),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", DaemonNotRunning),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n[1]", DaemonNotRunning),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", VersionMismatch),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", AdminError),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\n[]", AdminError),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_of_ours(folder, answer, kind):
    with Script(folder / "a.sock", answer), pytest.raises(kind) as caught:
        Client(folder / "a.sock", 2).get("/v1/status")
    assert type(caught.value) is kind


def test_an_answer_up_to_the_end_of_the_connection_is_read(folder):
    with Script(folder / "a.sock", b"HTTP/1.1 200 OK\r\n\r\n[1]"):
        assert Client(folder / "a.sock").get("/v1/status") == [1]


def test_a_stream_that_breaks_off_says_so(folder):
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with Script(folder / "a.sock", head + b'9\r\n{"seq":1}\r\n1\r\n\n\r\n'):
        stream = Client(folder / "a.sock").stream("/v1/events?follow=1")
        assert next(stream) == {"seq": 1}
        with pytest.raises(DaemonNotRunning, match="closed the stream"):
            next(stream)


def test_an_endpoint_that_another_version_lacks_is_a_version_mismatch(folder):
    body = b'{"title":"no endpoint /v1/x","detail":"","hint":"","exit_code":5}'
    head = f"HTTP/1.1 404 -\r\nP2pfed-Version: 0.0.9\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        Script(folder / "a.sock", head.encode() + body),
        pytest.raises(VersionMismatch, match=r"0\.0\.9"),
    ):
        Client(folder / "a.sock").get("/v1/x")


def test_the_socket_is_private_to_its_owner(client):
    assert stat.S_IMODE(Path(client.path).stat().st_mode) == 0o600


@pytest.mark.slow
def test_the_client_loads_the_standard_library_alone():
    root = str(Path(errors.__file__).parent.parent)
    source = (
        "import sys, p2pfed.admin.client; print([m for m in sys.modules if not "
        "m.startswith(('p2pfed', '_', '__editable__')) and m.partition('.')[0] not in "
        "sys.stdlib_module_names]); assert 'http.client' not in sys.modules"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            f"import sys; sys.path.insert(0, {root!r}); {source}",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    assert done.stdout.strip() == "[]"
