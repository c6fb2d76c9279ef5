"""Files that a person names and that are none: nothing is waited for, and nothing read for ever."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from admin_fakes import empty_home

from p2pfed.cli.main import main
from p2pfed.small_files import MOST_BYTES, open_regular, read_small

NAMED = [
    "roster show FILE",
    "roster diff FILE FILE",
    "roster publish FILE",
    "roster verify FILE",
    "steward show FILE",
    "steward sign FILE --key FILE",
    "steward key show FILE",
    "invite list --key FILE",
    "invite revoke North --key FILE",
    "invite create FILE --for North --key FILE",
    "bootstrap check FILE",
    "bootstrap add FILE --name North --addr /ip4/127.0.0.1/tcp/1",
    "run show FILE --roster FILE",
    "run sign FILE --key FILE",
    "run accept FILE",
    "join FILE",
    "join --roster FILE",
    "join --bootstrap FILE",
    "privacy plan --patients 100 --run FILE",
    "privacy ledger --verify FILE",
    "config check FILE",
    "-c FILE config show",
    "node -c FILE",
]


@pytest.fixture
def strange(tmp_path):
    """A pipe, a device, a socket, a folder and a file of 6 GB, by name."""
    paths = {name: tmp_path / name for name in ("pipe", "socket", "folder", "long")}
    os.mkfifo(paths["pipe"])
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(paths["socket"]))
    paths["folder"].mkdir()
    with paths["long"].open("wb") as file:
        file.truncate(6_000_000_000)
    return {**paths, "device": "/dev/zero"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pipe", "no regular file"),
        ("device", "no regular file"),
        ("socket", "No such device"),
        ("folder", "Is a directory"),
        ("long", "more than 1048576 bytes"),
    ],
)
def test_what_is_no_small_file_is_refused_at_once(strange, name, why):
    with pytest.raises(OSError, match=why) as told:
        read_small(strange[name])
    assert why in told.value.strerror


def test_a_file_may_be_as_long_as_it_may_be_and_no_longer(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(MOST_BYTES))
    data, found = read_small(path)
    assert len(data) == found.st_size == MOST_BYTES
    with pytest.raises(OSError, match="more than 1048575 bytes"):
        read_small(path, MOST_BYTES - 1)
    assert read_small("/proc/self/status")[0]  # its length is told as 0


def test_no_descriptor_is_left_open(strange):
    before = len(list(Path("/proc/self/fd").iterdir()))
    for path in strange.values():
        for read in (read_small, open_regular):
            try:
                opened = read(path)
            except OSError:
                continue
            os.close(opened[0])  # the long file alone is a regular one
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize("name", ["pipe", "device"])
@pytest.mark.parametrize("command", NAMED)
def test_no_command_waits_for_a_pipe_or_reads_a_device(strange, monkeypatch, capsys, command, name):
    with empty_home(monkeypatch):
        code = main([str(strange[name]) if word == "FILE" else word for word in command.split()])
    told = capsys.readouterr().err
    assert (code, len(told.splitlines())) == (2, 3), told
    assert "no regular file" in told


@pytest.mark.parametrize("command", ["roster show FILE", "steward key show FILE", "node -c FILE"])
def test_no_command_takes_gigabytes_for_a_document(strange, monkeypatch, capsys, command):
    with empty_home(monkeypatch):
        code = main([str(strange["long"]) if word == "FILE" else word for word in command.split()])
    told = capsys.readouterr().err
    assert (code, "more than 1048576 bytes" in told) == (2, True), told
