"""The trainer's processes meet, and nobody else takes a place among them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from other_users import required

from p2pfed.tcp_table import Socket
from p2pfed.training import meeting
from p2pfed.training.meeting import meet
from p2pfed.training.patients import Part

NOBODY = 65534
KNOCK = """
import os, socket, sys
user, port = map(int, sys.argv[1:])
os.setgid(user)
os.setuid(user)
connection = socket.socket()
connection.connect(("127.0.0.1", port))
print("connected", flush=True)
sys.stdin.read()
"""
needs_root = required("" if os.geteuid() == 0 else "only root can be another user")


@pytest.fixture
def taken_by(monkeypatch):
    """Play gloo: whoever connects to our port is taken for the other process, of what user ever."""
    ended = []

    with contextlib.ExitStack() as stack:

        def play(user):
            def init(*args, **kwargs):
                listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                port = listener.getsockname()[1]
                knocking = subprocess.Popen(
                    [sys.executable, "-c", KNOCK, str(user), str(port)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                )
                stack.enter_context(knocking)
                stack.callback(knocking.stdin.close)
                assert knocking.stdout.readline() == b"connected\n"
                stack.enter_context(listener.accept()[0])

            monkeypatch.setattr(dist, "init_process_group", init)

        monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("group"))
        play.ended = ended
        yield play


@needs_root
def test_a_place_that_another_user_took_is_refused_before_a_word(taken_by, tmp_path):
    taken_by(NOBODY)
    with pytest.raises(RuntimeError, match=r"another program took the place .* user 65534"):
        meet(tmp_path / "meeting", Part(0, 2), 60.0)
    assert taken_by.ended == ["group"]


def test_processes_of_the_same_user_are_let_in(taken_by, tmp_path):
    taken_by(os.geteuid())
    meet(tmp_path / "meeting", Part(0, 2), 60.0)
    assert taken_by.ended == []


def test_where_the_system_does_not_say_whose_they_are_nobody_is_let_in(
    taken_by, tmp_path, monkeypatch
):
    taken_by(os.geteuid())
    monkeypatch.setattr(meeting, "sockets", lambda _: [])
    monkeypatch.setattr(meeting, "_SETTLED_S", 0.1)
    with pytest.raises(RuntimeError, match=r"train\.gpus = 1"):
        meet(tmp_path / "meeting", Part(0, 2), 60.0)


def a_socket(local, remote, user, inode):
    return Socket(["0:", local, remote, "01", "", "", "", str(user), "", inode])


def test_an_end_that_nobody_has_accepted_yet_is_looked_at_again(monkeypatch):
    """Its process is slow; some kernels call root its owner until then."""
    ours = a_socket("0100007F:0001", "0100007F:0002", os.geteuid(), "11")
    waiting = a_socket("0100007F:0002", "0100007F:0001", 0, "0")
    accepted = a_socket("0100007F:0002", "0100007F:0001", os.geteuid(), "12")
    looks = iter([[ours], [ours, waiting], [ours, waiting], [ours, accepted]])
    monkeypatch.setattr(meeting, "sockets", lambda _: next(looks))
    monkeypatch.setattr(meeting, "_LOOK_S", 0.0)
    meeting._check_whose({"11"}, 1)
    assert next(looks, None) is None


WAITER = """
import sys, time
from pathlib import Path
import torch, torch.distributed as dist
from p2pfed.tcp_table import Socket
from p2pfed.training import meeting
from p2pfed.training.patients import Part
meeting._MEETING_S = 20.0
rank = int(sys.argv[2])
meeting.meet(Path(sys.argv[1]), Part(rank, 2), float(sys.argv[3]))
row = torch.zeros(3)
if rank:
    time.sleep(2.0)
    dist.send(torch.ones(3), dst=0)
else:
    dist.recv(row, src=1)
print(row.tolist(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("silence", "told"), [("60", b"[1.0, 1.0, 1.0]"), ("1", b"")])
def test_rows_are_waited_for_as_long_as_silence_is_borne(tmp_path, silence, told):
    command = [sys.executable, "-c", WAITER, str(tmp_path / "meeting")]
    both = [
        subprocess.Popen(
            [*command, rank, silence], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for rank in ("0", "1")
    ]
    try:
        assert both[0].communicate(timeout=200)[0].strip() == told
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_a_connection_of_the_users_own_program_is_nobodys_place(taken_by, tmp_path):
    """A task may hold one to its hospital's data base; it was there before they met."""
    taken_by(os.geteuid())
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as own,
        listener.accept()[0] as other,
    ):
        meet(tmp_path / "meeting", Part(0, 2), 60.0)
        assert own.fileno() > 0
        assert other.fileno() > 0
