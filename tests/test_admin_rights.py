"""Who may do what on the admin socket: the rule as a table, and real users at a real socket."""

from __future__ import annotations

import contextlib
import grp
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import trio
from admin_fakes import FakeBackend, daemon, short_folder
from other_users import required

from p2pfed.admin import guard
from p2pfed.admin.binding import bind_socket
from p2pfed.admin.client import Client
from p2pfed.admin.rights import Right, group_number, may, operator_ids, right_of, user_name
from p2pfed.errors import ConfigError, NotPermitted

OWNER, LISTED, STRANGER = 990, 1000, 1001
needs_root = required("" if os.geteuid() == 0 else "only root can act as other users")


@pytest.fixture
def folder():
    with short_folder() as path:
        yield path


@pytest.mark.parametrize(
    ("uid", "right"),
    [
        (0, Right.ALL),
        (OWNER, Right.ALL),
        (LISTED, Right.WRITE),
        (STRANGER, Right.READ),
        (-1, Right.READ),  # nobody said who it is
    ],
)
def test_the_rule(uid, right):
    assert right_of(uid, owner=OWNER, operators={LISTED}) is right


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", ""])
def test_reading_is_get_and_head_alone(method):
    assert may(Right.READ, method) == (method in {"GET", "HEAD"})
    assert may(Right.WRITE, method)
    assert may(Right.ALL, method)


def test_operators_are_names_or_numbers_and_all_unknown_ones_are_told():
    root = pwd.getpwuid(0).pw_name
    assert operator_ids([root, "4242"]) == {0, 4242}
    assert operator_ids([]) == frozenset()
    with pytest.raises(ConfigError) as told:
        operator_ids([root + "x", "no-such-user-at-all", root])
    assert "2 unknown users" in told.value.what
    assert f"did you mean {root!r}?" in told.value.why
    assert "'no-such-user-at-all'" in told.value.why


def test_a_group_is_a_name_or_a_number_and_a_near_miss_is_named():
    name = grp.getgrgid(0).gr_name
    assert group_number(name) == 0
    assert group_number("77") == 77
    assert group_number(str(2**32 - 2)) == 2**32 - 2
    with pytest.raises(ConfigError, match=f"did you mean '{name}'"):
        group_number(name + "x")


@pytest.mark.parametrize("number", [2**32 - 1, 2**32, 9_999_999_999])
def test_a_number_that_no_user_and_no_group_can_have_is_unknown(number):
    with pytest.raises(ConfigError, match="there is no group"):
        group_number(str(number))
    with pytest.raises(ConfigError, match="1 unknown user"):
        operator_ids([str(number)])


def test_who_has_no_name_is_called_by_number():
    assert user_name(0) == pwd.getpwuid(0).pw_name
    assert user_name(2_000_000_019) == "2000000019"


# --- real users --------------------------------------------------------------------------------


BECOME = """
import json, os, socket, sys
uid, gid, *groups = map(int, sys.argv.pop(1).split())
os.setgroups(groups)
os.setgid(gid)
os.setuid(uid)
"""
ASK = """
path, method, target, body = sys.argv[1:5]
with socket.socket(socket.AF_UNIX) as client:
    client.settimeout(60)
    client.connect(path)
    head = f"{method} {target} HTTP/1.1\\r\\nHost: p2pfed\\r\\nConnection: close\\r\\n"
    client.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
    answer = b""
    while piece := client.recv(65536):
        answer += piece
head, _, rest = answer.partition(b"\\r\\n\\r\\n")
print(json.dumps([int(head.split()[1]), json.loads(rest)]))
"""


def as_user(who: str, program: str, *words: object) -> list[str]:
    """The command that runs a program as `UID GID [GROUP...]`."""
    command = [sys.executable, "-I", "-S", "-c", BECOME + program, who]
    return [*command, *(str(word) for word in words)]


def ask_as(who: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = as_user(who, ASK, *words, *([""] if len(words) < 4 else []))
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=30, check=False)


def told(who: str, *words: object) -> tuple[int, dict]:
    done = ask_as(who, *words)
    assert done.returncode == 0, done.stderr
    status, answer = json.loads(done.stdout)
    return status, answer


def open_to_others(folder: Path) -> Path:
    folder.chmod(0o755)
    return folder / "a.sock"


