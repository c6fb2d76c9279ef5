"""The admin socket itself: real sockets, rude clients, rights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import stat
import subprocess
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import trio
from fair_clock import FairClock
from rude_requests import RUDE, get, post
from starlette.exceptions import HTTPException

from p2pfed import __version__
from p2pfed.admin.app import _body
from p2pfed.admin.binding import bind_socket
from p2pfed.admin.server import Limits, serve_admin
from p2pfed.errors import ConfigError, StateInUse

_spec = importlib.util.spec_from_file_location(
    "admin_fakes", Path(__file__).with_name("admin_fakes.py")
)
fakes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fakes)

QUICK = Limits(connections=8, head_s=0.1, write_s=0.05, linger_s=0.05)


@pytest.fixture
def folder():
    with fakes.short_folder() as path:
        yield path


@pytest.fixture
def backend():
    return fakes.FakeBackend()


@pytest.fixture
async def served(backend, folder, nursery):
    path = folder / "a.sock"
    await nursery.start(
        lambda task_status: serve_admin(
            backend, socket=path, mode=0o600, limits=QUICK, task_status=task_status
        )
    )
    yield path
    nursery.cancel_scope.cancel()


async def ask(path, request: bytes, *, eof: bool = False, seconds: float = 5) -> bytes:
    async with await trio.open_unix_socket(str(path)) as stream:
        await stream.send_all(request)
        if eof:
            await stream.send_eof()
        answer = b""
        with trio.fail_after(seconds):
            try:
                async for part in stream:
                    answer += part
            except trio.BrokenResourceError:
                pass
        return answer


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def body_of(answer: bytes):
    head, _, body = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        parts, rest = [], body
        while True:
            size, _, rest = rest.partition(b"\r\n")
            if int(size, 16) == 0:
                break
            parts.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        body = b"".join(parts)
    return body


async def is_alive(path) -> bool:
    return status_of(await ask(path, get("/v1/version"))) == 200


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["status", "peers", "privacy", "roster", "bootstrap", "runs"])
async def test_every_view_of_the_node_is_json_with_the_version_in_a_header(served, what, backend):
    answer = await ask(served, get(f"/v1/{what}"))
    assert status_of(answer) == 200
    assert f"p2pfed-version: {__version__}".encode() in answer
    assert json.loads(body_of(answer)) == getattr(backend, what)()


async def test_one_peer_is_found_by_a_name_that_needs_quoting(served):
    assert json.loads(body_of(await ask(served, get("/v1/peers/Oslo")))) == fakes.PEER
    answer = await ask(served, get("/v1/peers/nobody"))
    problem = json.loads(body_of(answer))
    assert status_of(answer) == 404
    assert b"application/problem+json" in answer
    assert problem == {
        "type": "urn:p2pfed:not-found",
        "title": "no peer nobody",
        "status": 404,
        "detail": "",
        "hint": "see: p2pfed peers",
        "exit_code": 5,
    }


@pytest.mark.parametrize("host", ["p2pfed", "localhost", ""])
async def test_the_hosts_that_curl_sends_are_welcome(served, host):
    assert status_of(await ask(served, get("/v1/status", host=host))) == 200


@pytest.mark.parametrize(
    ("host", "header"),
    [("p2pfed", "Origin: http://evil.example"), ("p2pfed", "Referer: x"), ("evil.example", "X: y")],
)
async def test_whatever_a_web_page_can_send_is_refused(served, host, header, backend):
    request = post("/v1/leave", b"{}").replace(
        b"Host: p2pfed", f"Host: {host}\r\n{header}".encode()
    )
    answer = await ask(served, request)
    assert status_of(answer) == 403
    assert json.loads(body_of(answer))["exit_code"] == 4
    assert backend.asked == []
    await ask(served, request)
    assert [w[0] for w in backend.written] == [os.getuid()]  # once a minute
    assert [w[2:] for w in backend.written] == [("POST /v1/leave", "web-page")]
    await ask(served, get("/v1/status", header, host=host))
    assert len(backend.written) == 1  # reading is not noted


@pytest.mark.parametrize(
    "request_",
    [
        get("/v1/events?since=-1"),
        get("/v1/events?last=x"),
        get("/v1/events?after=soon"),
        get("/v1/events?type=A"),
        get("/v1/nothing"),
        get("/v1/peers").replace(b"GET", b"DELETE"),
        post("/v1/share", b"[]"),
        post("/v1/share", b"{"),
        post("/v1/share", b"{}"),
        post("/v1/share", b'{"on": 3}'),
        post("/v1/share", b'{"on": true, "x": 1}'),
        post("/v1/join", b'{"bootstrap": 1}'),
        post("/v1/runs", b'{"signed": 1}'),
        post("/v1/runs", b'{"signed": "\\ud800"}'),
    ],
)
async def test_every_refusal_says_what_why_and_what_to_do(served, request_):
    answer = await ask(served, request_)
    problem = json.loads(body_of(answer))
    assert 400 <= status_of(answer) < 500
    assert all(problem[key] for key in ("title", "detail", "hint")), problem


async def test_the_newest_events_are_given_alone(served, backend):
    for kind in ("peer.alive", "round.started", "peer.away", "peer.alive"):
        backend.emit(kind)

    async def seqs(query: str) -> list[int]:
        lines = body_of(await ask(served, get(f"/v1/events?{query}"))).splitlines()
        return [json.loads(line)["seq"] for line in lines]

    assert await seqs("last=2") == [3, 4]
    assert await seqs("last=2&type=peer.a*") == [3, 4]
    assert await seqs("last=3&type=peer.*") == [1, 3, 4]
    assert await seqs("last=9") == await seqs("") == [1, 2, 3, 4]
    assert await seqs("last=3&since=3") == [4]


async def test_a_websocket_is_refused_and_the_daemon_lives(served):
    upgrade = (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    )
    answer = await ask(served, get("/v1/status", *upgrade).replace(b"Connection: close\r\n", b""))
    assert status_of(answer) == 403
    assert await is_alive(served)


async def test_actions_reach_the_backend_with_exact_bytes(served, backend):
    text = 'payload "ü"\n-- p2pfed signatures --\n'
    body = json.dumps({"signed": text, "genesis": "/x"}).encode()
    assert status_of(await ask(served, post("/v1/runs", body))) == 200
    listed = [{"version": 1}]
    body = json.dumps({"roster": text, "bootstrap": listed}).encode()
    assert status_of(await ask(served, post("/v1/join", body))) == 200
    assert status_of(await ask(served, post("/v1/join", b""))) == 200
    assert status_of(await ask(served, post("/v1/share", b'{"on": false}'))) == 200
    assert status_of(await ask(served, post("/v1/leave", b""))) == 200
    refused = await ask(served, post("/v1/roster", json.dumps({"signed": text}).encode()))
    assert status_of(refused) == 409
    assert json.loads(body_of(refused))["hint"] == "sign v8"
    assert backend.asked == [
        ("run", (text.encode(), Path("/x"))),
        ("join", (text.encode(), listed)),
        ("join", (None, [])),
        ("share", False),
        ("leave", None),
        ("roster", text.encode()),
    ]


@pytest.mark.parametrize(
    ("target", "body"),
    [
        ("/v1/share", b'{"on": 1}'),
        ("/v1/share", b"{}"),
        ("/v1/share", b'{"on": true, "epsilon": 99}'),
        ("/v1/share", b"[]"),
        ("/v1/share", b"{"),
        ("/v1/share", b"\xff\xfe"),
        ("/v1/share", b"[" * 100_000),
        ("/v1/block", b'{"peer": "Oslo"}'),
        ("/v1/block", b'{"peer": 3, "on": true}'),
        ("/v1/runs", b"{}"),
        ("/v1/runs", b'{"signed": 7}'),
        ("/v1/runs", b'{"signed": "\\ud800"}'),
        ("/v1/join", b'{"bootstrap": {}}'),
        ("/v1/join", b'{"bootstrap": ["x"]}'),
    ],
)
async def test_a_body_that_makes_no_sense_is_a_problem_of_the_caller(served, backend, target, body):
    answer = await ask(served, post(target, body))
    assert status_of(answer) == 400
    assert json.loads(body_of(answer))["exit_code"] == 2
    assert backend.asked == []


async def test_a_body_over_one_mebibyte_is_refused(served, backend):
    answer = await ask(served, post("/v1/roster", b'{"signed": "' + b"x" * (1 << 20) + b'"}'))
    assert status_of(answer) == 413
    assert backend.asked == []


async def test_a_body_without_end_takes_no_memory():
    chunk = bytes(1 << 20)

    class Endless:
        async def stream(self):
            for _ in range(64):
                yield chunk

    tracemalloc.start()
    try:
        with pytest.raises(HTTPException):
            await _body(Endless())
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


async def test_a_body_that_never_arrives_times_out(served, backend, monkeypatch):
    monkeypatch.setattr("p2pfed.admin.app.BODY_SECONDS", 0.02)
    answer = await ask(served, post("/v1/share", b'{"on": true}')[:-5])
    assert status_of(answer) == 504
    assert json.loads(body_of(answer))["exit_code"] == 6
    assert backend.asked == []


async def test_unknown_endpoints_and_methods_are_problems(served):
    for request, status in (
        (get("/v2/status"), 404),
        (get("/v1/status/"), 404),
        (post("/v1/status", b""), 405),
    ):
        answer = await ask(served, request)
        assert status_of(answer) == status
        assert json.loads(body_of(answer))["status"] == status


async def test_a_bug_in_the_backend_is_one_failed_request(served, backend, caplog):
    backend.make_peers = lambda: 1 / 0
    answer = await ask(served, get("/v1/peers"))
    assert status_of(answer) == 500
    assert json.loads(body_of(answer))["exit_code"] == 1
    assert b"ZeroDivision" not in answer
    assert "ZeroDivisionError" in caplog.text
    assert await is_alive(served)


async def test_a_value_that_is_not_json_is_a_failed_request_too(served, backend):
    backend.make_peers = lambda: [{"rtt_ms": float("nan")}]
    assert status_of(await ask(served, get("/v1/peers"))) == 500
    assert await is_alive(served)


# --- events ------------------------------------------------------------------------------------


async def test_events_go_on_after_a_number_and_say_what_was_lost(served, backend):
    backend.lost_before = 3
    for i in range(1200):
        backend.emit("round.started", round=i)

    async def lines(query: str):
        answer = await ask(served, get(f"/v1/events{query}"))
        return [json.loads(line) for line in body_of(answer).splitlines()]

    everything = await lines("")
    assert everything[0] == {"type": "gap", "lost": 3}
    assert [e["seq"] for e in everything[1:]] == list(range(4, 1204))
    assert [e["seq"] for e in await lines("?since=1201")] == [1202, 1203]
    assert [e["seq"] for e in await lines("?since=10&limit=2")] == [11, 12]
    assert status_of(await ask(served, get("/v1/events?since=-1"))) == 400
    assert status_of(await ask(served, get("/v1/events?since=99999999999999999"))) == 400


async def test_following_gets_events_as_they_happen_and_ends_with_the_client(served, backend):
    backend.emit("node.ready")
    async with await trio.open_unix_socket(str(served)) as stream:
        await stream.send_all(get("/v1/events?follow=1"))
        read = b""
        with trio.fail_after(30):
            while b"node.ready" not in read:
                read += await stream.receive_some()
            backend.emit("peer.joined", name="Oslo")
            while b"peer.joined" not in read:
                read += await stream.receive_some()
    ended = backend.closed_generators
    with trio.fail_after(30):
        while backend.closed_generators == ended:  # noqa: ASYNC110 - what others do is awaited
            await trio.sleep(0.01)


async def test_a_gap_is_told_once(served, backend):
    backend.lost_before = 5
    async with await trio.open_unix_socket(str(served)) as stream:
        await stream.send_all(get("/v1/events?follow=1"))
        read = b""
        with trio.fail_after(30):
            while b"gap" not in read:
                read += await stream.receive_some()
            backend.emit("node.ready")
            while b"node.ready" not in read:
                read += await stream.receive_some()
    assert read.count(b"gap") == 1


async def test_a_follower_that_does_not_read_is_dropped(served, backend):
    for _ in range(50):
        backend.emit("noise", text="x" * 100_000)
    async with await trio.open_unix_socket(str(served)) as stream:
        await stream.send_all(get("/v1/events?follow=1"))
        await trio.sleep(3 * QUICK.write_s)
        read = 0
        with trio.fail_after(30):  # a follower that is served would wait for ever
            async for part in stream:
                read += len(part)
    assert 0 < read < 50 * 100_000
    assert await is_alive(served)


# --- the model ---------------------------------------------------------------------------------


async def test_the_model_is_a_file_with_its_length(served, backend):
    backend.model_bytes = bytes(range(256)) * 8000  # several pieces
    answer = await ask(served, get("/v1/model"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == 200
    assert b"content-type: application/octet-stream" in head
    assert b"content-length: 2048000" in head
    assert body == backend.model_bytes
    assert backend.opened.closed


async def test_without_a_model_the_refusal_is_a_problem(served, backend):
    answer = await ask(served, get("/v1/model"))
    assert status_of(answer) == 404
    assert json.loads(body_of(answer))["hint"] == "p2pfed run accept FILE"


async def test_a_client_that_does_not_read_its_model_is_dropped_and_the_file_closed(
    served, backend
):
    backend.model_bytes = bytes(8_000_000)
    async with await trio.open_unix_socket(str(served)) as stream:
        await stream.send_all(get("/v1/model"))
        with trio.fail_after(30):
            while backend.opened is None or not backend.opened.closed:  # noqa: ASYNC110
                await trio.sleep(0.01)
    assert await is_alive(served)


async def test_a_client_that_goes_in_the_middle_closes_the_file(served, backend):
    backend.model_bytes = bytes(8_000_000)
    async with await trio.open_unix_socket(str(served)) as stream:
        await stream.send_all(get("/v1/model"))
        await stream.receive_some(100)
    with trio.fail_after(30):
        while not backend.opened.closed:  # noqa: ASYNC110
            await trio.sleep(0.01)
    assert await is_alive(served)


# --- rude clients ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RUDE)
@pytest.mark.parametrize("ending", ["close", "eof", "stay"])
async def test_a_rude_client_costs_its_own_connection_only(served, kind, ending):
    stream = await trio.open_unix_socket(str(served))
    try:
        await stream.send_all(RUDE[kind])
        if ending == "close":
            await stream.aclose()
        elif ending == "eof":
            await stream.send_eof()
    except trio.BrokenResourceError:
        pass  # it was thrown out already
    assert await is_alive(served)
    await stream.aclose()


async def test_a_client_that_sends_half_a_request_is_disconnected(served):
    assert await ask(served, b"GET /v1/status HTTP/1.1\r\nHost: p2p") == b""


async def test_connections_beyond_the_limit_wait_for_their_turn(served):
    idle = [await trio.open_unix_socket(str(served)) for _ in range(QUICK.connections)]
    await trio.testing.wait_all_tasks_blocked(0.005)
    began = trio.current_time()
    assert await is_alive(served)  # once an idle one has been thrown out
    assert trio.current_time() - began > QUICK.head_s / 4
    for stream in idle:
        await stream.aclose()


async def test_who_waits_too_long_for_a_turn_is_told_that_the_daemon_is_busy(backend, folder):
    path = folder / "a.sock"
    limits = Limits(connections=2, waiting=2, wait_s=0.05, head_s=60)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_admin, backend, socket=path, mode=0o600, limits=limits))
        idle = [await trio.open_unix_socket(str(path)) for _ in range(2)]
        answer = await ask(path, get("/v1/status"))
        problem = json.loads(body_of(answer))
        assert status_of(answer) == 503
        assert problem["title"] == "the daemon is busy"
        assert problem["exit_code"] == 6
        for stream in idle:
            await stream.aclose()
        assert await is_alive(path)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_a_thousand_at_once_are_all_answered(backend, folder):
    path = folder / "a.sock"
    codes = []
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve_admin, backend, socket=path, mode=0o600))
        room = trio.Semaphore(400)  # our own descriptors

        async def one() -> None:
            async with room:
                while True:
                    try:
                        answer = await ask(path, get("/v1/peers"), seconds=60)
                        break
                    except BlockingIOError:  # the kernel's queue is full
                        await trio.sleep(0.01)
            codes.append(status_of(answer))

        async with trio.open_nursery() as clients:
            for _ in range(1000):
                clients.start_soon(one)
        nursery.cancel_scope.cancel()
    assert codes == [200] * 1000


async def test_no_task_is_left_of_clients_that_have_gone(backend, folder):
    path = folder / "a.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve_admin(
                backend, socket=path, mode=0o600, limits=QUICK, task_status=task_status
            )
        )
        await is_alive(path)
        await trio.sleep(2 * QUICK.linger_s)
        before = trio.lowlevel.current_statistics().tasks_living
        for request in RUDE.values():
            stream = await trio.open_unix_socket(str(path))
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(request)
            await stream.aclose()
        with trio.fail_after(30):
            while trio.lowlevel.current_statistics().tasks_living > before:  # noqa: ASYNC110
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()


async def test_a_write_that_is_broken_off_because_its_client_went_is_noted_too(backend, folder):
    path = folder / "a.sock"

    async def share(_: bool) -> None:
        await trio.sleep_forever()

    backend.share = share
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve_admin(
                backend, socket=path, mode=0o600, limits=QUICK, task_status=task_status
            )
        )
        stream = await trio.open_unix_socket(str(path))
        body = b'{"on":true}'
        await stream.send_all(
            b"POST /v1/share HTTP/1.1\r\nHost: p2pfed\r\nContent-Length: 11\r\n\r\n" + body
        )
        await stream.aclose()
        with trio.fail_after(30):
            while not backend.written:  # noqa: ASYNC110 - the backend knows no trio
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert [entry[2:] for entry in backend.written] == [("POST /v1/share", "cancelled")]


async def test_the_server_ends_at_once_though_a_client_does_not_read(backend, folder):
    path = folder / "a.sock"
    slow = Limits(write_s=3600)
    for _ in range(50):
        backend.emit("noise", text="x" * 100_000)
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve_admin(
                backend, socket=path, mode=0o600, limits=slow, task_status=task_status
            )
        )
        stream = await trio.open_unix_socket(str(path))
        await stream.send_all(get("/v1/events?follow=1"))
        await trio.testing.wait_all_tasks_blocked(0.01)
        clock = FairClock()
        nursery.cancel_scope.cancel()
    assert clock.within(2)
    await stream.aclose()
    assert not path.exists()


# --- binding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_the_socket_has_its_mode_from_the_first_instant(folder, mode, monkeypatch):
    path, seen, real = folder / "a.sock", [], os.umask

    def umask(value: int) -> int:
        if path.exists():
            seen.append(stat.S_IMODE(path.stat().st_mode))  # right after bind
        return real(value)

    monkeypatch.setattr(os, "umask", umask)
    before = real(0o027)
    try:
        bind_socket(path, mode=mode).close()
        assert real(0o027) == 0o027
    finally:
        real(before)
    assert seen == [mode]
    assert stat.S_IMODE(path.stat().st_mode) == mode


async def test_a_live_daemons_socket_is_refused_and_goes_on(served):
    with pytest.raises(StateInUse, match="another daemon is listening"):
        bind_socket(served, mode=0o600)
    assert await is_alive(served)


def test_a_daemon_whose_queue_is_full_is_alive_too(folder):
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as busy:
        busy.bind(str(path))
        busy.listen(0)
        waiting = []
        try:
            for _ in range(4):
                client = socket.socket(socket.AF_UNIX)
                client.setblocking(False)
                waiting.append(client)
                client.connect(str(path))
        except BlockingIOError:
            pass
        with pytest.raises(StateInUse):
            bind_socket(path, mode=0o600)
        for client in waiting:
            client.close()


def test_a_dead_daemons_socket_is_replaced(folder):
    path = folder / "a.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    bind_socket(path, mode=0o600).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_no_socket_is_left_alone(folder):
    path = folder / "a.sock"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is not a socket"):
        bind_socket(path, mode=0o600)
    assert path.read_text() == "precious"


def test_a_path_that_linux_cannot_bind_is_a_clear_error(folder):
    with pytest.raises(ConfigError, match="has 108 bytes"):
        bind_socket(Path("/" + "x" * 107), mode=0o600)
    with pytest.raises(ConfigError, match="cannot make the socket"):
        bind_socket(folder / "missing" / "a.sock", mode=0o600)


async def test_at_exit_only_our_own_socket_is_removed(backend, folder):
    path = folder / "a.sock"
    async with trio.open_nursery() as nursery:
        await nursery.start(
            lambda task_status: serve_admin(
                backend, socket=path, mode=0o600, task_status=task_status
            )
        )
        path.unlink()
        path.write_text("someone else's")
        nursery.cancel_scope.cancel()
    assert path.read_text() == "someone else's"


def test_hypercorn_is_the_version_whose_inner_class_we_use():
    assert importlib.metadata.version("hypercorn").startswith("0.18.")


# --- curl --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("host", ["p2pfed", "localhost"])
def test_it_can_be_used_with_curl(folder, backend, host):
    path = folder / "a.sock"
    with fakes.daemon(backend, path):
        done = subprocess.run(
            ["curl", "-sS", "--fail", "--unix-socket", path, f"http://{host}/v1/peers"],
            capture_output=True,
            check=True,
            timeout=20,
        )
    assert json.loads(done.stdout) == [fakes.PEER]
