"""The kernel's table of TCP sockets, against sockets of our own."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from p2pfed import tcp_table
from p2pfed.tcp_table import ESTABLISHED, LISTENING, sockets


def inode(of: socket.socket) -> str:
    return os.readlink(f"/proc/self/fd/{of.fileno()}").removeprefix("socket:[").removesuffix("]")  # noqa: PTH115


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_both_ends_of_a_connection_are_told_with_their_user(family):
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with (
        socket.create_server((host, 0), family=family) as server,
        socket.create_connection(server.getsockname()[:2]) as near,
        server.accept()[0] as far,
    ):
        rows = {row.inode: row for row in sockets(ESTABLISHED)}
        ours, theirs = rows[inode(near)], rows[inode(far)]
        assert (ours.local, ours.remote) == (theirs.remote, theirs.local)
        assert ours.user == theirs.user == os.geteuid()
        assert inode(server) not in rows
        assert inode(server) in {row.inode for row in sockets(LISTENING)}


def test_where_the_kernel_says_nothing_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(tcp_table, "Path", lambda *_: Path(tmp_path, "no such file"))
    assert list(sockets(ESTABLISHED)) == []