@needs_root
@pytest.mark.slow
def test_members_of_the_group_read_operators_write_and_each_attempt_is_noted(folder):
    path, backend = open_to_others(folder), FakeBackend()
    operator, member = "4001 4001 4343", "4002 4002 4343"
    backend.operators = frozenset({4001})
    with daemon(backend, path, mode=0o660, group="4343"):
        assert path.stat().st_gid == 4343
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        for who, uid, right in ((operator, 4001, "write"), (member, 4002, "read")):
            you = told(who, path, "GET", "/v1/version")[1]["you"]
            assert you == {"uid": uid, "name": str(uid), "may": right}
        assert told(member, path, "GET", "/v1/status")[0] == 200
        assert backend.written == []  # reading is not noted
        assert told(operator, path, "POST", "/v1/share", '{"on": false}')[0] == 200
        assert told(operator, path, "POST", "/v1/share", '{"on": 3}')[0] == 400
        refused = [told(member, path, "POST", "/v1/share", '{"on": true}') for _ in range(2)]
        assert told(member, path, "DELETE", "/v1/status")[0] == 403
        assert Client(path).post("/v1/share", {"on": True}) == {"sharing": True}
        assert Client(path).get("/v1/version")["you"]["may"] == "all"
    assert [status for status, _ in refused] == [403, 403]
    problem, root = refused[0][1], pwd.getpwuid(0).pw_name
    assert problem["exit_code"] == 4
    assert problem["title"] == "4002 (uid 4002) may only read: POST /v1/share is refused"
    assert problem["hint"].startswith(f"run: sudo -u {root} p2pfed ")
    assert "admin.operators" in problem["hint"]
    assert backend.asked == [("share", False), ("share", True)]
    assert backend.written == [
        (4001, "4001", "POST /v1/share", "done"),
        (4001, "4001", "POST /v1/share", "config-error"),
        (4002, "4002", "POST /v1/share", "not-permitted"),  # once a minute
        (0, root, "POST /v1/share", "done"),
    ]


@needs_root
@pytest.mark.slow
def test_who_is_not_of_the_group_cannot_connect(folder):
    path = open_to_others(folder)
    with daemon(FakeBackend(), path, mode=0o660, group="4344"):
        assert "PermissionError" in ask_as("4002 4002 4343", path, "GET", "/v1/status").stderr
        assert told("4002 4002 4344", path, "GET", "/v1/status")[0] == 200


HOLD = """
import select
held, refused = [], 0
for _ in range(100):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    held.append(s)
waiting = list(held)
while told := select.select(waiting, [], [], 20.0 if refused < 40 else 0.2)[0]:
    for s in told:
        waiting.remove(s)
        refused += s.recv(12) == b"HTTP/1.1 503"
print(refused, flush=True)
sys.stdin.read()
"""


@needs_root
@pytest.mark.slow
def test_a_reader_cannot_lock_the_daemons_user_out(folder):
    path = open_to_others(folder)
    with daemon(FakeBackend(), path, mode=0o660, group="4343"):
        rude = subprocess.Popen(
            as_user("4002 4343", HOLD, path),
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        with rude:
            refused = int(rude.stdout.readline())
            assert Client(path, timeout=5).get("/v1/version")["you"]["may"] == "all"
            rude.stdin.close()
    assert 40 <= refused <= 52  # all but those of one user


# Of the end of a connection it takes no notice before the daemon has closed it altogether.
FLOOD = """
import select, time
held, poll, end = {}, select.epoll(), time.monotonic() + 8.0
def more():
    s = socket.socket(socket.AF_UNIX)
    s.setblocking(False)
    try:
        s.connect(sys.argv[1])
    except BlockingIOError:
        return False
    poll.register(s, select.EPOLLHUP)
    held[s.fileno()] = s
    return True
while len(held) < 900 and more():
    pass
print("begun", flush=True)
while time.monotonic() < end:
    for descriptor, _ in poll.poll(0.005):
        poll.unregister(descriptor)
        held.pop(descriptor).close()
    while len(held) < 900 and more():
        pass
"""


@needs_root
@pytest.mark.slow
def test_a_reader_that_comes_again_and_again_cannot_lock_the_daemons_user_out(folder):
    path = open_to_others(folder)
    with daemon(FakeBackend(), path, mode=0o660, group="4343"):
        command = as_user("4002 4343", FLOOD, path)
        with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE) as rude:
            assert rude.stdout.readline() == b"begun\n"
            for _ in range(3):
                assert Client(path, timeout=4).get("/v1/version")["you"]["may"] == "all"
            rude.kill()


FOLLOW = b"GET /v1/events?follow=1 HTTP/1.1\r\nHost: p2pfed\r\n\r\n"


