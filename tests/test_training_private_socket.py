"""The trainer's own read-only socket: real Unix sockets, garbage included."""

from __future__ import annotations

import http.client
import json
import socket
import stat

import pytest

from p2pfed.errors import ConfigError, StateInUse
from p2pfed.training.private_socket import serve_private_socket

VIEWS = {"/v1/status": lambda: {"device": "cpu"}, "/v1/broken": lambda: {"x": object()}}


def ask(path, method="GET", target="/v1/status"):
    connection = http.client.HTTPConnection("local")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(30)
    connection.sock.connect(str(path))
    try:
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture
def served(tmp_path):
    path = tmp_path / "t.sock"
    with serve_private_socket(path, VIEWS):
        yield path
    assert not path.exists()


def test_a_view_is_given_as_json_to_the_owner_only(served):
    status, body = ask(served)
    assert (status, json.loads(body)) == (200, {"device": "cpu"})
    assert stat.S_IMODE(served.stat().st_mode) == 0o600


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"])
def test_nothing_can_be_changed(served, method):
    assert ask(served, method)[0] == 405


@pytest.mark.parametrize("target", ["/", "/v1", "/v1/status/", "/../etc/passwd", "/v1/status?x=1"])
def test_other_pages_are_not_found(served, target):
    assert ask(served, target=target)[0] == 404


@pytest.mark.parametrize(
    "garbage",
    [b"", b"\0" * 100, b"GET\r\n\r\n", b"GET /" + b"a" * 70_000, b"BREW / HTTP/1.1\r\n\r\n"],
)
def test_garbage_does_not_stop_it(served, garbage):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(served))
        client.sendall(garbage)
    assert ask(served)[0] == 200


def test_a_view_that_fails_does_not_stop_it(served):
    with pytest.raises(http.client.HTTPException):
        ask(served, target="/v1/broken")
    assert ask(served)[0] == 200


def test_a_socket_left_by_a_killed_trainer_is_replaced(tmp_path):
    path = tmp_path / "t.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with serve_private_socket(path, VIEWS):
        assert ask(path)[0] == 200


def test_a_live_socket_is_refused_and_goes_on(served):
    with pytest.raises(StateInUse, match="another trainer"), serve_private_socket(served, VIEWS):
        pass
    assert ask(served)[0] == 200


def test_a_file_that_is_no_socket_is_kept(tmp_path):
    path = tmp_path / "t.sock"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="no socket"), serve_private_socket(path, VIEWS):
        pass
    assert path.read_text() == "mine"


def test_a_path_over_107_bytes_is_refused(tmp_path):
    path = tmp_path / ("x" * 108)
    with pytest.raises(ConfigError, match="107"), serve_private_socket(path, VIEWS):
        pass


def test_a_path_in_no_folder_is_refused(tmp_path):
    path = tmp_path / "none" / "t.sock"
    with pytest.raises(ConfigError, match="cannot make"), serve_private_socket(path, VIEWS):
        pass