@needs_root
@pytest.mark.slow
def test_two_readers_together_cannot_lock_the_daemons_user_out(folder):
    path = open_to_others(folder)
    with daemon(FakeBackend(), path, mode=0o660, group="4343"), contextlib.ExitStack() as held:
        follow = HOLD.replace("held.append(s)", f"held.append(s)\n    s.sendall({FOLLOW!r})")
        for user in ("4002 4343", "4003 4343"):
            rude = subprocess.Popen(
                as_user(user, follow, path), cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            held.enter_context(rude)
            held.callback(rude.stdin.close)
            assert rude.stdout.readline()
        assert Client(path, timeout=4).get("/v1/version")["you"]["may"] == "all"


FETCH = """
held = []
for _ in range(4):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    s.sendall(b"GET /v1/model HTTP/1.1\\r\\nHost: p2pfed\\r\\n\\r\\n")
    held.append(s)
print([int(s.recv(12)[9:]) for s in held], flush=True)
sys.stdin.read()
"""


@needs_root
@pytest.mark.slow
def test_readers_cannot_have_any_number_of_copies_of_the_model_made(folder):
    path, backend = open_to_others(folder), FakeBackend()
    backend.model_bytes = bytes(4 << 20)  # more than the socket holds
    with daemon(backend, path, mode=0o660, group="4343"):
        for _ in range(2):  # and their places are free again
            rude = subprocess.Popen(
                as_user("4002 4343", FETCH, path),
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            with rude:
                assert sorted(json.loads(rude.stdout.readline())) == [200, 200, 504, 504]
                Client(path, timeout=5).download("/v1/model", folder / "copy")
                rude.stdin.close()
            assert (folder / "copy").stat().st_size == 4 << 20
            Client(path).get("/v1/version")


# --- names -------------------------------------------------------------------------------------


async def test_a_directory_service_that_hangs_takes_no_thread_from_the_node(monkeypatch):
    back = threading.Event()
    monkeypatch.setattr(guard, "user_name", lambda _: back.wait(20))
    monkeypatch.setattr(guard, "NAME_SECONDS", 0.05)
    names = []

    async def ask() -> None:
        names.append(await guard.name_of(4002))

    try:
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(ask)
        assert names == ["4002"] * 50
        assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
    finally:
        back.set()


# --- the socket's group ------------------------------------------------------------------------


def test_an_unknown_group_is_a_mistake_of_the_configuration_and_leaves_no_socket(folder):
    with pytest.raises(ConfigError, match="there is no group 'no-such-group-at-all'"):
        bind_socket(folder / "a.sock", mode=0o660, group="no-such-group-at-all")
    assert not (folder / "a.sock").exists()


def test_a_group_means_nothing_to_a_socket_that_is_closed_to_groups(folder):
    bind_socket(folder / "a.sock", mode=0o600, group="no-such-group-at-all").close()
    assert stat.S_IMODE((folder / "a.sock").stat().st_mode) == 0o600


def test_a_group_that_is_not_ours_to_give_is_told_with_the_command(folder, monkeypatch):
    def chown(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(ConfigError) as told:
        bind_socket(folder / "a.sock", mode=0o660, group=grp.getgrgid(0).gr_name)
    assert "usermod -aG" in told.value.do
    assert not (folder / "a.sock").exists()


def test_nobody_can_connect_before_the_socket_has_its_group(folder, monkeypatch):
    path, seen = folder / "a.sock", []

    def chown(*_: object, **__: object) -> None:
        with socket.socket(socket.AF_UNIX) as early, pytest.raises(ConnectionRefusedError):
            early.connect(str(path))
        seen.append(path)

    monkeypatch.setattr(os, "chown", chown)
    bind_socket(path, mode=0o660, group="0").close()
    assert seen == [path]


# --- what there is to ask ----------------------------------------------------------------------


def test_no_endpoint_takes_a_budget(folder):
    """Epsilon is raised in the file or not at all."""
    path, backend = folder / "a.sock", FakeBackend()
    tries = [
        (target, body)
        for target in ("privacy", "config", "settings", "budget", "epsilon", "status")
        for body in ({}, {"epsilon": 99})
    ]
    tries += [
        (target, {"epsilon": 99, "privacy": {"epsilon": 99}})
        for target in ("share", "task", "runs", "join", "leave", "block", "roster", "reload")
    ]
    with daemon(backend, path):
        for target, body in tries:
            with pytest.raises(Exception, match=r".") as refused:
                Client(path).post(f"/v1/{target}", body)
            assert not isinstance(refused.value, (AssertionError, NotPermitted)), target
    assert backend.asked == []


def test_a_reload_and_the_log_are_asked_of_the_backend(folder):
    path, backend = folder / "a.sock", FakeBackend()
    backend.records = [{"ts": "t", "logger": "p2pfed", "message": "m"}]
    with daemon(backend, path):
        assert Client(path).post("/v1/reload")["applied"] == ["log.level"]
        lines = list(Client(path).stream("/v1/logs?level=debug&follow=1"))
    assert lines == [{"ts": "t", "logger": "p2pfed", "message": "m", "level": "debug"}]
    assert [endpoint for _, _, endpoint, _ in backend.written] == ["POST /v1/reload"]


def test_events_are_chosen_by_type_and_time_and_wrong_choices_are_told(folder):
    path, backend = folder / "a.sock", FakeBackend()
    for kind in ("peer.joined", "round.started", "peer.left"):
        backend.emit(kind)
    with daemon(backend, path):
        client = Client(path)
        kinds = [e["type"] for e in client.stream("/v1/events?type=peer.*")]
        assert kinds == ["peer.joined", "peer.left"]
        assert list(client.stream("/v1/events?after=2027-01-01T00:00:00Z")) == []
        assert len(list(client.stream("/v1/events?after=2026-01-02T03:04:05%2B00:00"))) == 3
        assert len(list(client.stream("/v1/events?type=*.*&limit=2"))) == 2
        for wrong in ("type=a%20b", "type=PEER", "after=yesterday", "after=1", "limit=x", "since="):
            with pytest.raises(ConfigError):
                list(client.stream(f"/v1/events?{wrong}"))
